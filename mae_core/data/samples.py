"""WebDataset tars to samples, and where in the tar each sample lies.

A sample is the run of tar members that share a key: the path up to the first dot of the file
name. What follows the dot is the extension, lower-cased. Members that are not regular files,
hidden files and `__meta__` names are no samples. Only groups with an image count. Nothing is ever
written to disk under a member's name.

Source: the WebDataset format, https://github.com/webdataset/webdataset.
"""

import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

_READ_BUFFER_BYTES = 2**20
# In order of preference, where a sample has more than one.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "dcm")
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
    left_out: Counter[str]  # groups that are no samples, by reason: no_image, duplicate_key, cut
    damage: DataError | None = None  # where a tar that is not whole ends

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
    source = stream if stream.seekable() else _TailReader(stream)
    with _open_tar(source, shard) as tar:
        for group in _groups(tar, shard, contents=True, duplicates=Counter() if lenient else None):
            if _has_image(group):
                yield group
        end = tar.offset
    # tarfile takes a damaged header for the end; a slice just stops, a whole tar has zeros.
    if _block_at(source, end).strip(b"\0"):
        raise _cut_or_damaged(shard, end)


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
    groups: list[tuple[int, bool]] = []  # offset, and whether it has an image
    duplicates: Counter[str] | None = Counter() if lenient else None
    damage: DataError | None = None
    end = 0
    source = stream if stream.seekable() else _TailReader(stream)
    try:
        with _open_tar(source, shard) as tar:
            found = _groups(tar, shard, contents=False, duplicates=duplicates)
            groups.extend((group.offset, _has_image(group)) for group in found)
            end = tar.offset
        # tarfile takes a damaged or missing header for the end; only a block of zeros is the end.
        if _block_at(source, end) != bytes(tarfile.BLOCKSIZE):
            raise _cut_or_damaged(shard, end)
    except DataError as error:
        if not lenient:
            raise
        damage = error
        if groups:
            end, _ = groups.pop()  # it may lack members
    offsets = [offset for offset, has_image in groups if has_image]
    left_out = Counter({"no_image": len(groups) - len(offsets), "cut": int(damage is not None)}) + (
        duplicates or Counter()
    )
    offsets = [*offsets, end] if offsets else [0]
    return ShardIndex(np.asarray(offsets, dtype=np.int64), left_out, damage)


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


def _cut_or_damaged(shard: str, end: int) -> DataError:
    return DataError(f"{shard}: cut or damaged at byte {end}; fetch or pack it again")


def _has_image(sample: Sample) -> bool:
    return any(extension in sample.parts for extension in IMAGE_EXTENSIONS)


class _TailReader:
    """Counts what is read from a stream and remembers the last of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._chunks: deque[bytes] = deque()
        self._num_kept = 0
        self.position = 0

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._chunks.append(data)
        self._num_kept += len(data)
        self.position += len(data)
        # tarfile reads at most one buffer ahead, but a socket gives it in many small pieces.
        while self._num_kept - len(self._chunks[0]) >= 2 * _READ_BUFFER_BYTES:
            self._num_kept -= len(self._chunks.popleft())
        return data

    def tail_from(self, start: int) -> bytes:
        tail = b"".join(self._chunks)
        return tail[max(0, start - (self.position - len(tail))) :]


def _block_at(source: BinaryIO | _TailReader, offset: int) -> bytes:
    if isinstance(source, _TailReader):
        return source.tail_from(offset)[: tarfile.BLOCKSIZE]
    source.seek(offset)
    return source.read(tarfile.BLOCKSIZE)


@contextmanager
def _open_tar(stream: BinaryIO | _TailReader, shard: str) -> Iterator[tarfile.TarFile]:
    mode: Literal["r:", "r|"] = "r:" if stream.seekable() else "r|"
    try:
        with tarfile.open(
            fileobj=cast(BinaryIO, stream), mode=mode, bufsize=_READ_BUFFER_BYTES
        ) as tar:
            yield tar
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{shard}: not a whole tar file ({error}); fetch or pack it again"
        ) from error


def _name_of(member: tarfile.TarInfo, shard: str) -> tuple[str, str] | None:
    """Key and extension; None for what is no part of a sample."""
    if not member.isreg() or member.issparse():  # sparse: a kilobyte may claim any size
        return None
    name = split_name(member.name)
    if name is not None and member.size > MAX_MEMBER_BYTES:
        raise DataError(
            f"{shard}: {member.name} claims {member.size} bytes, more than {MAX_MEMBER_BYTES}"
        )
    return name


def _groups(
    tar: tarfile.TarFile,
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
        tar.members = []  # type: ignore[attr-defined]  # webdataset#97: they pile up otherwise
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
        file = tar.extractfile(member) if contents else None
        current.parts[extension] = file.read() if file is not None else b""
    if current is not None:
        yield current
