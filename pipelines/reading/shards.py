"""Open shard sets in storage and read ranges of their samples.

Everything that is read is checked against the index of its shard; a sample that does not match its
index is returned as a `BrokenSample`.
"""

import io
import logging
import zlib
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from infra import storage
from infra.shard_spec import expand_shards
from mae_core.data.decode import decode_image
from mae_core.data.manifest import (
    ChannelStats,
    Manifest,
    PixelSums,
    SampleIndex,
    ShardInfo,
    index_from_bytes,
)
from mae_core.data.pixels import CorruptSampleError
from mae_core.data.samples import (
    IMAGE_EXTENSIONS,
    DataError,
    Sample,
    describe_unused,
    iter_samples,
    sample_checksums,
)
from pipelines.outcome import ConfigError
from pipelines.reading.manifests import hint_to_pack, read_manifests

logger = logging.getLogger(__name__)


STATS_IMAGES = 2048


_READS = 3  # of a range with wrong checksums, because the transfer may have damaged it


_MAX_GAP_BYTES = 64 * 2**10  # smaller gaps are read and discarded instead of a second request


Rows = range | npt.NDArray[np.int64]  # row numbers in a shard, rising


class ChangedDataError(DataError):
    """A shard does not match its index."""


class BrokenSample(NamedTuple):
    """A sample whose bytes do not match its index."""

    key: str  # or its number in the shard, if the key can't be read
    error: str  # "kind: why"


def open_shards(
    spec: str | tuple[str, ...], cache_uri: str, *, max_bad_ratio: float = 0.0
) -> Manifest:
    """Return the manifest of the shards that `spec` names, with absolute paths.

    The manifest of `mae prepare` is used if it is beside the shards. Other tars are indexed once,
    in parallel, and the result is kept under `cache_uri`. Of a damaged tar, the samples before the
    damage are used.

    Raises:
        ConfigError: `spec` names a shard twice.
        NoShardsError: Nothing matches.
        DataError: A larger share of the tars than `max_bad_ratio` is damaged, or no sample has
            an image.
    """
    try:
        shards = expand_shards(spec)
    except storage.NoShardsError as error:
        raise storage.NoShardsError(f"{error}{hint_to_pack(spec)}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    manifest = read_manifests(shards, cache_uri)
    _index.cache_clear()  # an index may have been rewritten
    unused = describe_unused(manifest.unused_extensions)
    if manifest.num_samples == 0:
        raise DataError(
            f"{spec}: {len(shards)} tars, but no sample with an image "
            f"({' '.join('.' + name for name in IMAGE_EXTENSIONS)}) in them{unused}"
        )
    for shard, damage in manifest.damaged.items():
        logger.warning("only the samples before the damage are used: %s", damage)
        if len(manifest.damaged) > max_bad_ratio * len(shards):
            raise DataError(
                f"{len(manifest.damaged)} of {len(shards)} tars are damaged, a larger share than "
                f"data.max_bad_ratio={max_bad_ratio:g}; the first is {shard} ({damage})"
            )
    if manifest.left_out:
        counts = ", ".join(f"{n} x {kind}" for kind, n in sorted(manifest.left_out.items()))
        logger.warning("left out of the shards: %s%s", counts, unused)
    return manifest


def measure_channel_stats(manifest: Manifest, in_chans: int) -> ChannelStats:
    """Compute each channel's mean and deviation from the first images of evenly spread shards.

    Used for shards without statistics of their own. Deterministic; skips broken images.
    """
    num_shards = min(len(manifest.shards), 16)
    chosen = np.linspace(0, len(manifest.shards) - 1, num_shards).astype(int)
    rows = -(-STATS_IMAGES // num_shards)
    sums = PixelSums.none(in_chans)
    for shard in (manifest.shards[i] for i in chosen):
        for sample in read_rows(shard, 0, min(rows, shard.num_samples)):
            try:
                sums += PixelSums.of(decode_image(sample.image, in_chans))
            except CorruptSampleError:
                continue
    stats = sums.channel_stats()
    if stats is None:
        raise DataError(f"none of the first images of {num_shards} shards can be decoded")
    return stats


@lru_cache(maxsize=64)
def _index(index_uri: str) -> SampleIndex:
    for _ in range(_READS - 1):
        with suppress(DataError):
            return index_from_bytes(storage.read_bytes(index_uri), index_uri)
    return index_from_bytes(storage.read_bytes(index_uri), index_uri)


def _index_of(shard: ShardInfo) -> SampleIndex:
    """Read the index, or raise a ChangedDataError if it belongs to another shard."""
    index = _index(shard.index)
    if len(index.offsets) != shard.num_samples + 1 or index.offsets[-1] > shard.num_bytes:
        raise ChangedDataError(f"{shard.index}: does not belong to {shard.path}; index it again")
    return index


def read_rows(shard: ShardInfo, start: int, stop: int) -> list[Sample]:
    """Read samples [start, stop) of a shard with one ranged request and return the intact ones."""
    rows = read_samples(shard, start, stop)
    return [row for row in rows if isinstance(row, Sample)]


def read_samples(shard: ShardInfo, start: int, stop: int) -> list[Sample | BrokenSample]:
    """Read samples [start, stop) of a shard with one ranged request, or more on wrong checksums.

    Raises:
        ChangedDataError: The index belongs to another shard.
    """
    if start == stop:
        return []
    index = _index_of(shard)
    offsets = index.offsets[start : stop + 1]
    checksums = None if index.checksums is None else index.checksums[start:stop]
    data = b""
    for _ in range(_READS):
        data = storage.read_range(shard.path, int(offsets[0]), int(offsets[-1]))
        if _is_whole(data, offsets, checksums):
            break
    if checksums is None or _is_whole(data, offsets, checksums):
        rows = _parse(data, shard.path, int(offsets[0]))
        if [row.offset for row in rows] == offsets[:-1].tolist():
            return list(rows)
    return [_read_one(data, shard.path, start, i, offsets, checksums) for i in range(stop - start)]


def _is_whole(
    data: bytes, offsets: npt.NDArray[np.int64], checksums: npt.NDArray[np.int64] | None
) -> bool:
    if len(data) != offsets[-1] - offsets[0]:
        return False
    return checksums is None or np.array_equal(sample_checksums(data, offsets), checksums)


def _parse(data: bytes, path: str, first: int) -> list[Sample]:
    """Parse the samples in a range of a tar, with offsets in the whole tar; [] if it is damaged."""
    try:
        samples = list(iter_samples(io.BytesIO(data), path, lenient=True))
    except DataError:
        return []
    return [sample._replace(offset=first + sample.offset) for sample in samples]


def _read_one(
    data: bytes,
    path: str,
    start: int,
    number: int,
    offsets: npt.NDArray[np.int64],
    checksums: npt.NDArray[np.int64] | None,
) -> Sample | BrokenSample:
    """Read sample `start + number` of a shard from `data`, which begins with sample `start`."""
    first = int(offsets[0])
    piece = data[int(offsets[number]) - first : int(offsets[number + 1]) - first]
    found = _parse(piece, path, int(offsets[number]))
    key = found[0].key if found else f"#{start + number}"
    if checksums is not None and zlib.crc32(piece) != checksums[number]:
        return BrokenSample(key, "checksum: the bytes differ from those that were packed")
    if not found or found[0].offset != offsets[number]:
        return BrokenSample(key, f"damaged: the tar changed or broke at byte {offsets[number]}")
    return found[0]


def read_chosen(shard: ShardInfo, rows: Rows) -> list[Sample | BrokenSample]:
    """Read rows of a shard in rising order, with one ranged request for rows close together."""
    if isinstance(rows, range):
        return read_samples(shard, rows.start, rows.stop)
    if not len(rows):
        return []
    offsets = _index_of(shard).offsets
    gaps = offsets[rows[1:]] - offsets[rows[:-1] + 1]
    samples: list[Sample | BrokenSample] = []
    for near in np.split(rows, np.flatnonzero(gaps > _MAX_GAP_BYTES) + 1):
        between = read_samples(shard, int(near[0]), int(near[-1]) + 1)
        samples += [between[row - near[0]] for row in near]
    return samples


def target_of(row: Sample | BrokenSample, extensions: tuple[str, ...]) -> bytes | None:
    """Return the file that belongs to an image: the first of `extensions` that exists."""
    if isinstance(row, BrokenSample):
        return None
    return next((row.parts[name] for name in extensions if name in row.parts), None)
