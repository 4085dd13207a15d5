"""Find images in a folder or a list file before packing: their paths, sizes and classes.

A sample's key is its path in the folder without the extension. Dots and unprintable characters
become `_`; where two paths would get the same key, `-` and 8 hex digits of the path's hash are
added. Files next to x.jpg named x.json, x.seg.png, x.cls and x.txt, in any case, are its
companions. Hidden files are skipped, and so are files that operating systems leave behind
(Thumbs.db, __MACOSX).
"""

import hashlib
import json
import logging
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mae_core.data.folder_layout import (
    check_layout,
    is_hidden_file,
    is_hidden_folder,
    layout_warnings,
)
from mae_core.data.list_file import ListedImage, is_image_name, read_list
from mae_core.data.samples import IMAGE_EXTENSIONS, DataError

log = logging.getLogger(__name__)

COMPANIONS = ("cls", "json", "seg.png", "txt")
_SHOWN = 5


class ImageFile(NamedTuple):
    """One image to pack; its bytes have not been read yet."""

    key: str
    path: str  # on this machine
    source: str  # relative to the folder, or as written in the list; shown in messages
    num_bytes: int
    companions: tuple[tuple[str, str, int], ...]  # extension, path, bytes
    label: int | None
    boxes: bytes | None = None  # content of `.json`, where it comes from an annotation file
    problem: str | None = None  # why the image or a companion can't be read

    @property
    def extension(self) -> str:
        extension = Path(self.path).suffix[1:].lower()
        return "jpg" if extension == "jpeg" else extension

    @property
    def packed_bytes(self) -> int:
        """Bytes that the sample takes in a tar."""
        sizes = [self.num_bytes, *(size for *_, size in self.companions)]
        sizes += [] if self.label is None else [len(str(self.label))]
        sizes += [] if self.boxes is None else [len(self.boxes)]
        block = tarfile.BLOCKSIZE
        return sum(block + -(-size // block) * block for size in sizes)

    @property
    def identity(self) -> str:
        """Everything that decides its bytes in a shard and is known without reading it."""
        sizes = [(extension, size) for extension, _, size in self.companions]
        if self.boxes is not None:
            sizes.append((hashlib.sha256(self.boxes).hexdigest(), len(self.boxes)))
        return json.dumps([self.key, self.extension, self.num_bytes, sizes, self.label])


def find_images(
    source: Path, classes: Sequence[str] | None = None
) -> tuple[list[ImageFile], tuple[str, ...] | None]:
    """Find the images of a folder or a list file, sorted by key, and the class names.

    Args:
        source: A folder or a list file.
        classes: Class names in the order of their numbers; None numbers the names that are found.

    Raises:
        DataError: There are no images, or the classes are ambiguous.
    """
    if source.is_dir():
        found = _scan_folder(source)
    elif source.is_file():
        found = read_list(source)
    else:
        raise DataError(f"source={source}: no such folder or list file")
    numbers, names = _numbers({image.label for image in found}, source, classes)
    keys = unique_keys([image.name for image in found])
    listings: dict[Path, dict[str, list[str]]] = {}
    files = []
    for name, path, label in found:
        if path.parent not in listings:
            listings[path.parent] = _listing(path.parent)
        size, problem = _look_at(path)
        companions, second_problem = _companions(path, listings[path.parent])
        if label is not None and any(extension == "cls" for extension, *_ in companions):
            raise DataError(f"{path} has a .cls next to it and also the class {label}")
        files.append(
            ImageFile(
                keys[name],
                str(path),
                printable(name),
                size,
                companions,
                numbers[label],
                problem=problem or second_problem,
            )
        )
    return sorted(files), names


def printable(text: str) -> str:
    """Escape bytes of a file name that are not UTF-8, for JSON and for messages."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _numbers(
    labels: set[str | None], source: Path, classes: Sequence[str] | None
) -> tuple[Mapping[str | None, int | None], tuple[str, ...] | None]:
    """Return the number of each label, and the names of all classes."""
    names = sorted(label for label in labels if label is not None)
    if classes is not None:
        if not names:
            raise DataError(f"classes: the images of source={source} have no classes")
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise DataError(
                f"source={source}: found classes that are not among the given ones: "
                f"{', '.join(unknown[:_SHOWN])}; given are {', '.join(classes[:20])}"
            )
        return {name: i for i, name in enumerate(classes)}, tuple(classes)
    if not names:
        return {None: None}, None
    if source.is_file() and all(name.isascii() and name.isdigit() for name in names):
        return {name: int(name) for name in names}, None
    return {name: i for i, name in enumerate(names)}, tuple(names)


def _scan_folder(root: Path) -> list[ListedImage]:
    images: list[Path] = []
    others: list[Path] = []
    for path in _walk(root):
        (images if is_image_name(path.name) else others).append(path)
    ignored = _describe_others(others, images)
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
    check_layout(root, relatives)
    for warning in layout_warnings(relatives):
        log.warning("source=%s: %s", root, warning)
    if in_root:
        return [ListedImage(r.as_posix(), p, None) for r, p in zip(relatives, images, strict=True)]
    with_images = {relative.parts[0] for relative in relatives}
    empty = {path.name for path in root.iterdir() if path.is_dir()} - with_images
    empty = {name for name in empty if not is_hidden_folder(name)}
    if empty:
        log.warning("source=%s: no image, so no class: %s", root, ", ".join(sorted(empty)[:_SHOWN]))
    return [
        ListedImage(r.as_posix(), p, printable(r.parts[0]))
        for r, p in zip(relatives, images, strict=True)
    ]


def _describe_others(others: Sequence[Path], images: Sequence[Path]) -> str:
    """Count the files that are neither images nor companions of one."""
    stems = {(image.parent, image.stem) for image in images}
    counts: Counter[str] = Counter()
    dead = ""
    for path in others:
        extension = _companion_extension(path.name)
        if extension and (path.parent, path.name[: -len(extension) - 1]) in stems:
            continue  # it is a companion
        if path.is_symlink() and not path.exists():
            counts["link to nowhere"] += 1
            dead = dead or f" (such as {printable(str(path))})"
        elif extension is not None:
            counts[f".{extension} that belongs to no image"] += 1
        else:
            counts[path.suffix.lower() or "no extension"] += 1
    listed = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(_SHOWN))
    return listed + dead


def _companion_extension(name: str) -> str | None:
    lowered = name.lower()
    return next((x for x in COMPANIONS if lowered.endswith(f".{x}")), None)


def _walk(root: Path) -> Iterator[Path]:
    """Yield all files that are not hidden, following links, but each folder only once."""

    def stop(error: OSError) -> None:
        raise DataError(f"source={root}: cannot list {error.filename}: {error.strerror}") from error

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=stop, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            log.warning("source=%s: %s leads to a folder that was read already", root, folder)
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden_folder(name))
        yield from (Path(folder) / name for name in sorted(names) if not is_hidden_file(name))


def _look_at(path: Path) -> tuple[int, str | None]:
    """Return the size of a file, and why it can't be read (None if it can)."""
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink() and isinstance(error, FileNotFoundError):
            target = printable(str(path.readlink()))
            return 0, f"a link to a missing file ({target}; fetch it, or mount its disk)"
        return 0, f"cannot be read: {error.strerror}"
    # Pipes and devices are refused: reading one would block for ever.
    return (status.st_size, None) if stat.S_ISREG(status.st_mode) else (0, "not a regular file")


def _listing(folder: Path) -> dict[str, list[str]]:
    """Map lower-case names to the names of possible companions in a folder."""
    listing: dict[str, list[str]] = {}
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error
    for name in names:
        if _companion_extension(name) is not None:
            listing.setdefault(name.lower(), []).append(name)
    return listing


def _companions(
    image: Path, listing: Mapping[str, Sequence[str]]
) -> tuple[tuple[tuple[str, str, int], ...], str | None]:
    """Return an image's companions, and why some can't be read (None if all can)."""
    companions = []
    problems = []
    for extension in COMPANIONS:
        names = [
            name
            for name in listing.get(f"{image.stem}.{extension}".lower(), ())
            if name.startswith(f"{image.stem}.")  # only the case of the extension may differ
        ]
        if len(names) > 1:
            raise DataError(f"{image}: both {names[0]} and {names[1]} are next to it; keep one")
        for name in names:
            path = image.with_name(name)
            size, problem = _look_at(path)
            companions.append((extension, str(path), size))
            problems += [] if problem is None else [f"its .{extension} is {problem}"]
    return tuple(companions), problems[0] if problems else None


def unique_keys(relatives: Iterable[str]) -> dict[str, str]:
    """Return the key of each path; the module's docstring has the rules."""
    keys = {relative: _key(relative) for relative in relatives}
    counts = Counter(keys.values())
    for relative, key in keys.items():
        if counts[key] > 1:
            digest = hashlib.sha256(relative.encode(errors="surrogateescape")).hexdigest()
            keys[relative] = f"{key}-{digest[:8]}"
    if len(set(keys.values())) < len(keys):  # a file's name equals another file's key with its hash
        (key, count), *_ = Counter(keys.values()).most_common(1)
        raise DataError(f"{count} images get the key {key!r}; rename one of them")
    return keys


def _key(relative: str) -> str:
    parts = [part for part in Path(relative).with_suffix("").parts if part not in ("/", "..")]
    clean = ["".join(c if c.isprintable() and c != "." else "_" for c in part) for part in parts]
    # Readers treat names that start with two underscores as metadata.
    clean = ["_" + part.lstrip("_") if part.startswith("__") else part for part in clean]
    return "/".join(clean)
