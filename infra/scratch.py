"""Create folders for temporary files, and remove those that killed commands have left behind.

The process that creates a folder holds a lock on a file in it. The system releases the lock when
the process ends, however it ends, so a folder whose lock is free is no longer used.
"""

import fcntl
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

PREFIX = "mae-"
LOCK_FILE = ".mae-lock"
_NAME = re.compile(re.escape(PREFIX) + r"[a-z0-9_]{8}")

logger = logging.getLogger(__name__)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Provide an empty folder that only this user may enter, and remove it at the end of the block.

    Raises: OSError.
    """
    parent = tempfile.gettempdir()
    remove_left_behind_once(parent)
    with held_folder(parent) as held:
        folder = held / "files"  # without the lock, since all of it may be uploaded
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(held, ignore_errors=True)


@contextmanager
def held_folder(parent: str) -> Iterator[Path]:
    """Create a folder that counts as used during the block; the caller removes it.

    Raises: OSError.
    """
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    unlocked = folder / f"{LOCK_FILE}.new"
    with unlocked.open("w") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Only now, because a folder whose lock is free may be removed.
            unlocked.rename(folder / LOCK_FILE)
        yield folder


def keep(folder: Path) -> None:
    """Keep a folder, even after the process that created it has ended."""
    (folder / LOCK_FILE).unlink(missing_ok=True)


@cache
def remove_left_behind_once(parent: str) -> None:
    """Call `remove_left_behind`, once in a process."""
    remove_left_behind(parent)


def remove_left_behind(parent: str) -> list[Path]:
    """Remove the folders of ended processes of this user, and return them."""
    removed = [path for path in Path(parent).glob(f"{PREFIX}*") if _remove_if_left(path)]
    if removed:
        what = "a folder" if len(removed) == 1 else f"{len(removed)} folders"
        logger.info("removed %s that killed commands have left in %s", what, parent)
    return removed


def _remove_if_left(folder: Path) -> bool:
    with suppress(OSError):
        found = folder.lstat()
        is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if not (is_ours and _NAME.fullmatch(folder.name)):
            return False
        number = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(number)
        return not folder.exists()
    return False
