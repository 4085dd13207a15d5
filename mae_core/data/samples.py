"""Read samples from WebDataset tars, and find where each sample lies in its tar.

A sample is a run of consecutive tar members with the same key: the path up to the first dot of the
file name. The rest after the dot is the extension, in lower case. Members that are not regular
files, hidden files and `__meta__` names are skipped. Only groups with an image count as samples.
Nothing is ever written to disk under a member's name.

Source: the WebDataset format, https://github.com/webdataset/webdataset.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.data.tar_members import Member, TarDamageError, TarReader

# In order of preference if a sample has more than one.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "dcm")
LABEL_MAP = "seg.png"  # does not count as an image
_NUM_EXAMPLES = 5
MAX_MEMBER_BYTES = 2**30  # of a tar; a header can claim any size


class DataError(RuntimeError):
    """The data can't be used as it is; the message names shard, key and what to do."""


class Sample(NamedTuple):
    key: str
    parts: dict[str, bytes]  # extension without the dot, to content
    offset: int  # of the sample's first byte in the tar

    @property
    def image(self) -> bytes:
        return next(self.parts[name] for name in IMAGE_EXTENSIONS if name in self.parts)


class ShardIndex(NamedTuple):
    """Positions of a tar's samples: sample i is the bytes [offsets[i], offsets[i + 1])."""

    offsets: npt.NDArray[np.int64]  # (num_samples + 1,)
    # Groups that are not samples, by reason: no_image, duplicate_key, cut; and unused_picture:
    # pictures in a group besides its image, or in a group without an image.
    left_out: Counter[str]
    damage: DataError | None = None  # where the readable part of a damaged tar ends
    unused: tuple[str, ...] = ()  # examples of the extensions of unused pictures

    @property
    def num_samples(self) -> int:
        return len(self.offsets) - 1


def split_name(name: str) -> tuple[str, str] | None:
    """Split a tar member's name into key and extension; None if it can't belong to a sample."""
    if not name.isascii():
        # tarfile decodes bytes that are not UTF-8 as lone surrogates; Arrow and JSON reject these.
        name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    folder, _, base = name.removeprefix("./").rpartition("/")
    if base.startswith((".", "__")) or "." not in base:
        return None
    stem, extension = base.split(".", 1)
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def iter_samples(stream: BinaryIO, shard: str, *, lenient: bool = False) -> Iterator[Sample]:
    """Read the samples of a tar, or of a slice of it that starts with a sample.

    Args:
        stream: Need not be seekable.
        shard: Named in errors.
        lenient: If a key or file comes twice, take the first, as a lenient index does.

    Raises:
        DataError: The tar is truncated or damaged, or the members of a key are not consecutive.
    """
    tar = TarReader(stream)
    with _data_errors(shard):
        for group in _groups(tar, shard, contents=True, duplicates=Counter() if lenient else None):
            if _has_image(group):
                yield group


def index_shard(stream: BinaryIO, shard: str, *, lenient: bool = False) -> ShardIndex:
    """Find where each sample of a tar lies, reading only headers if `stream` can seek.

    Args:
        stream: The whole tar.
        shard: Named in errors.
        lenient: Of a damaged tar, keep the samples before the damage except the last, which may
            lack members; of duplicates, keep the first. What is left out is counted.

    Raises:
        DataError: As in `iter_samples`, and also for a tar without the end marker, because a tar
            truncated between two members looks like that. With `lenient`, the error is
            stored in `damage` instead of raised.
    """
    groups: list[tuple[int, bool, list[str]]] = []  # offset, whether there is an image, unused ones
    duplicates: Counter[str] | None = Counter() if lenient else None
    damage: DataError | None = None
    tar = TarReader(stream)
    try:
        with _data_errors(shard):
            groups.extend(
                (group.offset, _has_image(group), _unused_pictures(group))
                for group in _groups(tar, shard, contents=False, duplicates=duplicates)
            )
            if not tar.has_end_marker:
                raise TarDamageError(f"it has no end marker, at byte {tar.position}")
        end = tar.position
    except DataError as error:
        if not lenient:
            raise
        damage = error
        end = 0
        if groups:
            end, *_ = groups.pop()  # it may lack members
    offsets = [offset for offset, has_image, _ in groups if has_image]
    unused = [extension for *_, extensions in groups for extension in extensions]
    left_out = Counter(
        {
            "no_image": len(groups) - len(offsets),
            "cut": int(damage is not None),
            "unused_picture": len(unused),
        }
    ) + (duplicates or Counter())
    offsets = [*offsets, end] if offsets else [0]
    examples = tuple(sorted(set(unused))[:_NUM_EXAMPLES])
    return ShardIndex(np.asarray(offsets, dtype=np.int64), left_out, damage, examples)


def some_extensions(indexes: Iterable[ShardIndex]) -> tuple[str, ...]:
    """Return examples of the extensions of unused pictures in a set of tars."""
    return tuple(sorted({name for index in indexes for name in index.unused}))[:_NUM_EXAMPLES]


def describe_unused(extensions: tuple[str, ...]) -> str:
    """Explain why pictures with these extensions are unused and what to do; "" without any."""
    if not extensions:
        return ""
    names = ", ".join(f".{name}" for name in extensions)
    return (
        f"; pictures that are not used have the extensions {names}: a sample has one image, and "
        "what follows the first dot of a name is its extension. `mae prepare` packs folders of "
        "pictures and replaces dots"
    )


def sample_checksums(
    data: bytes | memoryview, offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the CRC-32 of each sample's bytes.

    Args:
        data: The tar's bytes from offsets[0] to offsets[-1].
        offsets: (N + 1,) positions where each sample begins, and where the last one ends.
    """
    view, first = memoryview(data), int(offsets[0])
    pairs = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return np.asarray([zlib.crc32(view[a - first : b - first]) for a, b in pairs], dtype=np.int64)


def _has_image(sample: Sample) -> bool:
    return any(extension in sample.parts for extension in IMAGE_EXTENSIONS)


def _unused_pictures(sample: Sample) -> list[str]:
    """Return the extensions of a group's pictures that are not its image."""
    names = [
        name
        for name in sample.parts
        if name.rpartition(".")[2] in IMAGE_EXTENSIONS and name != LABEL_MAP
    ]
    image = next((name for name in IMAGE_EXTENSIONS if name in names), None)
    return [name for name in names if name != image]


@contextmanager
def _data_errors(shard: str) -> Iterator[None]:
    try:
        yield
    except TarDamageError as error:
        raise DataError(
            f"{shard}: not a whole tar file ({error}); fetch or pack it again"
        ) from error


def _name_of(member: Member, shard: str) -> tuple[str, str] | None:
    """Return key and extension, or None for a member that is not part of a sample."""
    if not member.is_file:
        return None
    name = split_name(member.name)
    if name is not None and member.size > MAX_MEMBER_BYTES:
        raise DataError(
            f"{shard}: {member.name} claims {member.size} bytes, more than {MAX_MEMBER_BYTES}"
        )
    return name


def _groups(
    tar: TarReader,
    shard: str,
    *,
    contents: bool,
    duplicates: Counter[str] | None = None,
) -> Iterator[Sample]:
    """Yield one group of members per key; parts are empty without `contents`.

    A repeated key raises a DataError, or is counted in `duplicates` and skipped.
    """
    current: Sample | None = None
    seen: set[str] = set()
    skipped = ""  # the key that is being skipped
    for member in tar:
        name = _name_of(member, shard)
        if name is None:
            continue
        key, extension = name
        if current is None or key != current.key:
            if current is not None:
                yield current
                current = None
            if key in seen:
                if duplicates is None:
                    raise DataError(
                        f"{shard}: key {key!r} comes twice, or its members are not next to each "
                        "other; pack it again with `mae prepare`"
                    )
                duplicates["duplicate_key"] += key != skipped
                skipped = key
                continue
            seen.add(key)
            current = Sample(key, {}, member.offset)
        skipped = ""
        if extension in current.parts:
            if duplicates is None:
                raise DataError(f"{shard}: {key}.{extension} comes twice")
            duplicates["duplicate_key"] += 1
            continue
        current.parts[extension] = tar.content() if contents else b""
    if current is not None:
        yield current
