"""How the processes that Ray starts log. Imports nothing heavy: it runs first in each of them.

On one machine they write to a file that the driver shows; in a cluster to stderr, which Ray
brings to the driver with a prefix.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.redaction import RedactionFilter

LOG_FILE_VARIABLE = "MAE_WORKER_LOG"
BAR_VARIABLE = "MAE_PROGRESS_BAR"  # set where the driver draws bars, so workers need not say lines
OURS = ("mae_core", "infra", "pipelines")
# Its notes at every report say nothing to a user.
_QUIET = ("ray", "ray.data", "ray.train", "ray.tune")
_SILENT = ("ray.data._internal.progress",)  # warns that its bars are off, which we did
POLL_S = 0.2


def set_up() -> None:
    """Show what we say; of Ray, warnings only."""
    file = os.environ.get(LOG_FILE_VARIABLE)
    handler = logging.FileHandler(file) if file else logging.StreamHandler(sys.stderr)
    handler.addFilter(RedactionFilter())
    for name in OURS:  # not the root: Ray has put handlers of its own there
        ours = logging.getLogger(name)
        ours.handlers = [handler]
        ours.propagate = False
        ours.setLevel(logging.INFO)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.ERROR)


def has_bar() -> bool:
    """Whether the driver of this worker draws a bar."""
    return bool(os.environ.get(BAR_VARIABLE))


_num_shown = 0


def num_lines_shown() -> int:
    """How often `shown` has copied something: whether the workers have said anything."""
    return _num_shown


@contextmanager
def shown(file: Path, write: Callable[[str], None]) -> Iterator[None]:
    """Inside, lines that arrive in `file` are given to `write` as they come."""
    file.touch()
    ended = threading.Event()

    def copy() -> None:
        global _num_shown  # of the process: there is one local Ray
        with file.open() as stream:
            while True:
                last = ended.is_set()  # asked before the read: what came until then is shown
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
