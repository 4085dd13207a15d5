"""How every run with workers goes, whatever its stage: the one driver of pretraining, the
downstream stages and embed.

    open the data          `Run.open`: nothing is started yet
    say what it is         `OpenedRun.identity`: digest, inputs, data sets, tags
    is it done?            `OpenedRun.reuse`
    plan                   `OpenedRun.plan`: a mistake is told before Ray is started
    take over              the run's folder and its MLflow run are this start's from here on
    run                    `PlannedRun.work`, until it is done or the run is stopped
    finish                 `PlannedRun.finish`: the result is written last
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import ray.data
import ray.train
from ray.train.torch import TorchTrainer

from infra import storage
from infra.config import StorageConfig
from infra.shard_spec import as_entries
from mae_core.config import StrictConfig
from pipelines import driver
from pipelines.config.sections import SavingConfig, ScalingConfig
from pipelines.outcome import StageResult
from pipelines.reading.sequence import configure_ray_data
from pipelines.training import launch, local_mode, recording
from pipelines.training.checkpoints import at_newest_checkpoint
from pipelines.training.process import TrainingJob, training_worker
from pipelines.training.process_group import OneAddressTorchConfig
from pipelines.training.recording import Taken
from pipelines.training.run_folder import RunFolder
from pipelines.training.stopping import StopChannel

logger = logging.getLogger(__name__)

# What a worker may wait for the others, unless a stage says more; torch's own default.
WORKER_TIMEOUT_S = 1800


class RunConfig(recording.RunConfig, Protocol):
    """What the config of every such stage has."""

    @property
    def run_name(self) -> str: ...

    @property
    def storage(self) -> StorageConfig: ...

    @property
    def scaling(self) -> ScalingConfig: ...

    @property
    def checkpoint(self) -> SavingConfig: ...


class Identity(NamedTuple):
    """What a run is computed from; what MLflow's list of runs can be searched by."""

    digest: str  # of the data, and of the weights that it starts from
    inputs: Mapping[str, str]  # a fingerprint of each, by the key of the config that names it
    data: Mapping[str, tuple[str, str]]  # digest and source of each data set, by its use
    tags: Mapping[str, str]


class Work(NamedTuple):
    """What the workers of a run do."""

    run: Callable[[], object]  # returns when it is done
    channel: StopChannel
    what_is_saved: Callable[[], str]  # for the user of a run that was stopped


class PlannedRun(Protocol):
    """A run that can start."""

    def work(self, taken: Taken) -> Work: ...

    def is_kept(self, taken: Taken) -> bool:
        """Return whether what the workers did counts, although they failed in the end."""

    def finish(
        self, taken: Taken, earlier: StageResult | None, failure: Exception | None
    ) -> StageResult:
        """Record what the workers made, and write the result.

        Args:
            taken: the run.
            earlier: the result of an earlier start, if there is one.
            failure: what the workers failed with, if `is_kept` said that their work counts.
        """


class OpenedRun(Protocol):
    """A run whose data are open."""

    @property
    def identity(self) -> Identity: ...

    def reuse(self, done: StageResult) -> StageResult | None:
        """Return the result of an earlier start as this start's; None if work is left to do."""

    def plan(self) -> PlannedRun: ...


class Run(Protocol):
    """A stage's own part of its driver."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def stage(self) -> str: ...

    @property
    def trains(self) -> bool:
        """Whether its workers are those of `fit`, of which a single one may be the driver."""

    def open(self, folder: RunFolder) -> OpenedRun:
        """Open the data; an earlier result counts only for the data that it was made of."""


ConfigT = TypeVar("ConfigT", bound=StrictConfig)


def checked(config: ConfigT, given: Mapping[str, str | Sequence[str] | None]) -> ConfigT:
    """Check where a config points, and return it with the checkpoint that its `init_from` means.

    Args:
        config: the stage's.
        given: each path of the config, or several, by the key.

    Raises:
        ConfigError: names the key.
    """
    named = ((key, spec) for key, spec in given.items() if spec is not None)
    driver.check_paths((key, uri) for key, spec in named for uri in as_entries(spec))
    tracked: Any = config
    driver.check_tracking(tracked.tracking.uri)
    return at_newest_checkpoint(config)


def drive(run: Run, *, fresh: bool) -> StageResult:
    """Do a run, or go on with it, or find that it is done.

    Raises:
        ConfigError, DataError, NoShardsError, StorageError: before any worker is started, unless
            only reading can tell.
    """
    config = run.config
    root = storage.absolute(config.storage.root)
    folder = RunFolder(storage.join(root, run.stage, config.run_name))
    if fresh:
        storage.delete_folder(folder.index_uri)
    opened = run.open(folder)
    identity = opened.identity
    record = None if fresh else recording.earlier_record(folder, identity.digest, identity.inputs)
    earlier = None if fresh else folder.read_whole_result()
    if earlier is not None and (kept := opened.reuse(earlier)) is not None:
        logger.info("%s is done: its result is reused (--fresh starts over)", folder.uri)
        return kept
    planned = opened.plan()
    in_driver = run.trains and launch.trains_in_driver(config.scaling)
    with launch.running_ray(config.scaling, in_driver=in_driver):
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
        recording.say_where_to_compare(uri)
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


JobT = TypeVar("JobT", bound=TrainingJob)


def fit(
    job: JobT,
    read: Callable[[JobT], ray.data.Dataset] | None,
    timeout_s: int = WORKER_TIMEOUT_S,
) -> None:
    """Start the training workers, let each of them train, and wait for all.

    Args:
        job: all that a worker must know.
        read: opens the training data. It is called before each start of the workers, so that a
            recovery reads from its own position on. None: the workers need no training data.
        timeout_s: how long a worker may wait for the others.
    """
    datasets: dict[str, Any] = {} if read is None else {"train": partial(_opened, job, read)}
    trainer = TorchTrainer(
        training_worker,
        train_loop_config={"task": job},
        scaling_config=launch.ray_scaling(job.config.scaling),
        run_config=launch.ray_run(job.run_uri, job.config.scaling),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(enable_shard_locality=False),
        torch_config=OneAddressTorchConfig(timeout_s=timeout_s),
    )
    if launch.trains_in_driver(job.config.scaling):
        local_mode.fit(trainer.fit, job.config.scaling, job.channel.is_asked)
    else:
        trainer.fit()


def _opened(job: JobT, read: Callable[[JobT], ray.data.Dataset]) -> ray.data.Dataset:
    """Open the data for one start of the workers, unless that start would be in vain."""
    job.folder.check_start()
    job.folder.raise_failure()
    job.folder.check_writable()
    configure_ray_data()
    return read(job)
