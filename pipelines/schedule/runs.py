"""Start, watch and stop the runs of schedules; each tick starts only once, even with competitors.

    <root>/schedules/<name>/
      state.json         what the scheduler knows (schedule.times.ScheduleState)
      pause.json         the last `mae schedule pause` or `resume`
      ticks/<id>.json    written when this tick was started: where, when
      runs/<id>.log      output of a local process, beside its .exit code

On a Ray cluster the id is the job's id, and Ray refuses a second job with the same id. A local
process is started by whoever succeeds in creating `ticks/<id>.json`.
"""

import importlib
import json
import logging
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar
from zoneinfo import ZoneInfo

import tenacity
from pydantic import Field

from infra import storage
from infra.conditional import put_if
from infra.own_files import read_own
from infra.processes import PARENT_VARIABLE, find_process, start_process, stop_process
from infra.redaction import redact
from mae_core.config import StrictConfig
from pipelines.driver import git_commit
from pipelines.schedule.config import Schedule
from pipelines.schedule.times import Pause, ScheduleState, Tick

logger = logging.getLogger(__name__)

RAY_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in Ray's own order
TICK_VARIABLE = "MAE_SCHEDULE_TICK"
# Not sent to the cluster, in addition to .gitignore. The slash matters: mae_core/data is code.
EXCLUDES = ["/.venv", "/.git", "/runs", "/data", "/.services", "/tests", "/docs", "/benchmarks"]
AGENT_WAIT_S = 60.0  # a node's agent answers some seconds after its head does
STOP_GRACE_S = 60.0
POLL_S = 0.5
STARTING = timedelta(minutes=1)
# A run whose state cannot be determined for this long (its machine or cluster is gone) has failed.
UNHEARD_OF = timedelta(days=1)
# Waits for the process to write its exit code, and forwards SIGTERM.
SUPERVISOR = """
cd "$1" || exit 5
exit_file=$2; shift 2
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
"$@" & child=$!
wait "$child"; code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
echo "$code" > "$exit_file.partial" && mv "$exit_file.partial" "$exit_file"
exit "$code"
"""

Status = Literal["running", "done", "failed"]
ConfigT = TypeVar("ConfigT", bound=StrictConfig)


class Submission(StrictConfig):
    """The content of `ticks/<id>.json`."""

    id: str
    submitted_at: datetime
    where: Literal["ray", "local"]
    host: str
    """Host of the local process, or host that submitted the Ray job."""
    log: str
    """Its output: a file, or a command that shows it."""
    token: str = Field(default_factory=lambda: secrets.token_hex(8))
    """Distinguishes two schedulers that started the same tick."""


def schedule_folder(root: str, name: str) -> str:
    return storage.join(root, "schedules", name)


def read_state(root: str, name: str) -> ScheduleState | None:
    return _read(storage.join(schedule_folder(root, name), "state.json"), ScheduleState)


def write_state(root: str, name: str, state: ScheduleState) -> None:
    _write(storage.join(schedule_folder(root, name), "state.json"), state)


def read_pause(root: str, name: str) -> Pause:
    return _read(storage.join(schedule_folder(root, name), "pause.json"), Pause) or Pause()


def write_pause(root: str, name: str, pause: Pause) -> None:
    _write(storage.join(schedule_folder(root, name), "pause.json"), pause)


def read_submission(root: str, name: str, tick_id: str) -> Submission | None:
    return _read(_tick_file(root, name, tick_id), Submission)


def _tick_file(root: str, name: str, tick_id: str) -> str:
    return storage.join(schedule_folder(root, name), "ticks", f"{tick_id}.json")


def _write(uri: str, config: StrictConfig) -> None:
    storage.write_bytes(uri, config.model_dump_json(indent=1).encode())


def _read(uri: str, config_type: type[ConfigT]) -> ConfigT | None:
    way_out = "delete it: its schedule then starts over, and no tick that ran runs again"
    return read_own(uri, config_type, way_out)


def submit(root: str, schedule: Schedule, tick: Tick) -> Submission | None:
    """Start a tick's run; None if it was started before, by us or by another scheduler.

    Raises:
        StorageError: It could not be started; a retry may help.
    """
    if storage.exists(_tick_file(root, schedule.name, tick.id)):
        return None
    words = _command(schedule, tick)
    if any(os.environ.get(name) for name in RAY_VARIABLES):
        return _submit_to_ray(root, schedule.name, tick, words)
    return _start_local(root, schedule.name, tick, words)


def _command(schedule: Schedule, tick: Tick) -> list[str]:
    words = list(schedule.words)
    if tick.at is not None:
        day = tick.at.astimezone(ZoneInfo(schedule.time_zone))
        words = [
            word.replace("{tick}", f"{tick.at:%Y-%m-%dT%H:%M:%SZ}").replace(
                "{tick_date}", f"{day:%Y-%m-%d}"
            )
            for word in words
        ]
    return ["-m", "pipelines.cli", "run", schedule.chain, *words]


def _submit_to_ray(root: str, name: str, tick: Tick, words: list[str]) -> Submission | None:
    given = {key: value for key, value in os.environ.items() if key.startswith("MAE__")}
    if leaks := [key for key, value in given.items() if redact(value) != value]:
        raise storage.StorageError(
            f"{leaks[0]} contains a password, which everyone who sees the job would see; give it "
            "to the cluster, such as by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            is_lasting=True,
        )
    commit = git_commit()
    # No keys: whoever sees the job sees its environment, and the cluster has keys of its own.
    variables = {**given, TICK_VARIABLE: tick.id, **({"MAE_GIT_COMMIT": commit} if commit else {})}
    runtime_env = {"working_dir": str(Path.cwd()), "excludes": EXCLUDES, "env_vars": variables}
    new = Submission(
        id=tick.id,
        submitted_at=datetime.now(UTC),
        where="ray",
        host=socket.gethostname(),
        log=f"ray job logs {tick.id}",
    )
    is_ours = True
    with _ray_errors(f"submit {tick.id}"):
        try:
            for attempt in _until_an_agent_is_there():
                with attempt:
                    _ray_client().submit_job(
                        entrypoint=shlex.join(["python", *words]),
                        submission_id=tick.id,
                        runtime_env=runtime_env,
                    )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            is_ours = False
    _create(_tick_file(root, name, tick.id), new)
    return new if is_ours else None


def _until_an_agent_is_there() -> tenacity.Retrying:
    """Retry while a head that has just started has no node yet that could run a job."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_message(match=".*No available agent"),
        stop=tenacity.stop_after_delay(AGENT_WAIT_S),
        wait=tenacity.wait_fixed(1),
        reraise=True,
    )


@contextmanager
def _ray_errors(action: str) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, RuntimeError, OSError) as error:
        address = next(filter(None, map(os.environ.get, RAY_VARIABLES)), "its default address")
        reason = " ".join(str(error).split())[:500]
        raise storage.StorageError(f"cannot {action} at {address}: {reason}") from error


def _ray_client() -> Any:
    """Import by name, because local runs need no Ray."""
    client = importlib.import_module("ray.job_submission").JobSubmissionClient
    # It would log each file that it leaves out.
    logging.getLogger("ray").setLevel(logging.ERROR)
    return client()


def _start_local(root: str, name: str, tick: Tick, words: list[str]) -> Submission | None:
    folder = local_folder(root, name)
    new = Submission(
        id=tick.id,
        submitted_at=datetime.now(UTC),
        where="local",
        host=socket.gethostname(),
        log=str(folder / f"{tick.id}.log"),
    )
    if not _create(_tick_file(root, name, tick.id), new):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != PARENT_VARIABLE}
        exit_file = str(folder / f"{tick.id}.exit")
        command = ["sh", "-c", SUPERVISOR, "sh", str(Path.cwd()), exit_file, sys.executable, *words]
        start_process(folder, tick.id, command, {**environment, TICK_VARIABLE: tick.id})
    except OSError as error:
        storage.delete_file(_tick_file(root, name, tick.id))
        raise storage.StorageError(f"cannot start {tick.id}: {error}") from error
    return new


def local_folder(root: str, name: str) -> Path:
    """Return the folder of logs and exit codes of local processes, which stay on their machine."""
    place = "runs" if storage.is_remote(root) else root
    return Path(schedule_folder(storage.absolute(place), name)) / "runs"


def status(root: str, name: str, tick_id: str) -> Status:
    """Return the state of a run, or raise a StorageError if it cannot be determined."""
    submission = read_submission(root, name, tick_id)
    if submission is None:  # removed, because it could not be started
        return "failed"
    age = datetime.now(UTC) - submission.submitted_at
    try:
        if submission.where == "ray":
            return _ray_status(tick_id)
        return _local_status(submission, local_folder(root, name), age)
    except storage.StorageError as error:
        if age < UNHEARD_OF:
            raise
        logger.warning("%s counts as failed: no answer for a day (%s)", tick_id, error)
        return "failed"


def _ray_status(tick_id: str) -> Status:
    with _ray_errors(f"ask for {tick_id}"):
        try:
            found = _ray_client().get_job_status(tick_id)
        except RuntimeError as error:
            if "404" in str(error):  # the cluster has been recreated since
                return "failed"
            raise
    if not found.is_terminal():
        return "running"
    return "done" if found.value == "SUCCEEDED" else "failed"


def _local_status(submission: Submission, folder: Path, age: timedelta) -> Status:
    if submission.host != socket.gethostname():
        raise storage.StorageError(
            f"{submission.id} was started on {submission.host}, and only that machine can tell "
            "whether it still runs; run one scheduler, or a Ray cluster (RAY_API_SERVER_ADDRESS)"
        )
    # In this order, because the exit code is written before the process ends.
    is_alive = find_process(folder, submission.id) is not None
    exit_file = folder / f"{submission.id}.exit"
    if exit_file.exists():
        return "done" if exit_file.read_text().strip() == "0" else "failed"
    was_started = (folder / f"{submission.id}.json").exists()
    return "running" if is_alive or (not was_started and age < STARTING) else "failed"


def stop(root: str, name: str, tick_id: str) -> None:
    """Stop a run and wait for its end.

    Raises:
        StorageError: It does not stop.
    """
    submission = read_submission(root, name, tick_id)
    if submission is None:
        return
    if submission.where == "local":
        stop_process(local_folder(root, name), tick_id, STOP_GRACE_S)
    else:
        with _ray_errors(f"stop {tick_id}"):
            _ray_client().stop_job(tick_id)
    deadline_s = time.monotonic() + STOP_GRACE_S
    while status(root, name, tick_id) == "running":
        if time.monotonic() > deadline_s:
            raise storage.StorageError(f"{tick_id} did not stop within {STOP_GRACE_S:.0f} s")
        time.sleep(POLL_S)


def _create(uri: str, config: StrictConfig) -> bool:
    """Write a new file; return False if it exists already."""
    data = json.dumps(config.model_dump(mode="json"), indent=1).encode()
    if storage.is_remote(uri):
        return _create_object(uri, data)
    path = Path(storage.absolute(uri))
    partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        # Linking fails if the file exists, and the linked content is complete.
        path.hardlink_to(partial)
    except FileExistsError:
        return False
    except OSError as error:
        raise storage.StorageError(f"cannot write {uri}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return True


def _create_object(uri: str, data: bytes) -> bool:
    # If refused, it is still ours if a retry followed a write whose answer got lost.
    return put_if(uri, data, IfNoneMatch="*") is not None or storage.read_bytes(uri) == data
