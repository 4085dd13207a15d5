"""Read list files: each line has an image's path, and its label after a tab or a comma.

The encoding is UTF-8 with or without a byte order mark, or UTF-16 with one; any line ending is
accepted. A path or label in double quotes may contain the separator, as in CSV files. A first line
such as `path,label` is a header. Paths are relative to the list's folder and may use backslashes.
"""

import codecs
import csv
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from mae_core.data.samples import IMAGE_EXTENSIONS, DataError

log = logging.getLogger(__name__)

_HEADER = re.compile(r"(?:image|img|file)?[ _-]?(?:image|file|name|path|id|s)*", re.IGNORECASE)
_SHOWN = 5


class ListedImage(NamedTuple):
    name: str  # as written in the list
    path: Path
    label: str | None


def is_image_name(name: str) -> bool:
    """Return whether a file of this name is an image to pack; a mask, x.seg.png, is not."""
    lowered = name.lower()
    return lowered.rpartition(".")[2] in IMAGE_EXTENSIONS and not lowered.endswith(".seg.png")


def read_list(file: Path) -> list[ListedImage]:
    """Read the images of a list file.

    Raises:
        DataError: Names the file and the wrong lines.
    """
    lines = re.split(r"\r\n|\n|\r", _read_text(file))
    found: list[ListedImage] = []
    mistakes: list[str] = []
    first: dict[Path, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, label = _split_line(line)
        if number == 1 and name and _HEADER.fullmatch(name):
            log.info("%s:1: %r is treated as a header", file, line)
            continue
        path = _find(file.parent, name)
        mistake = _mistake(path, name)
        if mistake is None and path in first:
            mistake = f"{name!r} is already in line {first[path]}"
        if mistake is None and found and (label is None) != (found[0].label is None):
            mistake = "some lines have a label and others have none"
        if mistake is None:
            first[path] = number
            found.append(ListedImage(name, path, label))
        else:
            mistakes.append(f"{file}:{number}: {mistake}")
    if mistakes:
        count = len(mistakes) - _SHOWN
        more = [f"... and {count} more mistakes"] if count > 0 else []
        raise DataError("\n".join(mistakes[:_SHOWN] + more))
    if not found:
        raise DataError(f"source={file}: the list is empty")
    return found


def _read_text(file: Path) -> str:
    try:
        data = file.read_bytes()
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except OSError as error:
        raise DataError(f"source={file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"source={file}: not a list file in UTF-8 ({error}); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(f"source={file}: not a list file in UTF-8 (it holds bytes of zero)")
    return text


def _split_line(line: str) -> tuple[str, str | None]:
    text = line.strip()
    if text.startswith('"'):
        separator = "\t" if "\t" in text else ","
        fields = next(csv.reader([text], delimiter=separator, skipinitialspace=True))
        if len(fields) <= 2:
            return fields[0], fields[1].strip() if len(fields) == 2 else None
    for separator in ("\t", ","):
        name, found, label = text.rpartition(separator)
        if found and not is_image_name(label):  # in "a,b.jpg" the comma is part of the name
            return name.strip(), label.strip().strip('"')
    return text, None


def _find(folder: Path, name: str) -> Path:
    path = Path(os.path.normpath(folder / name))
    if "\\" in name and not os.path.lexists(path):
        with_slashes = Path(os.path.normpath(folder / name.replace("\\", "/")))
        if os.path.lexists(with_slashes):
            return with_slashes
    return path


def _mistake(path: Path, name: str) -> str | None:
    """Describe what is wrong with a path; a dead link is reported where images are read."""
    if not is_image_name(path.name):
        comma = "; a line is PATH, a tab or a comma, LABEL" if "," in name or "\t" in name else ""
        return f"{name!r} does not end in an image's extension{comma}"
    if not os.path.lexists(path):  # also False for a name that no file can have
        return f"no such file: {path}"
    return f"is a folder: {path}" if path.is_dir() else None
