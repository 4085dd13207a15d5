"""Logging in the processes that Ray starts. Runs first in each of them, so it imports little.

On one machine they write to a file whose lines the driver shows; in a cluster they write to
stderr, which Ray forwards to the driver with a prefix.
"""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.redaction import RedactionFilter

LOG_FILE_VARIABLE = "MAE_WORKER_LOG"
BAR_VARIABLE = "MAE_PROGRESS_BAR"  # set if the driver draws bars, so that workers stay quiet
OURS = ("mae_core", "infra", "pipelines")
# Their messages at every report are useless to a user.
_QUIET = ("ray", "ray.data", "ray.train", "ray.tune")
# They warn, the second with a traceback, of what is intended or passes by itself: that bars are
# off, and that a busy machine answered the autoscaler late.
_SILENT = (
    "ray.data._internal.progress",
    "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client",
)
POLL_S = 0.2
LIBRARIES = f"{os.sep}site-packages{os.sep}"


def set_up() -> None:
    """Show our own messages, and from Ray only warnings."""
    file = os.environ.get(LOG_FILE_VARIABLE)
    handler = logging.FileHandler(file) if file else logging.StreamHandler(sys.stderr)
    handler.addFilter(RedactionFilter())
    if not file:
        handler.addFilter(_count)
    for name in OURS:  # not the root logger, because Ray has its own handlers there
        ours = logging.getLogger(name)
        ours.handlers = [handler]
        ours.propagate = False
        ours.setLevel(logging.INFO)
    quiet_ray()
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")  # for an import that comes later
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")


def quiet_ray() -> None:
    """Show only warnings of Ray. Importing `ray.data` sets its level again, so call it after."""
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _SILENT:
        silent = logging.getLogger(name)
        silent.setLevel(logging.ERROR)  # holds for the loggers below it, too
        silent.addFilter(_is_error)  # stays when Ray Train sets the levels of its loggers again


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def hide_libraries() -> None:
    """Show on this process's stderr no news of libraries, only warnings."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_for_the_user)


def _is_for_the_user(record: logging.LogRecord) -> bool:
    """Return whether a user should see a record; a stage of the user's own may say anything."""
    is_ours = record.name.partition(".")[0] in OURS
    return is_ours or record.levelno >= logging.WARNING or LIBRARIES not in record.pathname


_num_shown = 0


def num_lines_shown() -> int:
    """Return a number that grows with every line that a user sees, whichever process wrote it."""
    return _num_shown


def _count(_record: logging.LogRecord) -> bool:
    """Count a line that this process logs, as a training in the driver does."""
    global _num_shown
    _num_shown += 1
    return True


@contextmanager
def shown(file: Path, write: Callable[[str], None]) -> Iterator[None]:
    """Pass new lines in `file` to `write` as they arrive, for the duration of the block."""
    file.touch()
    ended = threading.Event()

    def copy() -> None:
        global _num_shown  # one per process, because there is one local Ray
        with file.open() as stream:
            while True:
                last = ended.is_set()  # read before copying, so that no late line is lost
                if text := stream.read():
                    _num_shown += 1
                    write(text)
                if last:
                    return
                ended.wait(POLL_S)

    thread = threading.Thread(target=copy, name="worker-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
