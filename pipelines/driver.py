"""What every driver does, with Ray or without: its paths, its origin, its end by a signal."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra import storage
from pipelines.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def ray_job_id() -> str | None:
    """The submission id of the Ray job that this process is the driver of."""
    raw = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return json.loads(raw).get("metadata", {}).get("job_submission_id") if raw else None


def cluster_address() -> str | None:
    """Return the address of the cluster to join, or None where a run starts a Ray of its own."""
    address = os.environ.get("RAY_ADDRESS")
    # Ray's own word for a new Ray on this machine, which must be a guarded one, too.
    return None if address in (None, "", "local") else address


def check_paths(uris: Iterable[tuple[str, str]]) -> None:
    """Refuse what is no path of ours; in a Ray job, relative paths, too.

    There the working folder is a passing copy: they would be lost with it.

    Raises:
        ConfigError: names the key.
    """
    in_job = ray_job_id() is not None
    for key, uri in uris:
        try:
            storage.absolute(uri)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
        if in_job and not (storage.is_remote(uri) or Path(uri).is_absolute()):
            raise ConfigError(
                f"{key}={uri}: in a Ray job a path must be absolute or s3://...; "
                f"give {key}=... on the command line, or MAE__{key.upper().replace('.', '__')}"
            )


def check_tracking(uri: str) -> None:
    """In a Ray job, refuse an MLflow store in the job's own, passing working copy.

    Raises: ConfigError.
    """
    store = Path(uri.removeprefix("sqlite:///"))
    if ray_job_id() and uri.startswith("sqlite:") and store.is_relative_to(Path.cwd()):
        raise ConfigError(
            f"tracking.uri={uri}: is lost with the Ray job's working copy; give "
            "tracking.uri=http://... on the command line, or MAE__TRACKING__URI"
        )


def run_tags(stage: str, *, seed: object, output: str) -> dict[str, str]:
    """What MLflow's run list can be searched by."""
    tags = {"stage": stage, "output": output, **({"seed": str(seed)} if seed != "" else {})}
    commit = git_commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    job_id = ray_job_id()
    if job_id:
        tags["ray.job_id"] = job_id
    return tags


def git_commit() -> str | None:
    """Of the sources that run. A job's copy has no .git: its submitter may set MAE_GIT_COMMIT."""
    given = os.environ.get("MAE_GIT_COMMIT")
    if given or shutil.which("git") is None:
        return given
    asked = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None


class CancelledError(BaseException):
    """SIGTERM or Ctrl-C: the run was stopped from outside."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


@contextmanager
def cancel_on_signals(first: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGTERM and SIGINT call `first` and end in CancelledError.

    `first` comes at once: `ray job stop` kills three seconds after it asked.
    """
    received = signal.SIGINT  # inside `fit`, Ray takes this one for itself and leaves by sys.exit
    called = False

    def handle(signal_number: int, _frame: object) -> None:
        nonlocal received, called
        if not called:
            received, called = signal.Signals(signal_number), True
            first()
        # Not CancelledError: Ray's wait for a result lets only this one through.
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        if not called:
            first()
        raise CancelledError(received) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
