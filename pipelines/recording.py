"""What a run leaves in MLflow from the driver: its start, its data, how it ended."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

from infra import storage, tracking
from infra.config import TrackingConfig
from mae_core.config import StrictConfig
from pipelines import launch
from pipelines.config import flatten
from pipelines.reporting import count_kinds
from pipelines.run_folder import RunFolder, RunRecord

logger = logging.getLogger(__name__)


class RunConfig(Protocol):
    """What every stage's config has."""

    @property
    def tracking(self) -> TrackingConfig: ...

    @property
    def run_name(self) -> str: ...


def start_record(
    config: RunConfig,
    folder: RunFolder,
    record: RunRecord,
    *,
    tags: dict[str, str],
    data: Mapping[str, tuple[str, str]],
) -> str | None:
    """Start or reopen the run in MLflow, and write down what this run is: MLflow's id.

    Args:
        config: the stage's.
        folder: taken over for `record.start`.
        record: with the id of the MLflow run that is reopened, if there is one.
        tags: see `launch.run_tags`.
        data: digest and source of each data set, by what it is used for.
    """
    assert isinstance(config, StrictConfig)
    started = tracking.start_run(
        config.tracking,
        run_name=config.run_name,
        params=flatten(config),
        tags=tags,
        run_id=record.run_id,
    )
    # A server that is down now does not make the run a new one later.
    folder.write_record(record.model_copy(update={"run_id": started or record.run_id}))
    for name, (digest, source) in data.items():
        tracking.log_dataset(
            config.tracking.uri,
            started,
            name=name,
            digest=digest,
            source=source,
            context=tags["stage"],
        )
    logger.info("run: %s", folder.uri)
    return started


@contextmanager
def ended_in_mlflow(uri: str, run_id: str | None, folder: RunFolder) -> Iterator[None]:
    """Mark the run as it ends: finished, failed, or killed and resumable."""

    def end(status: tracking.Status) -> None:
        if not folder.is_superseded():
            tracking.end_run(uri, run_id, status)

    try:
        # Without asking whose the run is: the storage may be what hangs, and `ray job stop` waits
        # for three seconds.
        killed = partial(tracking.end_run, uri, run_id, "KILLED")
        with launch.cancel_on_signals(killed):
            yield
    except launch.CancelledError:
        logger.info("stopped; the same command goes on from the last checkpoint in %s", folder.uri)
        raise
    except BaseException as error:
        folder.check_start()
        end("FAILED")
        with suppress(storage.StorageError):  # must not take the place of `error`
            log_bad_samples(uri, run_id, folder)
        folder.record_failure(error)
        folder.raise_failure()
        raise
    end("FINISHED")


def log_bad_samples(uri: str, run_id: str | None, folder: RunFolder) -> list[dict[str, Any]]:
    """The samples that were left out, each once: said, and listed in MLflow."""
    bad = folder.read_bad_samples()
    if bad:
        logger.warning(
            "left out %d samples (%s): %s", len(bad), count_kinds(bad), folder.bad_samples_uri
        )
        text = "".join(json.dumps(line) + "\n" for line in bad)
        tracking.log_artifact_text(uri, run_id, text, "bad_samples.jsonl")
    return bad


def say_where_to_compare(uri: str) -> None:
    if uri.startswith("sqlite:"):
        logger.info("to compare runs: mlflow ui --backend-store-uri %s", uri)
    else:
        logger.info("to compare runs: open %s", uri)
