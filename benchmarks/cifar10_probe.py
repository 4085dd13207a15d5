"""Measure CIFAR-10 encoders by linear probe and kNN, against an untrained one and raw pixels.

    python benchmarks/cifar10_probe.py s3://data/cifar10 CHECKPOINT [CHECKPOINT ...]

CHECKPOINT is a folder or URI of a checkpoint, one per seed. Prints one table.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infra import storage
from infra.shard_spec import expand_shards
from mae_core.checkpoint import load_encoder
from mae_core.checkpoint_manifest import CheckpointManifest
from mae_core.data.decode import decode_image
from mae_core.data.samples import iter_samples
from mae_core.data.views import normalize
from mae_core.evaluation.classification import encode_features, knn_accuracy
from mae_core.evaluation.linear_probe import linear_probe_accuracy
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.mae import build_mae
from pipelines.training.checkpoints import fetch_checkpoint

NUM_TRAIN, NUM_TEST = 10_000, 7_500
BATCH = 500


def main(data: str, checkpoints: list[str]) -> None:
    train = load(f"{data}/train-{{000000..000007}}.tar", NUM_TRAIN)
    test = load(f"{data}/test-{{000000..000001}}.tar", NUM_TEST)
    rows: dict[str, list[tuple[float, float]]] = {"raw pixels": [], "untrained": [], "trained": []}
    raw = [
        torch.from_numpy(pixels.reshape(len(pixels), -1) / 255.0).float()
        for pixels, _ in (train, test)
    ]
    rows["raw pixels"].append(scores(raw[0], train[1], raw[1], test[1], seed=0))
    for uri in checkpoints:
        with tempfile.TemporaryDirectory() as workspace:
            found = fetch_checkpoint(storage.absolute(uri), Path(workspace) / "checkpoint")
            trained, manifest = load_encoder(found.folder)
        torch.manual_seed(manifest.seed)
        untrained = build_mae(manifest.model, manifest.masking, manifest.loss).encoder
        for name, encoder in (("untrained", untrained), ("trained", trained)):
            features = [encode(encoder, manifest, pixels) for pixels, _ in (train, test)]
            result = scores(features[0], train[1], features[1], test[1], seed=manifest.seed)
            rows[name].append(result)
            print(
                f"{name} seed={manifest.seed} linear={result[0]:.3f} knn={result[1]:.3f}",
                flush=True,
            )
    print("\n| features | linear probe | kNN, k=20 | seeds: linear | kNN |\n|---|---|---|---|---|")
    for name, results in rows.items():
        linear, knn = np.asarray(results).T
        shown = " | ".join(" ".join(f"{value:.3f}" for value in values) for values in (linear, knn))
        print(f"| {name} | {linear.mean():.3f} | {knn.mean():.3f} | {shown} |")


def load(spec: str, limit: int) -> tuple[np.ndarray, Tensor]:
    samples = [sample for _, sample in zip(range(limit), read(spec), strict=False)]
    pixels = np.stack([decode_image(sample.image, 3) for sample in samples])
    return pixels, torch.tensor([int(sample.parts["cls"]) for sample in samples])


def read(spec: str) -> Iterator:
    for shard in expand_shards(spec):
        with storage.open_stream(shard) as stream:
            yield from iter_samples(stream, shard)


def encode(encoder: MaskedEncoder, manifest: CheckpointManifest, pixels: np.ndarray) -> Tensor:
    return torch.cat(
        [
            encode_features(
                encoder,
                torch.from_numpy(
                    normalize(pixels[i : i + BATCH], manifest.channel_mean, manifest.channel_std)
                ),
            )
            for i in range(0, len(pixels), BATCH)
        ]
    )


def scores(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, seed: int
) -> tuple[float, float]:
    return (
        linear_probe_accuracy(train, train_labels, test, test_labels, seed=seed),
        knn_accuracy(train, train_labels, test, test_labels, k=20),
    )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
