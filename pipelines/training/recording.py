"""Record a run in MLflow from the driver: its start, its data and its end."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from uuid import uuid4

from infra import storage, tracking
from mae_core.config import StrictConfig
from pipelines import driver, job
from pipelines.config.fields import flatten
from pipelines.config.sections import SavingConfig
from pipelines.driver import Stopper
from pipelines.outcome import known_error
from pipelines.terminal import progress
from pipelines.terminal.run_page import how_to_see
from pipelines.training.checkpoints import newest_step
from pipelines.training.protocol import RunConfig
from pipelines.training.reporting import count_kinds
from pipelines.training.run_folder import RunFolder, RunRecord, Taken
from pipelines.training.stopping import Channel, Phase, Told

logger = logging.getLogger(__name__)


# Sections and fields that do not describe the result, and paths that a pipeline fills in.
UNNAMED = (
    "name",
    "storage.",
    "tracking.",
    "scaling.",
    "checkpoint.",
    "reporting.",
    "debug.",
    "init_from",
    "query",
)


def take_over(
    config: RunConfig,
    folder: RunFolder,
    *,
    digest: str,
    inputs: Mapping[str, str],
    earlier: RunRecord | None,
    fresh: bool,
    tags: dict[str, str],
    data: Mapping[str, tuple[str, str]],
) -> Taken:
    """Start or reopen the run in MLflow, and write the run's record.

    Args:
        config: the stage's.
        folder: of the run.
        digest: names the data, and the weights that it starts from.
        inputs: see `earlier_record`.
        earlier: as `earlier_record` found it; its MLflow run is reopened.
        fresh: delete what is there; only now, for a mistake in the command must not cost it.
        tags: see `driver.run_tags`.
        data: digest and source of each data set, by what it is used for.
    """
    assert isinstance(config, StrictConfig)
    if fresh:
        folder.clear()
    reopened = earlier.run_id if earlier else None
    run_id = tracking.start_run(
        config.tracking,
        run_name=config.name or tags["stage"],
        params=flatten(config),
        tags=tags,
        run_id=reopened,
        unnamed=UNNAMED,
    )
    start = uuid4().hex
    folder.write_record(
        RunRecord(
            start=start,
            data_digest=digest,
            inputs=dict(inputs),
            # If the server is down now, the run must still be found later.
            run_id=run_id or reopened,
            config=config.model_dump(mode="json"),
        )
    )
    for name, (data_digest, source) in data.items():
        tracking.log_dataset(
            config.tracking.uri,
            run_id,
            name=name,
            digest=data_digest,
            source=source,
            context=tags["stage"],
        )
    logger.info("run: %s", folder.uri)
    return Taken(RunFolder(folder.uri, start), run_id)


@contextmanager
def ended_in_mlflow(
    uri: str, run_id: str | None, folder: RunFolder, *, what_is_saved: Callable[[], str]
) -> Iterator[Stopper]:
    """Mark the run in MLflow by how the block ends: finished, failed, or killed and resumable.

    `what_is_saved` returns the message for the user of a run that was stopped.
    """

    def end(status: tracking.Status) -> None:
        if not folder.is_superseded():
            tracking.end_run(uri, run_id, status)

    try:
        # Without checking who owns the run, because the storage may be what hangs, and `ray job
        # stop` waits for only three seconds.
        killed = partial(tracking.end_run, uri, run_id, "KILLED")
        with driver.cancel_on_signals(killed) as stopper:
            yield stopper
    except driver.CancelledError:
        try:
            logger.info("stopped %s", what_is_saved())
        except storage.StorageError as error:
            logger.warning("stopped; what is saved can't be looked up: %s", error)
        raise
    except BaseException as error:
        folder.check_start()
        end("FAILED")
        with suppress(storage.StorageError):  # must not replace `error`
            log_bad_samples(uri, run_id, folder)
        folder.record_failure(error)
        known = None
        with suppress(storage.StorageError):  # the store may be what failed
            known = folder.read_failure()
        known = known or known_error(error)
        if known is None or known is error:
            raise
        raise known from error
    end("FINISHED")


def saved_steps(run_uri: str, channel: Channel, total_steps: int) -> str:
    """Say where a stopped run will continue; the text follows the word "stopped"."""
    told = channel.told()
    step = newest_step(run_uri)
    if step is None:
        return "before the first checkpoint was written: the same command starts over"
    if told.phase is Phase.STOPPED and told.step == step:
        return (
            f"at step {step} of {total_steps}; checkpoint written; the same command goes on from "
            "there"
        )
    if step == total_steps:
        return f"after all {total_steps} steps; the same command goes on from there"
    return (
        f"before its next checkpoint was written; the newest is of step {step} of {total_steps}, "
        "and the same command goes on from there"
    )


def run_until_stopped(
    stopper: Stopper, fit: Callable[[], object], channel: Channel, saving: SavingConfig
) -> None:
    """Run Ray's workers by calling `fit`, and show their progress.

    After a signal they finish their step and save it.
    """

    def ask() -> None:
        if channel.told().phase is Phase.TRAINING:
            logger.info("stopping after this step, with a checkpoint (Ctrl-C again: at once)")
        channel.ask()

    with progress.doing("starting the workers", lambda: _state(channel.told())):
        stopper.run(
            fit,
            ask=ask,
            is_worth_waiting=lambda: channel.told().phase is Phase.TRAINING,
            grace_s=job.grace_s(saving.grace_s),
        )


def _state(told: Told) -> progress.Progress:
    """Return what the workers reported, for the user."""
    what = {
        Phase.STARTING: "starting the workers",
        Phase.TRAINING: told.what or "reading the first images",
        Phase.MEASURING: told.what or "measuring",
        Phase.STOPPED: "stopping the workers",
    }[told.phase]
    is_counted = told.phase in (Phase.TRAINING, Phase.MEASURING)
    return progress.Progress(what, told.step, told.total if is_counted else 0, told.detail)


def log_bad_samples(uri: str, run_id: str | None, folder: RunFolder) -> list[dict[str, Any]]:
    """Log the samples that were left out, each once, and list them in MLflow."""
    bad = folder.read_bad_samples()
    if bad:
        logger.warning(
            "left out %d samples (%s): %s", len(bad), count_kinds(bad), folder.bad_samples_uri
        )
        text = "".join(json.dumps(line) + "\n" for line in bad)
        tracking.log_artifact_text(uri, run_id, text, "bad_samples.jsonl")
    return bad


def say_where_to_compare(uri: str, run_id: str | None) -> None:
    """Log how to see the run and compare it with others.

    A stage of a pipeline logs nothing, because the pipeline does so once. Neither does a command at
    a terminal, because its last line says it.
    """
    if run_id is not None and not os.environ.get(job.STAGE_VARIABLE) and not sys.stdout.isatty():
        logger.info("%s", how_to_see(uri, run_id))


def tell_evaluation(uri: str, run_id: str | None, failure: Exception | None) -> None:
    """Tag the run in MLflow with how its evaluation went."""
    lines = str(failure).splitlines() or [type(failure).__name__]
    text = "done" if failure is None else f"failed: {lines[0][:300]}"
    tracking.set_tags(uri, run_id, {"evaluation": text})
