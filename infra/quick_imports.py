"""Make it cheaper to import large libraries, and to end a process that has imported them."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """Stop Python's search for objects that refer to each other, for the duration of the block.

    Python searches again and again while modules are imported, because imports create many objects
    and release few: this is a fifth of the time that importing MLflow takes.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def hidden(packages: Sequence[str]) -> Iterator[None]:
    """Make packages that are not imported yet impossible to import in the block.

    This is only for packages that a library imports if they are installed, and needs only for
    functions that we do not use.
    """
    # Python's documented way to make an import fail.
    added = [name for name in packages if sys.modules.setdefault(name, None) is None]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in added:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


def end_quickly() -> None:
    """Skip Python's last search through all objects, right before the process ends."""
    gc.disable()
    gc.freeze()
