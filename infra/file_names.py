"""Refuse file names from outside that would lead out of their folder.

A listing, a manifest or an archive may have been written by anybody. A name in it becomes a path
only after one of these functions has checked it.
"""

import re
from pathlib import Path

# Drive letters are refused on Linux too: files fetched here may be copied to Windows.
_DRIVE = re.compile(r"^[A-Za-z]:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MAX_PART_BYTES = 255


class UnsafeNameError(ValueError):
    """A name leads out of its folder, or no file can have this name."""


def problem_of_name(name: str) -> str | None:
    """Return why a relative path must not be joined to a folder; None if it may be."""
    parts = name.split("/")
    if not name:
        return "is empty"
    if name.startswith("/") or _DRIVE.match(name):
        return "is an absolute path"
    if "\\" in name:
        return "has a backslash"
    if _CONTROL.search(name):
        return "has a control character"
    if any(part in ("", ".", "..") for part in parts):
        return "has a part that is empty, '.' or '..'"
    if any(len(part.encode(errors="surrogateescape")) > MAX_PART_BYTES for part in parts):
        return f"has a part longer than {MAX_PART_BYTES} bytes"
    return None


def path_below(folder: Path, name: str, source: str) -> Path:
    """Join a name from outside to a local folder.

    Args:
        folder: The folder that the path must not leave.
        name: The name as `source` gave it.
        source: Where the name comes from, for the error.

    Raises:
        UnsafeNameError: The path would be outside the folder, for example through a symbolic link.
    """
    problem = problem_of_name(name)
    if problem is None:
        path = folder / name
        if path.parent.resolve().is_relative_to(folder.resolve()) and not path.is_symlink():
            return path
        problem = "leads out of the folder by a symbolic link"
    raise UnsafeNameError(f"{source}: the file name {name!r} {problem}; it is not used")
