"""Plot the loss curves of several MLflow runs in one picture.

python benchmarks/plot_runs.py TRACKING_URI OUT.png RUN_ID [RUN_ID ...]
"""

import sys

import matplotlib as mpl
from matplotlib import pyplot as plt
from mlflow import MlflowClient


def main(uri: str, out: str, run_ids: list[str]) -> None:
    mpl.use("Agg")
    client = MlflowClient(uri)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for run_id in run_ids:
        run = client.get_run(run_id)
        points = sorted(client.get_metric_history(run_id, "train/loss"), key=lambda p: p.step)
        label = f"{run.info.run_name}, seed {run.data.tags['seed']}"
        steps, losses = [p.step for p in points], [p.value for p in points]
        axes.plot(steps, losses, linewidth=1, label=label)
    axes.set(
        xlabel="optimizer step",
        ylabel="MSE on removed patches (norm-pix)",
        title="Pretraining loss, CIFAR-10, ViT micro 192x6, patch 4, 75 % removed",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
