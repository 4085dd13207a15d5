"""Shards in storage as a Ray Dataset that delivers the run's one fixed sequence of samples.

The sequence (`mae_core.data.order`) is cut into windows. One Ray Data task reads one window: a
ranged read for each piece of a shard in it, permuted, and given out in blocks of exactly one
micro batch. Blocks go round the workers in turn, so a global batch is the same set of samples
for any number of workers. A task is a pure function of its window: running it again after a
lost node gives the same rows, and a resumed run starts at its window and opens nothing before.
"""

import io
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from infra import storage
from mae_core.data.decode import CorruptSampleError, decode_image
from mae_core.data.manifest import (
    MANIFEST_NAME,
    ChannelStats,
    Manifest,
    ShardInfo,
    offsets_from_bytes,
    offsets_to_bytes,
    parse_manifest,
)
from mae_core.data.order import RunOrder
from mae_core.data.samples import DataError, Sample, index_shard, iter_samples
from pipelines.config import ConfigError

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("position", pa.int64()),  # in the run's sequence
        ("epoch", pa.int32()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("image", pa.large_binary()),  # encoded, or the view's pixels where `decoded`
        ("decoded", pa.bool_()),
    ]
)
READ_CPUS = 1  # of a read task; Ray's default, which lets it run read and slicing as one task
STATS_IMAGES = 2048
_INDEX_THREADS = 8


class ChangedDataError(DataError):
    """A shard is not what its index says."""


# Opening a shard set


def open_shards(spec: str | tuple[str, ...], cache_uri: str) -> Manifest:
    """The manifest of the shards that `spec` names, with absolute paths.

    Ours is read where it lies beside the shards; foreign tars are indexed once, in parallel,
    and the result is kept under `cache_uri`.

    Raises:
        ConfigError: `spec` names a shard twice.
        NoShardsError: nothing matches.
        DataError: a tar is damaged, or no sample has an image.
    """
    try:
        shards = storage.expand_shards(spec)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    manifest = _prepared_manifest(shards) or _indexed_manifest(shards, cache_uri)
    if manifest.num_samples == 0:
        raise DataError(
            f"{spec}: {len(shards)} tars, but no sample with an image "
            "(.jpg .jpeg .png .webp .tif .tiff) in them"
        )
    if manifest.num_without_image:
        logger.warning("%d groups of tar members hold no image", manifest.num_without_image)
    return manifest


def _prepared_manifest(shards: list[str]) -> Manifest | None:
    """The manifest that `mae prepare` wrote, if it covers exactly these shards."""
    folder = shards[0].rpartition("/")[0]
    uri = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(uri):
        return None
    manifest = parse_manifest(storage.read_bytes(uri), uri)
    resolved = tuple(
        shard.model_copy(
            update={
                "path": storage.join(folder, shard.path),
                "index": storage.join(folder, shard.index),
            }
        )
        for shard in manifest.shards
    )
    wanted = set(shards)
    chosen = tuple(shard for shard in resolved if shard.path in wanted)
    if len(chosen) != len(shards):
        logger.warning("%s does not list all of the shards; indexing them", uri)
        return None
    return manifest.model_copy(update={"shards": chosen})


def _indexed_manifest(shards: list[str], cache_uri: str) -> Manifest:
    sizes = _in_threads(storage.file_size, shards)
    cached = storage.join(cache_uri, MANIFEST_NAME)
    if storage.exists(cached):
        manifest = parse_manifest(storage.read_bytes(cached), cached)
        if [(s.path, s.num_bytes) for s in manifest.shards] == list(
            zip(shards, sizes, strict=True)
        ):
            return manifest
    logger.info("indexing %d tars without a manifest", len(shards))
    counts = _in_threads(partial(_index_one, cache_uri=cache_uri), list(enumerate(shards)))
    infos = tuple(
        ShardInfo(path=path, index=index, num_samples=num_samples, num_bytes=size)
        for path, size, (index, num_samples, _) in zip(shards, sizes, counts, strict=True)
    )
    manifest = Manifest(shards=infos, num_without_image=sum(without for *_, without in counts))
    storage.write_bytes(cached, manifest.model_dump_json(indent=1).encode())
    return manifest


def _index_one(numbered: tuple[int, str], cache_uri: str) -> tuple[str, int, int]:
    number, shard = numbered
    opener = storage.open_stream if storage.is_remote(shard) else storage.open_random
    with storage.storage_errors("read", shard), opener(shard) as stream:
        found = index_shard(stream, shard)
    uri = storage.join(cache_uri, f"{number:06d}.index.npy")
    storage.write_bytes(uri, offsets_to_bytes(found.offsets))
    return uri, found.num_samples, found.num_without_image


def _in_threads(function: Any, items: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(_INDEX_THREADS) as pool:
        return list(pool.map(function, items))


def measure_channel_stats(manifest: Manifest, in_chans: int) -> ChannelStats:
    """Mean and standard deviation of each channel, over the first images of evenly spread shards.

    For shards without stats of their own. Deterministic; broken images are left out.
    """
    num_shards = min(len(manifest.shards), 16)
    chosen = np.linspace(0, len(manifest.shards) - 1, num_shards).astype(int)
    rows = -(-STATS_IMAGES // num_shards)
    sums = np.zeros((2, in_chans))
    num_pixels = num_images = 0
    for shard in (manifest.shards[i] for i in chosen):
        for sample in read_rows(shard, 0, min(rows, shard.num_samples)):
            try:
                pixels = decode_image(sample.image, in_chans).reshape(-1, in_chans) / 255.0
            except CorruptSampleError:
                continue
            sums += [pixels.sum(axis=0), np.square(pixels).sum(axis=0)]
            num_pixels, num_images = num_pixels + len(pixels), num_images + 1
    if not num_images:
        raise DataError(f"none of the first images of {num_shards} shards can be decoded")
    mean = sums[0] / num_pixels
    std = np.sqrt(np.maximum(sums[1] / num_pixels - mean**2, 1e-12))
    return ChannelStats(mean=tuple(mean), std=tuple(std), num_images=num_images)


# Reading


@lru_cache(maxsize=64)
def _offsets(index_uri: str) -> npt.NDArray[np.int64]:
    return offsets_from_bytes(storage.read_bytes(index_uri), index_uri)


def read_rows(shard: ShardInfo, start: int, stop: int) -> list[Sample]:
    """Samples [start, stop) of a shard, by one ranged read.

    Raises:
        ChangedDataError: the shard does not hold what its index says.
    """
    if start == stop:
        return []
    offsets = _offsets(shard.index)
    if len(offsets) != shard.num_samples + 1 or offsets[-1] > shard.num_bytes:
        raise ChangedDataError(f"{shard.index}: does not belong to {shard.path}; index it again")
    first, last = int(offsets[start]), int(offsets[stop])
    data = storage.read_range(shard.path, first, last)
    samples = list(iter_samples(io.BytesIO(data), shard.path)) if len(data) == last - first else []
    if [first + sample.offset for sample in samples] != offsets[start:stop].tolist():
        raise ChangedDataError(
            f"{shard.path}: bytes {first} to {last} hold other samples than when it was indexed; "
            "remove the index (or pack the set again) and start over with --fresh"
        )
    return samples


@dataclass(frozen=True, eq=False)
class SequencePlan:
    """All that a read task needs to know."""

    shards: tuple[ShardInfo, ...]
    order: RunOrder
    start: int  # place in the sequence at which reading starts
    micro_batch_size: int


def read_window(plan: SequencePlan, window: int) -> Iterator[pa.Table]:
    """The rows of a window from `plan.start` on, in the run's order, a micro batch at a time."""
    order = plan.order
    rows: list[tuple[int, str, Sample]] = []
    for epoch, shard, first, last in order.window_segments(window):
        samples = read_rows(plan.shards[shard], first, last)
        rows += [(epoch, plan.shards[shard].path, sample) for sample in samples]
    window_start, window_stop = order.window_bounds(window)
    permutation = order.window_permutation(window)
    for begin in range(max(plan.start, window_start), window_stop, plan.micro_batch_size):
        end = min(begin + plan.micro_batch_size, window_stop)
        chosen = [rows[i] for i in permutation[begin - window_start : end - window_start]]
        yield pa.table(
            [
                np.arange(begin, end),
                pa.array([epoch for epoch, _, _ in chosen], pa.int32()),
                pa.array([path for _, path, _ in chosen]),
                pa.array([sample.key for *_, sample in chosen]),
                pa.array([sample.image for *_, sample in chosen], pa.large_binary()),
                pa.array([False] * len(chosen)),
            ],
            schema=SCHEMA,
        )


def sequence_dataset(
    plan: SequencePlan, decode: Callable[[pa.Table], pa.Table] | None = None
) -> ray.data.Dataset:
    """Rows of SCHEMA from `plan.start` to the end of the run, in blocks of one micro batch.

    `decode` is applied to each block in the read task.
    """
    first = plan.start // plan.order.window
    # One at least, for Ray; a window beyond the end is empty.
    num_windows = max(1, plan.order.num_windows - first)
    windows = ray.data.range(num_windows, override_num_blocks=num_windows)
    # Not strict: each task's rows are whole micro batches already, so nothing is stitched
    # across tasks, and Ray Data runs read and slicing as one task.
    return windows.map_batches(
        partial(_read_batch, plan=plan, first=first, decode=decode),
        batch_size=1,
    ).repartition(target_num_rows_per_block=plan.micro_batch_size, strict=False)


def _read_batch(
    batch: dict[str, npt.NDArray[np.int64]],
    plan: SequencePlan,
    first: int,
    decode: Callable[[pa.Table], pa.Table] | None,
) -> Iterator[pa.Table]:
    for window in batch["id"]:
        for block in read_window(plan, first + int(window)):
            yield decode(block) if decode else block


def configure_ray_data() -> None:
    """Set in the driver: Ray Train copies the driver's options over a dataset's own."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.max_errored_blocks = 0
    context.execution_no_progress_timeout_s = 300
