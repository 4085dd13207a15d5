"""Record runs in MLflow without delaying training steps.

Problems with MLflow never stop a run: a server that is down costs a warning and some seconds, and
no function here raises. With `run_id=None` (no run could be started) every function does nothing.
"""

import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from infra.config import TrackingConfig
from infra.mlflow_client import client_of, experiment_of
from infra.redaction import redact, redact_texts
from infra.run_names import name_with_differences
from infra.scratch import scratch_folder
from infra.tracking_remedies import remedy

Status = Literal["FINISHED", "FAILED", "KILLED"]
RunStatus = Literal["FINISHED", "FAILED", "KILLED", "RUNNING", "SCHEDULED", "MISSING", "UNKNOWN"]

logger = logging.getLogger(__name__)

# Largest number in one request to a server; its client splits longer batches.
MAX_METRICS_PER_BATCH = 1000
MAX_DIGEST_CHARS = 36

# Without it, a browser that has no preference yet shows MLflow's GenAI pages.
WORKSPACE = "workflowType=machine_learning"

# Errors that the same request would get again.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")

_REFUSED_CHARACTERS = re.compile(r"[^\w\-. :/]")  # in a metric's name


@contextmanager
def _or_warn(action: str, uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        logger.warning("could not %s at %s: %s", action, uri, _reason(error))


def _reason(error: BaseException) -> str:
    """Return the system's message in one line, without the wrapping of MLflow and urllib3."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    system_errors = [link for link in chain if isinstance(link, OSError)]
    text = str((system_errors or chain[:1])[-1]).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def start_run(
    tracking: TrackingConfig,
    *,
    run_name: str,
    params: dict[str, str],
    tags: dict[str, str],
    run_id: str | None,
    unnamed: tuple[str, ...] | None = None,
) -> str | None:
    """Start a run or reopen `run_id`; None, after one warning, if the store does not answer.

    A param cannot change once it is logged: if a reopened run has another value, the new one is
    stored as the tag `resumed_with.<param>`.

    Args:
        tracking: The store, and the experiment that the run belongs to.
        run_name: Name of the first run of its kind; later ones get their differences appended.
        params: The config.
        tags: Tags for searching; `stage` is the kind of run.
        run_id: The run to reopen.
        unnamed: Prefixes of params that never appear in a name; None keeps `run_name` unchanged.
    """
    run_name, params, tags = redact(run_name), redact_texts(params), redact_texts(tags)
    try:
        client = client_of(tracking.uri)
        run = _reopen_run(client, run_id) if run_id else None
        if run is None:
            experiment_id = experiment_of(client, tracking)
            if unnamed is not None:
                told = {k: v for k, v in params.items() if not k.startswith(unnamed)}
                stage = tags.get("stage", "")
                first = _first_params(client, experiment_id, run_name, stage)
                run_name = name_with_differences(run_name, told, first)
            run = client.create_run(experiment_id, run_name=run_name)
        logged = run.data.params
        changed = {
            f"resumed_with.{key}": value
            for key, value in params.items()
            if logged.get(key, value) != value
        }
        if tracking.parent_run_id is not None:
            tags = {**tags, "mlflow.parentRunId": tracking.parent_run_id}
        new_params = [Param(key, value) for key, value in params.items() if key not in logged]
        new_tags = [RunTag(key, value) for key, value in {**tags, **changed}.items()]
        client.log_batch(run.info.run_id, params=new_params, tags=new_tags)
    except Exception as error:
        # Whatever the error is, a run without a record is better than no run.
        logger.warning(
            "MLflow at %s cannot be used, so this run is not recorded: %s. %s, or set tracking.uri",
            tracking.uri,
            _reason(error),
            remedy(tracking.uri, error),
        )
        return None
    return str(run.info.run_id)


def _first_params(
    client: MlflowClient, experiment_id: str, run_name: str, stage: str
) -> dict[str, str] | None:
    """Return the params of the oldest run with the bare name; None if there is none."""
    runs = client.search_runs(
        [experiment_id],
        f"attributes.run_name = '{run_name}' and tags.stage = '{stage}'",
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    return dict(runs[0].data.params) if runs else None


def _reopen_run(client: MlflowClient, run_id: str) -> Any:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage == "deleted":
        logger.warning("MLflow no longer has run %s; starting a new one", run_id)
        return None
    client.update_run(run_id, status="RUNNING")
    return run


def end_run(uri: str, run_id: str | None, status: Status) -> None:
    if run_id is not None:
        with _or_warn(f"end run {run_id} as {status}", uri):
            client_of(uri).set_terminated(run_id, status)


def run_status(uri: str, run_id: str | None) -> RunStatus:
    """Return how a run ended; "MISSING" if the store has no such run, "UNKNOWN" without answer."""
    if run_id is None:
        return "MISSING"
    try:
        run = client_of(uri).get_run(run_id)
    except MlflowException as error:
        return "MISSING" if error.error_code == "RESOURCE_DOES_NOT_EXIST" else "UNKNOWN"
    except Exception as error:
        logger.warning("could not look at run %s at %s: %s", run_id, uri, _reason(error))
        return "UNKNOWN"
    return "MISSING" if run.info.lifecycle_stage == "deleted" else run.info.status


def run_link(uri: str, run_id: str) -> str:
    """Return the path of a run's page, relative to where the UI is served."""
    with _or_warn(f"find run {run_id}", uri):
        experiment = client_of(uri).get_run(run_id).info.experiment_id
        return f"#/experiments/{experiment}/runs/{run_id}?{WORKSPACE}"
    return ""


def set_tags(uri: str, run_id: str | None, tags: Mapping[str, str]) -> None:
    """Set tags of a run; `mlflow.note.content` is its description, in Markdown."""
    if run_id is not None:
        with _or_warn("set tags", uri):
            texts = redact_texts(tags)
            client_of(uri).log_batch(run_id, tags=[RunTag(k, v) for k, v in texts.items()])


Points = list[tuple[int, float]]  # step and value


def histories(uri: str, run_id: str | None, ends: tuple[str, ...]) -> dict[str, Points]:
    """Return all points of the metrics with these name endings; {} if the store gives none."""
    found: dict[str, Points] = {}
    if run_id is not None:
        with _or_warn(f"read the metrics of run {run_id}", uri):
            client = client_of(uri)
            for key in client.get_run(run_id).data.metrics:
                if key.endswith(ends):
                    points = client.get_metric_history(run_id, key)
                    found[key] = sorted({(point.step, point.value) for point in points})
    return found


def log_dataset(
    uri: str, run_id: str | None, *, name: str, digest: str, source: str, context: str
) -> None:
    """Record which data a run read: `source` is a URI, `context` a word such as "train"."""
    if run_id is None:
        return
    dataset = Dataset(
        name=name,
        digest=digest[:MAX_DIGEST_CHARS],
        source_type="s3" if source.startswith("s3://") else "local",
        source=json.dumps({"uri": redact(source)}),
    )
    tag = InputTag("mlflow.data.context", context)
    with _or_warn(f"log data set {name}", uri):
        client_of(uri).log_inputs(run_id, [DatasetInput(dataset, [tag])])


def log_artifact_text(uri: str, run_id: str | None, text: str, artifact_file: str) -> None:
    if run_id is not None:
        with _or_warn(f"log {artifact_file}", uri):
            client_of(uri).log_text(run_id, redact(text), artifact_file)


def log_artifact_file(uri: str, run_id: str | None, file: Path, folder: str | None = None) -> None:
    if run_id is not None:
        with _or_warn(f"log {file}", uri):
            client_of(uri).log_artifact(run_id, str(file), folder)


def log_artifact_bytes(uri: str, run_id: str | None, data: bytes, artifact_file: str) -> None:
    """Log a file from memory, under a path such as `folder/name.png`."""
    if run_id is None:
        return
    folder, _, name = artifact_file.rpartition("/")
    with scratch_folder() as local:
        file = local / name
        file.write_bytes(data)
        log_artifact_file(uri, run_id, file, folder or None)


def log_picture(
    uri: str, run_id: str | None, image: NDArray[np.uint8], key: str, step: int
) -> None:
    """Log an (H, W, 3) image; the UI shows all images of a key with a slider over the steps."""
    if run_id is not None:
        with _or_warn(f"log picture {key}", uri):
            client_of(uri).log_image(run_id, image, key=key, step=step, synchronous=True)


def log_final_metrics(
    uri: str, run_id: str | None, metrics: Mapping[str, float], step: int
) -> None:
    if run_id is not None:
        with _or_warn("log the final metrics", uri):
            points = _to_points(_now_ms(), step, metrics)
            client_of(uri).log_batch(run_id, metrics=points)


def last_logged_step(uri: str, run_id: str | None, metric: str) -> int:
    """Return the highest step for which a run has a value of `metric`; -1 if there is none."""
    if run_id is not None:
        with _or_warn(f"read the history of {metric}", uri):
            history = client_of(uri).get_metric_history(run_id, metric)
            return max((point.step for point in history), default=-1)
    return -1


def _now_ms() -> int:
    return int(time.time() * 1000)


def _to_points(timestamp_ms: int, step: int, metrics: Mapping[str, float]) -> list[Metric]:
    """Convert metrics to points; characters that MLflow refuses in a name become `_`."""
    return [Metric(_metric_name(key), value, timestamp_ms, step) for key, value in metrics.items()]


def _metric_name(key: str) -> str:
    parts = _REFUSED_CHARACTERS.sub("_", key).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)


class _StepEntry(NamedTuple):
    timestamp_ms: int
    step: int
    metrics: dict[str, float]


class _PictureEntry(NamedTuple):
    image: NDArray[np.uint8]
    key: str
    step: int


_Entry = _StepEntry | _PictureEntry


class MetricWriter:
    """Sends metrics and pictures from its own thread; `write` costs microseconds.

    What cannot be sent is kept, up to the limits below, and sent with its original time when the
    server is back. MLflow stores a duplicate point only once, so a batch whose answer got lost is
    sent again.

    Args:
        run_id: None makes a writer that does nothing.
        after_step: Steps up to this one are already in MLflow (see `last_logged_step`).
        is_superseded: Called before each request; once it returns True, nothing more is sent.
    """

    SEND_INTERVAL_S = 2.0
    MAX_BACKOFF_S = 30.0
    # While somebody waits in `flush` or `close`.
    MAX_HURRIED_BACKOFF_S = 0.5
    # About 1 kB each; the oldest are dropped first.
    MAX_KEPT_STEPS = 20_000
    MAX_KEPT_PICTURES = 16

    def __init__(
        self,
        uri: str,
        run_id: str | None,
        *,
        after_step: int = -1,
        is_superseded: Callable[[], bool] = lambda: False,
    ) -> None:
        self._uri = uri
        self._is_superseded = is_superseded
        self._after_step = after_step
        self._steps: deque[_StepEntry] = deque()
        self._pictures: deque[_PictureEntry] = deque()
        self._num_in_flight = 0
        self._num_dropped = 0
        self._num_waiting = 0
        self._warned_of: set[str] = set()
        self._is_closed = run_id is None
        self._is_stopped = False
        self.is_failing = False  # whether the last try did not reach the server
        self._changed = threading.Condition()
        if run_id is not None:
            # A daemon, because a server that hangs must not keep the process alive.
            threading.Thread(
                target=self._run, args=(run_id,), name="mlflow-writer", daemon=True
            ).start()

    def write(
        self, metrics: Mapping[str, float], step: int, *, after_step: int | None = None
    ) -> None:
        """Send a step's metrics; `after_step` is that of metrics with steps of their own."""
        known = self._after_step if after_step is None else after_step
        if self._is_closed or step <= known:
            return
        try:
            values = {key: float(value) for key, value in metrics.items()}
        except (TypeError, ValueError) as error:
            self._num_dropped += 1
            self._warn_once("value", f"accepts only numbers; step {step} is left out", error)
            return
        with self._changed:
            self._steps.append(_StepEntry(_now_ms(), step, values))
            self._drop_oldest()

    def picture(self, image: NDArray[np.uint8], key: str, step: int) -> None:
        """Log an (H, W, 3) image, as `log_picture` does."""
        if self._is_closed or step <= self._after_step:
            return
        entry = _PictureEntry(image.copy(), key, step)
        with self._changed:
            self._pictures.append(entry)
            self._drop_oldest()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is sent; return False if that takes longer than `timeout_s`."""
        with self._changed:
            self._num_waiting += 1
            self._changed.notify_all()
            is_sent = self._changed.wait_for(lambda: self._num_left() == 0, timeout_s)
            self._num_waiting -= 1
        return is_sent

    def close(self, timeout_s: float = 30.0) -> None:
        """Flush, and warn once about what could not be recorded. Later writes do nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self.flush(timeout_s)
        with self._changed:
            num_lost = self._num_dropped + self._num_left()
            self._is_stopped = True
            self._changed.notify_all()
        if num_lost:
            logger.warning("MLflow at %s did not receive %d steps or pictures", self._uri, num_lost)

    def _num_left(self) -> int:
        return len(self._steps) + len(self._pictures) + self._num_in_flight

    def _drop_oldest(self) -> None:
        while len(self._steps) > self.MAX_KEPT_STEPS:
            self._steps.popleft()
            self._num_dropped += 1
        while len(self._pictures) > self.MAX_KEPT_PICTURES:
            self._pictures.popleft()
            self._num_dropped += 1

    def _run(self, run_id: str) -> None:
        backoff_s = 0.0
        while True:
            with self._changed:
                pause_s = max(self.SEND_INTERVAL_S, backoff_s)
                self._changed.wait_for(lambda: self._num_waiting or self._is_stopped, pause_s)
                if self._num_waiting and backoff_s:
                    hurried_s = min(backoff_s, self.MAX_HURRIED_BACKOFF_S)
                    self._changed.wait_for(lambda: self._is_stopped, hurried_s)
                if self._is_stopped:
                    return
            self.is_failing = not self._send_all(run_id)
            if not self.is_failing:
                backoff_s = 0.0
            else:
                backoff_s = min(2 * backoff_s or 1.0, self.MAX_BACKOFF_S)

    def _send_all(self, run_id: str) -> bool:
        """Send what is kept, oldest first; return False as soon as the server does not answer."""
        while entries := self._take():
            # Whoever took over the run reports these steps itself.
            is_sent = self._is_superseded() or self._send(run_id, entries)
            with self._changed:
                self._num_in_flight = 0
                if not is_sent:
                    self._put_back(entries)
                self._changed.notify_all()
            if not is_sent:
                return False
        return True

    def _take(self) -> list[_Entry]:
        with self._changed:
            entries: list[_Entry] = []
            num_points = 0
            while self._steps and num_points < MAX_METRICS_PER_BATCH:
                num_points += len(self._steps[0].metrics)
                entries.append(self._steps.popleft())
            if not entries and self._pictures:
                entries.append(self._pictures.popleft())
            self._num_in_flight = len(entries)
            return entries

    def _put_back(self, entries: list[_Entry]) -> None:
        for entry in reversed(entries):
            if isinstance(entry, _StepEntry):
                self._steps.appendleft(entry)
            else:
                self._pictures.appendleft(entry)
        self._drop_oldest()

    def _send(self, run_id: str, entries: list[_Entry]) -> bool:
        """Return False if it is worth retrying; what MLflow refuses is dropped and counted."""
        try:
            self._send_once(run_id, entries)
        except Exception as error:
            if not _is_refusal(error):
                self._warn_once("down", "is not reachable; metrics are kept for later", error)
                return False
            if len(entries) > 1:
                # One bad value must not discard the others in its batch.
                return all(self._send(run_id, [entry]) for entry in entries)
            self._warn_once("refusal", f"refused what was logged at step {entries[0].step}", error)
            self._num_dropped += 1
        return True

    def _send_once(self, run_id: str, entries: list[_Entry]) -> None:
        client = client_of(self._uri)
        points: list[Metric] = []
        for entry in entries:
            if isinstance(entry, _StepEntry):
                points += _to_points(*entry)
            else:
                client.log_image(
                    run_id, entry.image, key=entry.key, step=entry.step, synchronous=True
                )
        client.log_batch(run_id, metrics=points)

    def _warn_once(self, kind: str, what: str, error: Exception) -> None:
        if kind not in self._warned_of and not self._is_stopped:
            self._warned_of.add(kind)
            logger.warning("MLflow at %s %s: %s", self._uri, what, _reason(error))


def _is_refusal(error: Exception) -> bool:
    """Return whether the same request would fail again: a bad name or value, a deleted run."""
    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS
    return isinstance(error, TypeError | ValueError) and not isinstance(error, OSError)
