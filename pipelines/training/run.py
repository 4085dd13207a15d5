"""Drive a run, whatever its stage: pretraining, the downstream stages and embed.

open the data          `Run.open`: nothing is started yet
identify the run       `OpenedRun.identity`: digest, inputs, data sets, tags
look for a result      `OpenedRun.reuse`: a finished run ends here
start Ray              if the run needs it; meanwhile a thread imports torch
plan                   `OpenedRun.plan`: a mistake is reported before anything is written
take over              from here on, the run's folder and its MLflow run belong to this start
run                    `PlannedRun.work`, until it is done or the run is stopped
finish                 `PlannedRun.finish`: the result is written last
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from infra import machine, storage
from infra.quick_imports import without_collecting
from infra.shard_spec import as_entries
from pipelines import driver, job
from pipelines.config.sections import ScalingConfig
from pipelines.outcome import StageResult
from pipelines.reading.weight_places import RUN_PREFIX
from pipelines.training.early_imports import importing
from pipelines.training.init_from import ConfigT, with_weights
from pipelines.training.protocol import Run
from pipelines.training.run_folder import RunFolder, earlier_record

logger = logging.getLogger(__name__)

# Modules of ours that import torch and timm, but nothing that Ray imports when it starts.
HEAVY = ("mae_core.train_step", "mae_core.model.mae")


def checked(config: ConfigT, given: Mapping[str, str | Sequence[str] | None]) -> ConfigT:
    """Check the paths of a config, and replace its `init_from` by the checkpoint that it refers to.

    Args:
        config: the stage's.
        given: each path of the config, or several, by the key.

    Raises:
        ConfigError: names the key.
    """
    named = ((key, spec) for key, spec in given.items() if spec is not None)
    named = ((key, spec) for key, spec in named if not _is_run(key, spec))
    driver.check_paths((key, uri) for key, spec in named for uri in as_entries(spec))
    driver.check_tracking(config.tracking.uri)
    return with_weights(config)


def _is_run(key: str, spec: str | Sequence[str]) -> bool:
    """Return whether a value names a run, and is no path."""
    return key == "init_from" and isinstance(spec, str) and spec.startswith(RUN_PREFIX)


@contextmanager
def _without_ray(scaling: ScalingConfig) -> Iterator[None]:
    """Do in the block what `running_ray` does besides: check the machine, and hear of SIGTERM."""
    job.check_resources(scaling, machine.count_cpus(), machine.count_gpus(), "this machine")
    with driver.cancelled_by_sigterm():
        yield


def drive(run: Run, *, fresh: bool) -> StageResult:
    """Do a run, or resume it, or return its result if it is finished.

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
    record = None if fresh else earlier_record(folder, identity.digest, identity.inputs)
    earlier = None if fresh else folder.read_whole_result()
    if earlier is not None and (kept := opened.reuse(earlier)) is not None:
        logger.info("%s is done: its result is reused (--fresh starts over)", folder.uri)
        return kept
    # Imported here, because a finished run is found without torch, Ray and MLflow.
    with ExitStack() as stack:
        if run.needs_ray:
            with without_collecting(), importing(HEAVY):
                from pipelines.training import launch

                in_driver = job.trains_in_driver(config.scaling)
                stack.enter_context(launch.running_ray(config.scaling, in_driver=in_driver))
        else:
            stack.enter_context(_without_ray(config.scaling))
        with without_collecting():
            from pipelines.training.start import start

        return start(run, opened, folder, record=record, earlier=earlier, fresh=fresh)
