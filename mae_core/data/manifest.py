"""The manifest of a shard set: shards, counts, bytes, checksums, classes, channel statistics.

`manifest.json` lies next to the shards. Next to each shard, `<shard>.index.npy` holds the offsets
of its samples, so that any range of samples is one ranged read. Tars that were packed elsewhere
are indexed first; the run keeps their manifest and indexes.
"""

import hashlib
import io
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, field_validator

from mae_core.config import StrictConfig
from mae_core.data.pixels import Pixels
from mae_core.data.samples import DataError

MANIFEST_NAME = "manifest.json"
_FULL_SCALE = 65_535


class ChannelStats(StrictConfig):
    """Mean and standard deviation of each channel over all pixels, in units of full scale."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_images: int = Field(gt=0)
    """Number of images that were measured."""


# Of the 1.28 million training images: https://github.com/facebookresearch/mae, main_pretrain.py.
IMAGENET_STATS = ChannelStats(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), num_images=1_281_167
)


class ShardInfo(StrictConfig):
    path: str
    """Path relative to the manifest's folder, or a full path or URI."""
    index: str
    """Path of the sample offsets, in the same form."""
    num_samples: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    sha256: str | None = None
    """Checksum of the whole tar; None if it was indexed without reading the images."""
    changed_at_ns: int | None = None
    """Time of the last change of a tar without a checksum, in nanoseconds since 1970."""

    @field_validator("path", "index")
    @classmethod
    def _stays_in_the_folder(cls, name: str) -> str:
        """Refuse a path that leads out of the folder, as manifests may come from other people."""
        if not name or "\0" in name or ".." in name.split("/"):
            raise ValueError(f"{name!r} is not a file name inside the folder")
        return name


class Manifest(StrictConfig):
    version: Literal[1] = 1
    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...] | None = None
    """Class names, in the order of the `.cls` numbers."""
    channel_stats: ChannelStats | None = None
    left_out: dict[str, int] = Field(default_factory=dict)
    """Number of groups of tar members that are not samples, by reason, and of unused pictures."""
    unused_extensions: tuple[str, ...] = ()
    """Examples of the extensions of unused pictures."""
    damaged: dict[str, str] = Field(default_factory=dict)
    """Truncated or damaged tars and where they end; `shards` has the samples before that."""

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Number of samples in each shard."""
        return np.asarray([shard.num_samples for shard in self.shards], dtype=np.int64)

    @property
    def digest(self) -> str:
        """Identifies the content, wherever it is stored: 32 hex digits."""
        hasher = hashlib.sha256()
        for shard in self.shards:
            name = PurePosixPath(shard.path).name
            hasher.update(f"{name} {shard.num_samples} {shard.num_bytes} {shard.sha256}\n".encode())
        return hasher.hexdigest()[:32]


class PixelSums(StrictConfig):
    """Sums over pixels as integers, so that the order of adding does not matter.

    Values are scaled to 0..65,535: an 8-bit value is multiplied by 257.
    """

    sums: tuple[int, ...]
    """Sum of the values of each channel."""
    squares: tuple[int, ...]
    """Sum of the squared values of each channel."""
    num_pixels: int
    """Number of pixels in one channel, over all images."""
    num_images: int

    @classmethod
    def none(cls, num_channels: int) -> "PixelSums":
        zeros = (0,) * num_channels
        return cls(sums=zeros, squares=zeros, num_pixels=0, num_images=0)

    @classmethod
    def of(cls, pixels: Pixels) -> "PixelSums":
        values = pixels.reshape(-1, pixels.shape[2])
        if pixels.dtype == np.uint8:
            levels = np.arange(256, dtype=np.uint64) * np.uint64(257)
            counts = np.stack([np.bincount(v, minlength=256) for v in values.T]).astype(np.uint64)
            sums, squares = counts @ levels, counts @ levels**2
        else:
            wide = values.astype(np.uint64)
            sums, squares = wide.sum(axis=0), (wide**2).sum(axis=0)
        return cls(
            sums=tuple(sums.tolist()),
            squares=tuple(squares.tolist()),
            num_pixels=len(values),
            num_images=1,
        )

    def __add__(self, other: "PixelSums") -> "PixelSums":
        return sum_pixels([self, other])

    def channel_stats(self) -> ChannelStats | None:
        """Compute mean and deviation; None if there is no pixel."""
        if not self.num_pixels:
            return None
        mean = tuple(s / (_FULL_SCALE * self.num_pixels) for s in self.sums)
        # Integers up to the last step, so that the difference loses no digits.
        spread = [self.num_pixels * q - s * s for s, q in zip(self.sums, self.squares, strict=True)]
        # At least 1e-6, because readers divide by it.
        std = tuple(max(math.sqrt(x) / (_FULL_SCALE * self.num_pixels), 1e-6) for x in spread)
        return ChannelStats(mean=mean, std=std, num_images=self.num_images)


def sum_pixels(parts: Iterable[PixelSums]) -> PixelSums:
    """Add up sums; there must be at least one."""
    parts = list(parts)
    return PixelSums(
        sums=tuple(map(sum, zip(*(part.sums for part in parts), strict=True))),
        squares=tuple(map(sum, zip(*(part.squares for part in parts), strict=True))),
        num_pixels=sum(part.num_pixels for part in parts),
        num_images=sum(part.num_images for part in parts),
    )


def merge_manifests(manifests: Sequence[Manifest]) -> Manifest:
    """Merge sets that are used as one; their paths must be full ones.

    Class names are kept if all sets that have names have the same. Otherwise a number means another
    class in each set, and only the sets' own manifests have the names. Channel statistics are
    computed over all images, each with the same weight.
    """
    named = {manifest.classes for manifest in manifests} - {None}
    return Manifest(
        shards=tuple(shard for manifest in manifests for shard in manifest.shards),
        classes=named.pop() if len(named) == 1 else None,
        channel_stats=_pooled_stats([manifest.channel_stats for manifest in manifests]),
        left_out=sum((Counter(manifest.left_out) for manifest in manifests), Counter()),
        unused_extensions=tuple(
            sorted({name for manifest in manifests for name in manifest.unused_extensions})
        )[:5],
        damaged={path: why for m in manifests for path, why in m.damaged.items()},
    )


def _pooled_stats(parts: Sequence[ChannelStats | None]) -> ChannelStats | None:
    """Pool the statistics of several sets; None if one has none or has other channels."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({len(part.mean) for part in known}) > 1:
        return None
    counts = np.asarray([part.num_images for part in known], np.float64)
    shares = (counts / counts.sum())[:, np.newaxis]
    means, stds = (np.asarray([getattr(p, n) for p in known], np.float64) for n in ("mean", "std"))
    mean = (shares * means).sum(axis=0)
    spread = (shares * (stds**2 + (means - mean) ** 2)).sum(axis=0)
    return ChannelStats(
        mean=tuple(mean.tolist()),
        std=tuple(np.sqrt(spread).tolist()),
        num_images=int(counts.sum()),
    )


def parse_manifest(text: bytes, uri: str) -> Manifest:
    """Parse a manifest, or raise a DataError that names `uri` if the text is not one."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{uri}: not a manifest of this version ({place}: {first['msg']}); "
            "pack the folder again with `mae prepare`, or remove the file to index the tars"
        ) from error


class SampleIndex(NamedTuple):
    """The positions of a shard's samples and the checksums of their bytes."""

    offsets: npt.NDArray[np.int64]  # (N + 1,), see ShardIndex
    checksums: npt.NDArray[np.int64] | None  # (N,), see sample_checksums; None: not read yet


def index_to_bytes(index: SampleIndex) -> bytes:
    """Write an .npy of the offsets, and checksums (of samples and of the index) as second row."""
    rows = index.offsets
    if index.checksums is not None:
        own = _checksum(index.offsets, index.checksums)
        rows = np.stack([index.offsets, np.append(index.checksums, own)])
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()


def index_from_bytes(data: bytes, uri: str) -> SampleIndex:
    """Read an index, or raise a DataError that names `uri` if the bytes are not one."""
    try:
        rows = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise DataError(f"{uri}: not a sample index ({error}); index the shards again") from error
    pair = rows.ndim == 2 and len(rows) == 2
    offsets = rows[0] if pair else rows
    is_list = offsets.ndim == 1 and len(offsets) > 0 and rows.dtype == np.int64
    if not is_list or offsets[0] < 0 or (np.diff(offsets) <= 0).any():
        raise DataError(f"{uri}: not a rising list of offsets; index the shards again")
    checksums = rows[1, :-1] if pair else None
    if checksums is not None and _checksum(offsets, checksums) != rows[1, -1]:
        raise DataError(f"{uri}: the sample index is damaged; index the shards again")
    return SampleIndex(offsets, checksums)


def _checksum(offsets: npt.NDArray[np.int64], checksums: npt.NDArray[np.int64]) -> int:
    return zlib.crc32(checksums.tobytes(), zlib.crc32(offsets.tobytes()))
