"""Index existing tars: write a manifest, checksums and statistics beside them."""

import io
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import as_completed
from typing import NamedTuple

from infra import storage
from infra.shard_spec import expand_shards
from mae_core.data.decode import decode_image
from mae_core.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    PixelSums,
    ShardInfo,
    parse_manifest,
    sum_pixels,
)
from mae_core.data.pixels import CorruptSampleError
from mae_core.data.samples import (
    DataError,
    ShardIndex,
    describe_unused,
    index_shard,
    iter_samples,
    some_extensions,
)
from pipelines.config.prepare import PrepareConfig
from pipelines.outcome import ConfigError, StageResult
from pipelines.packing.process_pool import process_pool
from pipelines.packing.shard import write_index
from pipelines.terminal import progress

log = logging.getLogger(__name__)


class _Indexed(NamedTuple):
    shard: ShardInfo
    found: ShardIndex
    pixels: PixelSums


def run(config: PrepareConfig, *, fresh: bool) -> StageResult:
    """Index the tars of `config.output`; the manifest is written last.

    Raises:
        ConfigError: It is not a folder, or its manifest already covers these tars.
        DataError: No image can be measured.
    """
    folder = storage.absolute(config.output)
    if folder.endswith(".tar"):
        raise ConfigError(f"output={config.output}: give the folder that contains the tars")
    names = [shard.rpartition("/")[2] for shard in expand_shards(folder)]
    manifest_uri = storage.join(folder, MANIFEST_NAME)
    old = None
    if storage.exists(manifest_uri):
        old = parse_manifest(storage.read_bytes(manifest_uri), manifest_uri)
        sizes = {name: storage.file_size(storage.join(folder, name)) for name in names}
        covered = {shard.path: shard.num_bytes for shard in old.shards} == sizes
        if config.existing == "index" and covered and not fresh:
            raise ConfigError(
                f"{manifest_uri} already covers tars of these names and sizes; --fresh reads and "
                "indexes them again"
            )
    found: dict[str, _Indexed] = {}

    def reached() -> progress.Progress:
        return progress.Progress("indexing tars", len(found), len(names))

    with progress.doing("indexing tars", reached):
        for name, one in _index_all(folder, names, config):
            found[name] = one
            num_samples = one.shard.num_samples
            log.info("indexed %s: %d samples (%d/%d)", name, num_samples, len(found), len(names))
    ordered = [found[name] for name in names]
    pixels = sum_pixels(one.pixels for one in ordered)
    if config.existing == "stats" and not pixels.num_images:
        raise DataError(
            f"{folder}: none of the images can be measured with in_chans={config.in_chans}; "
            "the log says why for each"
        )
    manifest = Manifest(
        shards=tuple(one.shard for one in ordered),
        classes=old.classes if old else None,
        channel_stats=pixels.channel_stats(),
        left_out=sum((one.found.left_out for one in ordered), Counter()),
        unused_extensions=some_extensions(one.found for one in ordered),
        damaged={
            one.shard.path: str(one.found.damage) for one in ordered if one.found.damage is not None
        },
    )
    _say_left_out(folder, manifest)
    text = manifest.model_dump_json(indent=2) + "\n"
    storage.write_bytes(manifest_uri, text.encode())
    metrics: dict[str, float] = {
        "num_samples": manifest.num_samples,
        "num_shards": len(names),
        "num_bytes": manifest.num_bytes,
        "num_left_out": sum(manifest.left_out.values()),
        "num_measured": pixels.num_images,
    }
    return StageResult("prepare", "done", None, folder, metrics)


def _say_left_out(folder: str, manifest: Manifest) -> None:
    """Warn about groups that are not samples.

    Raises:
        DataError: There is no sample at all.
    """
    counts = ", ".join(f"{n} x {kind}" for kind, n in sorted(manifest.left_out.items()))
    unused = describe_unused(manifest.unused_extensions)
    for damage in manifest.damaged.values():
        log.warning("only the samples before the damage are indexed: %s", damage)
    if counts:
        log.warning("left out of %s: %s%s", folder, counts, unused)
    if not manifest.num_samples:
        raise DataError(f"{folder}: no tar has a sample with an image{unused}")


def _index_all(
    folder: str, names: list[str], config: PrepareConfig
) -> Iterator[tuple[str, _Indexed]]:
    in_chans = config.in_chans if config.existing == "stats" else None
    if config.workers == 1:
        for name in names:
            yield name, _index_one(folder, name, in_chans)
        return
    with process_pool(min(config.workers, len(names))) as pool:
        running = {pool.submit(_index_one, folder, name, in_chans): name for name in names}
        for task in as_completed(running):
            yield running[task], task.result()


def _index_one(folder: str, name: str, in_chans: int | None) -> _Indexed:
    """Read a whole tar and write its index beside it."""
    uri = storage.join(folder, name)
    data = storage.read_bytes(uri)
    found = index_shard(io.BytesIO(data), uri, lenient=True)
    info = write_index(folder, name, data, found)
    pixels = PixelSums.none(in_chans or 1)
    if in_chans is not None:
        spans = itertools.pairwise(found.offsets.tolist())
        pieces = (io.BytesIO(data[a:b]) for a, b in spans)
        for sample in (next(iter_samples(piece, uri, lenient=True)) for piece in pieces):
            try:
                pixels += PixelSums.of(decode_image(sample.image, in_chans))
            except CorruptSampleError as error:
                log.warning("not measured: %s in %s: %s", sample.key, uri, error)
    return _Indexed(info, found, pixels)
