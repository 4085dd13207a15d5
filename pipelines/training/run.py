"""What the drivers of the training stages share."""

from collections.abc import Callable
from typing import Any, TypeVar

import ray.data
import ray.train
from ray.train.torch import TorchTrainer

from pipelines.config.sections import ScalingConfig
from pipelines.training import launch
from pipelines.training.process_group import OneAddressTorchConfig

TaskT = TypeVar("TaskT")

# What a worker may wait for the others, unless a stage says more; torch's own default.
WORKER_TIMEOUT_S = 1800


def fit(
    loop: Callable[[dict[str, TaskT]], None],
    task: TaskT,
    *,
    run_uri: str,
    scaling: ScalingConfig,
    read: Callable[[], ray.data.Dataset] | None,
    timeout_s: int = WORKER_TIMEOUT_S,
) -> None:
    """Start the training workers, run `loop({"task": task})` in each and wait for all of them.

    Args:
        loop: the training function of a worker; it runs again after a worker was lost.
        task: all that a worker must know.
        run_uri: the run's folder.
        scaling: of the stage's config.
        read: opens the training data. It is called before each start of the workers, so that a
            recovery reads from its own position on. None: the workers need no training data.
        timeout_s: how long a worker may wait for the others.
    """
    datasets: dict[str, Any] = {} if read is None else {"train": read}
    trainer = TorchTrainer(
        loop,
        train_loop_config={"task": task},
        scaling_config=launch.ray_scaling(scaling),
        run_config=launch.ray_run(run_uri, scaling),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(enable_shard_locality=False),
        torch_config=OneAddressTorchConfig(timeout_s=timeout_s),
    )
    trainer.fit()
