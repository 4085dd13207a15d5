"""Check paths, describe the sources, and handle signals: what every driver needs."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra import storage
from pipelines.job import ROOT, ray_job_id
from pipelines.outcome import ConfigError

SAME_PRESS_S = 1.0  # signals within this time of the first one count as the same Ctrl-C
POLL_S = 0.1
LETTING_GO_S = 1.0
MARKING_S = 0.5  # time left for MLflow after all other time is used up


def check_paths(uris: Iterable[tuple[str, str]]) -> None:
    """Refuse what is not a valid path, and in a Ray job also relative paths.

    A job's working folder is a temporary copy, so results in it would be lost.

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
    """In a Ray job, refuse an MLflow store in the job's temporary working folder.

    Raises: ConfigError.
    """
    store = Path(uri.removeprefix("sqlite:///"))
    if ray_job_id() and uri.startswith("sqlite:") and store.is_relative_to(Path.cwd()):
        raise ConfigError(
            f"tracking.uri={uri}: is lost with the Ray job's working copy; give "
            "tracking.uri=http://... on the command line, or MAE__TRACKING__URI"
        )


def run_tags(stage: str, *, seed: object, output: str) -> dict[str, str]:
    """Return the tags by which MLflow's list of runs can be searched."""
    tags = {"stage": stage, "output": output, **({"seed": str(seed)} if seed != "" else {})}
    commit = git_commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    job_id = ray_job_id()
    if job_id:
        tags["ray.job_id"] = job_id
    return tags


def git_commit() -> str | None:
    """Return the commit of the sources.

    A job's copy has no .git, so its submitter may set MAE_GIT_COMMIT.
    """
    given = os.environ.get("MAE_GIT_COMMIT")
    if given or shutil.which("git") is None:
        return given
    asked = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None


class CancelledError(BaseException):
    """The run was stopped from outside, by SIGTERM or Ctrl-C."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


class Stopper:
    """Handles SIGTERM and SIGINT for a driver; see `cancel_on_signals`."""

    def __init__(self, first: Callable[[], None]) -> None:
        self.received: signal.Signals | None = None
        self._received_at_s = 0.0
        self._first = first
        self._is_listening = False  # True while `run` polls `received`

    def handle(self, signal_number: int, _frame: object) -> None:
        is_first = self.received is None
        self.received = self.received or signal.Signals(signal_number)
        if is_first:
            self._received_at_s = time.monotonic()
        elif signal_number == signal.SIGTERM:
            # Only a second Ctrl-C is impatient: `ray job stop` and a chain both send a stage one.
            return
        elif time.monotonic() - self._received_at_s < SAME_PRESS_S:
            # A wrapper such as `uv run` or `timeout` forwards the signal that the terminal also
            # sent.
            return
        if is_first and self._is_listening:
            return
        if is_first:
            self._first()
        # Not CancelledError, because Ray's waits let only KeyboardInterrupt through.
        raise KeyboardInterrupt

    def run(
        self,
        work: Callable[[], object],
        *,
        ask: Callable[[], None],
        is_worth_waiting: Callable[[], bool],
        grace_s: float,
    ) -> None:
        """Run `work` in a thread; after a signal, ask it to stop and wait for what it saves.

        In the main thread, Ray would notice a signal only after up to a second of the three that
        `ray job stop` allows, and `fit` would handle SIGINT itself.

        Args:
            work: returns soon after it was asked to stop.
            ask: asks it.
            is_worth_waiting: whether it can still save something.
            grace_s: how long it may take.

        Raises:
            KeyboardInterrupt: there was a signal.
        """
        errors: list[BaseException] = []

        def target() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        # A daemon, because it must not keep the process alive once nobody waits for it.
        thread = threading.Thread(target=target, name="workers", daemon=True)
        self._is_listening = True
        try:
            thread.start()
            while thread.is_alive() and self.received is None:
                thread.join(POLL_S)
            if self.received is not None:
                until_s = time.monotonic() + grace_s
                # In a thread, because an MLflow that hangs must not use up the time for a
                # checkpoint.
                marking = threading.Thread(target=self._first, name="first", daemon=True)
                marking.start()
                ask()
                while thread.is_alive() and time.monotonic() < until_s and is_worth_waiting():
                    thread.join(POLL_S)
                # The work that was just saved needs a moment to end its use of Ray.
                thread.join(max(min(LETTING_GO_S, until_s - time.monotonic()), 0.0))
                marking.join(max(until_s - time.monotonic(), MARKING_S))
                raise KeyboardInterrupt
        finally:
            self._is_listening = False
        if errors:
            raise errors[0]


@contextmanager
def cancel_on_signals(first: Callable[[], None]) -> Iterator[Stopper]:
    """Call `first` on SIGTERM or SIGINT in the block, and end the block with CancelledError.

    The block ends at once, or within `Stopper.run` after its work has saved what it may. `first` is
    called at once, because `ray job stop` kills the process three seconds after it asked.
    """
    stopper = Stopper(first)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stopper.handle) for number in numbers}
    try:
        yield stopper
    except (SystemExit, KeyboardInterrupt) as error:
        if stopper.received is None:  # raised by a library that took the signal for itself
            first()
        raise CancelledError(stopper.received or signal.SIGINT) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def cancelled_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise CancelledError in the block, in place of whatever handled it before.

    Ray's handler would end the command with code 15, and Python's default without a last line.
    """

    def cancel(signal_number: int, _frame: object) -> None:
        raise CancelledError(signal_number)

    before = signal.signal(signal.SIGTERM, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
