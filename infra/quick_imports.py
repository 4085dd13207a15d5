"""Make it cheaper to import large libraries, and to end a process that has imported them."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """Inside, Python does not search for objects that refer to each other.

    It does so again and again while modules are imported, which make many objects and let go of
    few: a fifth of the time that importing MLflow takes.
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
    """Inside, packages that are not imported yet cannot be: whoever can do without them, does.

    Only for packages that a library imports if they are installed, and uses for what we do not ask
    of it.
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
    """Spare Python the last search through all objects, right before the process ends."""
    gc.disable()
    gc.freeze()
