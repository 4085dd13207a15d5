"""What happens once a run has work to do and Ray runs: its record, the workers and the result."""

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
from pipelines.outcome import StageResult, chain
from pipelines.reading.sequence import configure_ray_data
from pipelines.terminal import worker_logging
from pipelines.training import launch, local_mode, recording
from pipelines.training.checkpoints import StartAgainError
from pipelines.training.process import BatchT, DecodedT, PartT, TrainingJob, training_worker
from pipelines.training.process_group import OneAddressTorchConfig
from pipelines.training.protocol import OpenedRun, PlannedRun, Run, RunConfig
from pipelines.training.run_folder import RunFolder, RunRecord, Taken

logger = logging.getLogger(__name__)

# What a worker may wait for the others, unless a stage says more; torch's own default.
WORKER_TIMEOUT_S = 1800


def start(
    run: Run,
    opened: OpenedRun,
    folder: RunFolder,
    *,
    record: RunRecord | None,
    earlier: StageResult | None,
    fresh: bool,
) -> StageResult:
    """Plan a run, take it over, do it and finish it. Ray runs already.

    Args:
        run: the stage's part.
        opened: the run with its data open.
        folder: of the run.
        record: what an earlier start wrote down.
        earlier: the result of an earlier start, in which something is missing.
        fresh: delete what is there.
    """
    config, identity = run.config, opened.identity
    worker_logging.quiet_ray()  # this module has imported Ray Data
    configure_ray_data()
    planned = opened.plan()
    taken = recording.take_over(
        config,
        folder,
        digest=identity.digest,
        inputs=identity.inputs,
        earlier=record,
        fresh=fresh,
        tags=dict(identity.tags),
        data=identity.data,
    )
    return _work(config, planned, taken, earlier)


def _work(
    config: RunConfig, planned: PlannedRun, taken: Taken, earlier: StageResult | None
) -> StageResult:
    """Let the workers run, and finish."""
    work, folder, uri = planned.work(taken), taken.folder, config.tracking.uri
    failure: Exception | None = None
    with recording.ended_in_mlflow(
        uri, taken.run_id, folder, what_is_saved=work.what_is_saved
    ) as stopper:
        folder.forget_failure()
        try:
            recording.run_until_stopped(stopper, work.run, work.channel, config.checkpoint)
        except Exception as error:
            folder.check_start()
            if not planned.is_kept(taken):
                raise
            failure = error
        result = planned.finish(taken, earlier, failure)
        recording.say_where_to_compare(uri, taken.run_id)
    if failure is not None:
        logger.error(
            "the training is done and kept in %s; its evaluation failed: the same command "
            "evaluates anew without training again",
            result.output,
        )
        folder.record_failure(failure)
        folder.raise_failure()
        raise failure
    return result


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
    if launch.trains_in_driver(job.config.scaling):
        local_mode.fit(trainer.fit, job.config.scaling, job.channel.is_asked)
    else:
        trainer.fit()


def ray_scaling(scaling: ScalingConfig) -> RayScalingConfig:
    if launch.trains_in_driver(scaling):
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
