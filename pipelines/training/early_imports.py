"""Import what is needed next in a thread, while this one waits for something else to start."""

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from infra import processes


@contextmanager
def importing(modules: Sequence[str]) -> Iterator[None]:
    """Import modules for the duration of the block, and wait at its end until they are there.

    Python may hand out a module that is half imported if two threads import modules that import
    each other. So the modules must share little with what the block imports.

    An error is left to whoever imports the module next.
    """

    def run() -> None:
        for module in modules:
            with suppress(Exception):
                importlib.import_module(module)

    # A daemon: a command that is stopped in the meantime does not wait for the imports.
    thread = threading.Thread(target=run, name="imports", daemon=True)
    processes.note_working(thread)
    thread.start()
    try:
        yield
    except Exception:
        thread.join()
        raise
    thread.join()
