"""How the processes that Ray starts log. Imports nothing heavy: it runs first in each of them.

On one machine they write to a file that the driver shows; in a cluster to stderr, which Ray
brings to the driver with a prefix.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG_FILE_VARIABLE = "MAE_WORKER_LOG"
OURS = ("mae_core", "infra", "pipelines")
# Its notes at every report say nothing to a user.
_QUIET = ("ray", "ray.data", "ray.train", "ray.tune")
POLL_S = 0.2


def set_up() -> None:
    """Show what we say; of Ray, warnings only."""
    file = os.environ.get(LOG_FILE_VARIABLE)
    handler = logging.FileHandler(file) if file else logging.StreamHandler(sys.stderr)
    for name in OURS:  # not the root: Ray has put handlers of its own there
        ours = logging.getLogger(name)
        ours.handlers = [handler]
        ours.propagate = False
        ours.setLevel(logging.INFO)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def shown(file: Path) -> Iterator[None]:
    """Inside, lines that arrive in `file` are copied to stderr as they come."""
    file.touch()
    ended = threading.Event()

    def copy() -> None:
        with file.open() as stream:
            while True:
                last = ended.is_set()  # asked before the read: what came until then is shown
                sys.stderr.write(stream.read())
                sys.stderr.flush()
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
