"""What a shard set holds: shards, counts, bytes, checksums, classes, channel statistics.

`manifest.json` lies beside the shards; `<shard>.index.npy` beside each of them says where its
samples lie, so that any range of samples is one ranged read. Foreign tars get both from an
index pass, kept beside the run.
"""

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from mae_core.config import StrictConfig
from mae_core.data.samples import DataError

MANIFEST_NAME = "manifest.json"


class ChannelStats(StrictConfig):
    """Mean and standard deviation of each channel over all pixels, as a share of full scale."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_images: int = Field(gt=0)
    """How many images were measured."""


# Of the 1.28 million training images: https://github.com/facebookresearch/mae, main_pretrain.py.
IMAGENET_STATS = ChannelStats(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), num_images=1_281_167
)


class ShardInfo(StrictConfig):
    path: str
    """Relative to the manifest's folder, or a full path or URI."""
    index: str
    """The sample offsets, likewise."""
    num_samples: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    sha256: str | None = None
    """Of the whole tar; None where it was indexed without reading the images."""


class Manifest(StrictConfig):
    version: Literal[1] = 1
    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...] | None = None
    """Names of the classes, in the order of the `.cls` numbers."""
    channel_stats: ChannelStats | None = None
    num_without_image: int = 0
    """Groups of tar members that hold no image and are left out."""

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Samples in each shard."""
        return np.asarray([shard.num_samples for shard in self.shards], dtype=np.int64)

    @property
    def digest(self) -> str:
        """Names the content, wherever it lies: 32 hex digits."""
        hasher = hashlib.sha256()
        for shard in self.shards:
            name = PurePosixPath(shard.path).name
            hasher.update(f"{name} {shard.num_samples} {shard.num_bytes} {shard.sha256}\n".encode())
        return hasher.hexdigest()[:32]


def channel_stats_of_sums(
    sums: Sequence[int], squares: Sequence[int], num_pixels: int, num_images: int
) -> ChannelStats | None:
    """From whole numbers, which add up the same in any order; None where there is no pixel.

    Args:
        sums: of the values of each channel, 0 to 255.
        squares: of the squares of these values.
        num_pixels: in one channel of all images.
        num_images: that were measured.
    """
    if not num_pixels:
        return None
    mean = tuple(s / (255 * num_pixels) for s in sums)
    # Whole numbers until the last step: no digits are lost in the difference.
    spread = [num_pixels * q - s * s for s, q in zip(sums, squares, strict=True)]
    # Not 0, which readers would divide by.
    std = tuple(max(math.sqrt(value) / (255 * num_pixels), 1e-6) for value in spread)
    return ChannelStats(mean=mean, std=std, num_images=num_images)


def parse_manifest(text: bytes, uri: str) -> Manifest:
    """Raises: DataError: the text is no manifest; names `uri`."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{uri}: not a manifest of this version ({place}: {first['msg']}); "
            "pack the folder again with `mae prepare`, or remove the file to index the tars"
        ) from error


def offsets_to_bytes(offsets: npt.NDArray[np.int64]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, offsets, allow_pickle=False)
    return buffer.getvalue()


def offsets_from_bytes(data: bytes, uri: str) -> npt.NDArray[np.int64]:
    """Raises: DataError: the bytes are no index; names `uri`."""
    try:
        offsets = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{uri}: not a sample index ({error}); index the shards again") from error
    if offsets.ndim != 1 or offsets.dtype != np.int64 or (np.diff(offsets) <= 0).any():
        raise DataError(f"{uri}: not a rising list of offsets; index the shards again")
    return offsets
