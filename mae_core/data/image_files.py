"""Images in a folder or a list file, as they are before packing: where, how large, which class.

A sample's key is its path in the folder without the extension. Dots and unprintable characters
become `_`; where two paths would get one key, `-` and 8 hex digits of the path's hash are added.
Files beside x.jpg named x.json, x.seg.png and x.txt are its companions. Hidden files are no images.
"""

import hashlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mae_core.data.samples import IMAGE_EXTENSIONS, DataError

log = logging.getLogger(__name__)

COMPANIONS = ("json", "seg.png", "txt")


class ImageFile(NamedTuple):
    """One image to pack, before its bytes are read."""

    key: str
    path: str  # on this machine
    source: str  # relative to the folder or as the list has it: names the image to people
    num_bytes: int
    companions: tuple[tuple[str, str, int], ...]  # extension, path, bytes
    label: int | None
    boxes: bytes | None = None  # of `.json`, where they come from elsewhere

    @property
    def extension(self) -> str:
        extension = Path(self.path).suffix[1:].lower()
        return "jpg" if extension == "jpeg" else extension

    @property
    def packed_bytes(self) -> int:
        """What it takes in a tar."""
        sizes = [self.num_bytes, *(size for *_, size in self.companions)]
        sizes += [] if self.label is None else [len(str(self.label))]
        sizes += [] if self.boxes is None else [len(self.boxes)]
        block = tarfile.BLOCKSIZE
        return sum(block + -(-size // block) * block for size in sizes)

    @property
    def identity(self) -> str:
        """What of it decides the bytes of a shard, as far as can be known without reading it."""
        sizes = [(extension, size) for extension, _, size in self.companions]
        if self.boxes is not None:
            sizes.append((hashlib.sha256(self.boxes).hexdigest(), len(self.boxes)))
        return json.dumps([self.key, self.extension, self.num_bytes, sizes, self.label])


def find_images(source: Path) -> tuple[list[ImageFile], tuple[str, ...] | None]:
    """The images of a folder or a list file in the order of their keys, and the classes' names.

    Raises:
        DataError: nothing is there, or it can't be told what the classes are.
    """
    if source.is_dir():
        found = _scan_folder(source)
    elif source.is_file():
        found = _read_list(source)
    else:
        raise DataError(f"source={source}: no such folder or list file")
    labels = {label for _, _, label in found}
    classes: tuple[str, ...] | None = None
    numbers: dict[str | None, int | None] = {None: None}
    if labels != {None}:
        names = sorted(label for label in labels if label is not None)
        if source.is_file() and all(name.isascii() and name.isdigit() for name in names):
            numbers = {name: int(name) for name in names}
        else:
            classes = tuple(names)
            numbers = {name: i for i, name in enumerate(names)}
    keys = unique_keys([relative for relative, _, _ in found])
    listings: dict[Path, frozenset[str]] = {}
    files = []
    for relative, path, label in found:
        if path.parent not in listings:
            listings[path.parent] = frozenset(p.name for p in path.parent.iterdir())
        companions = _companions(path, listings[path.parent])
        size = path.stat().st_size
        files.append(
            ImageFile(keys[relative], str(path), relative, size, companions, numbers[label])
        )
    return sorted(files), classes


_Found = tuple[str, Path, str | None]  # relative path, path, label


def _scan_folder(root: Path) -> list[_Found]:
    others: Counter[str] = Counter()
    images: list[Path] = []
    for path in _walk(root):
        if _is_image(path.name):
            images.append(path)
        elif not path.name.endswith(COMPANIONS):
            others[path.suffix.lower() or "no extension"] += 1
    ignored = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    if not images:
        wanted = " ".join(f".{extension}" for extension in sorted(IMAGE_EXTENSIONS))
        raise DataError(
            f"source={root}: no image ({wanted}) in it; it holds {ignored or 'nothing'}"
        )
    if ignored:
        log.warning("source=%s: not images, left out: %s", root, ignored)
    relatives = [path.relative_to(root) for path in images]
    in_root = [relative for relative in relatives if len(relative.parts) == 1]
    if in_root and len(in_root) < len(relatives):
        raise DataError(
            f"source={root}: {len(in_root)} images (such as {in_root[0]}) lie beside folders with "
            "images; move them into a class folder, or give a list file"
        )
    if in_root:
        return [(r.as_posix(), p, None) for r, p in zip(relatives, images, strict=True)]
    with_images = {relative.parts[0] for relative in relatives}
    empty = {path.name for path in root.iterdir() if path.is_dir()} - with_images
    empty = {name for name in empty if not name.startswith(".")}
    if empty:
        log.warning("source=%s: no image, so no class: %s", root, ", ".join(sorted(empty)[:5]))
    return [(r.as_posix(), p, r.parts[0]) for r, p in zip(relatives, images, strict=True)]


def _walk(root: Path) -> Iterator[Path]:
    """All files that are not hidden, through links, each folder once."""

    def stop(error: OSError) -> None:
        raise DataError(f"source={root}: cannot list {error.filename}: {error.strerror}") from error

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=stop, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def _is_image(name: str) -> bool:
    lowered = name.lower()
    return lowered.rpartition(".")[2] in IMAGE_EXTENSIONS and not lowered.endswith(".seg.png")


def _companions(image: Path, names: frozenset[str]) -> tuple[tuple[str, str, int], ...]:
    wanted = [(extension, f"{image.stem}.{extension}") for extension in COMPANIONS]
    paths = [(extension, image.with_name(name)) for extension, name in wanted if name in names]
    return tuple((extension, str(path), path.stat().st_size) for extension, path in paths)


def _read_list(file: Path) -> list[_Found]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"source={file}: not a list file in UTF-8 ({error})") from error
    found: list[_Found] = []
    mistakes: list[str] = []
    first: dict[Path, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, label = _split_line(line)
        path = Path(os.path.normpath(file.parent / name))
        if not _is_image(path.name):
            mistakes.append(f"{file}:{number}: {name!r} has no image's extension")
        elif not path.is_file():
            mistakes.append(f"{file}:{number}: no such file: {path}")
        elif path in first:
            mistakes.append(f"{file}:{number}: {name!r} is in line {first[path]} already")
        elif found and (label is None) != (found[0][2] is None):
            mistakes.append(f"{file}:{number}: either each line has a label, or none has")
        else:
            first[path] = number
            found.append((name, path, label))
    if mistakes:
        more = [f"... and {len(mistakes) - 5} more mistakes"] if len(mistakes) > 5 else []
        raise DataError("\n".join(mistakes[:5] + more))
    if not found:
        raise DataError(f"source={file}: the list is empty")
    return found


def _split_line(line: str) -> tuple[str, str | None]:
    for separator in ("\t", ","):
        name, found, label = line.strip().rpartition(separator)
        if found and not _is_image(label):  # the comma of "a,b.jpg" separates nothing
            return name.strip(), label.strip()
    return line.strip(), None


def unique_keys(relatives: Iterable[str]) -> dict[str, str]:
    """The key of each path, as the head of this file says."""
    keys = {relative: _key(relative) for relative in relatives}
    counts = Counter(keys.values())
    for relative, key in keys.items():
        if counts[key] > 1:
            digest = hashlib.sha256(relative.encode(errors="surrogateescape")).hexdigest()
            keys[relative] = f"{key}-{digest[:8]}"
    return keys


def _key(relative: str) -> str:
    parts = [part for part in Path(relative).with_suffix("").parts if part not in ("/", "..")]
    clean = ["".join(c if c.isprintable() and c != "." else "_" for c in part) for part in parts]
    # Readers take names that start with two of them for metadata.
    clean = ["_" + part.lstrip("_") if part.startswith("__") else part for part in clean]
    return "/".join(clean)
