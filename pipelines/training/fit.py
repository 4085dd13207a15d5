"""Let the training workers of a run train: in Ray Train's processes, or in this one."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import ray.data
import ray.train
from ray.train import FailureConfig
from ray.train import RunConfig as RayRunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.train.torch import TorchTrainer

from infra import storage
from pipelines.config.sections import ScalingConfig
from pipelines.job import trains_in_driver
from pipelines.outcome import chain
from pipelines.reading.sequence import configure_ray_data
from pipelines.terminal import worker_logging
from pipelines.training import local_mode
from pipelines.training.checkpoints import StartAgainError
from pipelines.training.process import BatchT, DecodedT, PartT, TrainingJob, training_worker
from pipelines.training.process_group import OneAddressTorchConfig
from pipelines.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

# What a worker may wait for the others, unless a stage says more; torch's own default.
WORKER_TIMEOUT_S = 1800


def fit(
    job: TrainingJob[PartT, DecodedT, BatchT],
    read: Callable[[], ray.data.Dataset] | None,
    timeout_s: int = WORKER_TIMEOUT_S,
) -> None:
    """Start the training workers, let each of them train, and wait for all.

    Args:
        job: all that a worker must know.
        read: opens the training data. It is called before each start of the workers, so that a
            recovery reads from its own position on. None: the workers need no training data.
        timeout_s: how long a worker may wait for the others.
    """
    worker_logging.quiet_ray()  # this module has imported Ray Data
    configure_ray_data()
    while True:
        try:
            _fit_once(job, read, timeout_s)
        except Exception as error:
            # Each time, one checkpoint fewer counts as whole.
            if not any(isinstance(link, StartAgainError) for link in chain(error)):
                raise
            logger.info("the workers start again, from the checkpoint before")
        else:
            return


def _fit_once(
    job: TrainingJob[PartT, DecodedT, BatchT],
    read: Callable[[], ray.data.Dataset] | None,
    timeout_s: int,
) -> None:
    datasets: dict[str, Any] = {} if read is None else {"train": partial(_opened, job.folder, read)}
    trainer = TorchTrainer(
        training_worker,
        train_loop_config={"job": job},
        scaling_config=ray_scaling(job.config.scaling),
        run_config=ray_run(job.run_uri, job.config.scaling),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(enable_shard_locality=False),
        torch_config=OneAddressTorchConfig(timeout_s=timeout_s),
    )
    if trains_in_driver(job.config.scaling):
        local_mode.fit_in_driver(trainer.fit, job.config.scaling, job.channel.is_asked)
    else:
        trainer.fit()


def ray_scaling(scaling: ScalingConfig) -> RayScalingConfig:
    if trains_in_driver(scaling):
        return RayScalingConfig(num_workers=0, use_gpu=scaling.use_gpu)
    return RayScalingConfig(
        num_workers=scaling.num_workers,
        use_gpu=scaling.use_gpu,
        resources_per_worker={
            "CPU": scaling.cpus_per_worker,
            **({"GPU": 1} if scaling.use_gpu else {}),
        },
    )


def ray_run(run_uri: str, scaling: ScalingConfig) -> RayRunConfig:
    """Ray keeps its bookkeeping in the run's own folder."""
    filesystem, path = storage.open_filesystem(run_uri)
    folder, _, name = path.rpartition("/")
    return RayRunConfig(
        name=name,
        storage_path=folder,
        storage_filesystem=filesystem,
        # mypy sees Ray Train's first version, which has no such field.
        failure_config=FailureConfig(  # type: ignore[call-arg]
            max_failures=scaling.max_failures, controller_failure_limit=0
        ),
        logging_config=ray.train.LoggingConfig(log_level="WARNING"),
    )


def _opened(folder: RunFolder, read: Callable[[], ray.data.Dataset]) -> ray.data.Dataset:
    """Open the data for one start of the workers, unless that start would be in vain."""
    folder.check_start()
    folder.raise_failure()
    folder.check_writable()
    configure_ray_data()
    return read()
