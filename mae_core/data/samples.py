"""WebDataset tars to samples, and where in the tar each sample lies.

A sample is the run of tar members that share a key: the path up to the first dot of the file
name. What follows the dot is the extension, lower-cased. Members that are not regular files,
hidden files and `__meta__` names are no samples. Only groups with an image count. Nothing is ever
written to disk under a member's name.

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

# In order of preference, where a sample has more than one.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "dcm")
LABEL_MAP = "seg.png"  # no picture of its own
_NUM_EXAMPLES = 5
MAX_MEMBER_BYTES = 2**30  # of a tar; a header can claim anything


class DataError(RuntimeError):
    """The data can't be used as it is; says which shard and key, and what to do."""


class Sample(NamedTuple):
    key: str
    parts: dict[str, bytes]  # extension, without the dot, to content
    offset: int  # of the sample's first byte in the tar

    @property
    def image(self) -> bytes:
        return next(self.parts[name] for name in IMAGE_EXTENSIONS if name in self.parts)


class ShardIndex(NamedTuple):
    """Where the samples of one tar lie: sample i is the bytes [offsets[i], offsets[i + 1])."""

    offsets: npt.NDArray[np.int64]  # (num_samples + 1,)
    # Groups that are no samples, by reason: no_image, duplicate_key, cut; and unused_picture: those
    # beside the one that is their sample's image, or in a group without one.
    left_out: Counter[str]
    damage: DataError | None = None  # where a tar that is not whole ends
    unused: tuple[str, ...] = ()  # extensions of unused pictures, some of them

    @property
    def num_samples(self) -> int:
        return len(self.offsets) - 1


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a tar member, or None where the name is not a sample's."""
    if not name.isascii():
        # tarfile gives bytes that are not UTF-8 as lone surrogates, which Arrow and JSON refuse.
        name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    folder, _, base = name.removeprefix("./").rpartition("/")
    if base.startswith((".", "__")) or "." not in base:
        return None
    stem, extension = base.split(".", 1)
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def iter_samples(stream: BinaryIO, shard: str, *, lenient: bool = False) -> Iterator[Sample]:
    """Read the samples of a tar, or of a slice of it that starts where a sample starts.

    Args:
        stream: need not be seekable.
        shard: named in errors.
        lenient: of what comes twice take the first, as a lenient index does.

    Raises:
        DataError: the tar is cut or damaged, or the members of a key are not next to each other.
    """
    tar = TarReader(stream)
    with _data_errors(shard):
        for group in _groups(tar, shard, contents=True, duplicates=Counter() if lenient else None):
            if _has_image(group):
                yield group


def index_shard(stream: BinaryIO, shard: str, *, lenient: bool = False) -> ShardIndex:
    """Find where each sample of a tar lies. Reads only headers where `stream` can seek.

    Args:
        stream: of the whole tar.
        shard: named in errors.
        lenient: of a damaged tar, take the samples before the damage but the last, which may
            lack members; of what comes twice, the first. What is left out is counted.

    Raises:
        DataError: as `iter_samples`; also for a tar without the end marker, which is how a tar
            that was cut between two members looks. Never if `lenient`: that is then `damage`.
    """
    groups: list[tuple[int, bool, list[str]]] = []  # offset, whether it has an image, unused ones
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
    """Examples of the extensions of unused pictures in a set of tars."""
    return tuple(sorted({name for index in indexes for name in index.unused}))[:_NUM_EXAMPLES]


def describe_unused(extensions: tuple[str, ...]) -> str:
    """Say why pictures under these extensions are nobody's image, and what to do; or nothing."""
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
    """CRC-32 of the bytes of each sample.

    Args:
        data: from offsets[0] to offsets[-1] of the tar.
        offsets: (N + 1,) where each sample begins, and where the last one ends.
    """
    view, first = memoryview(data), int(offsets[0])
    pairs = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return np.asarray([zlib.crc32(view[a - first : b - first]) for a, b in pairs], dtype=np.int64)


def _has_image(sample: Sample) -> bool:
    return any(extension in sample.parts for extension in IMAGE_EXTENSIONS)


def _unused_pictures(sample: Sample) -> list[str]:
    """Extensions of the pictures of a group that are nobody's image."""
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
    """Key and extension; None for what is no part of a sample."""
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
    """Members of one key after the other; parts are empty without `contents`.

    A key that comes again is an error, or counted in `duplicates` and left out.
    """
    current: Sample | None = None
    seen: set[str] = set()
    skipped = ""  # the key that is being left out
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
