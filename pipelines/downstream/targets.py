"""Read the labels of both sets before anything is trained."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from mae_core.data.decode import decode_image, jpeg_header
from mae_core.data.manifest import Manifest, ShardInfo
from mae_core.data.pixels import CorruptSampleError
from mae_core.data.samples import Sample
from pipelines.reading.shards import BrokenSample, read_samples, target_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROWS_PER_READ = 512
READ_THREADS = 4
MAX_NAMED = 10


class Target(NamedTuple):
    shard: str
    where: str  # shard and key, for messages
    data: bytes | None  # of the label
    is_broken: bool  # the sample can't be read and becomes a hole in training


def read_targets(manifest: Manifest, extensions: tuple[str, ...]) -> list[Target]:
    """Read the label of each sample of all shards, in order."""
    return list(map_samples(manifest, lambda shard, row: _target(shard, row, extensions)))


def _target(shard: str, row: Sample | BrokenSample, extensions: tuple[str, ...]) -> Target:
    data = target_of(row, extensions)
    return Target(shard, f"{shard}: {row.key}", data, isinstance(row, BrokenSample))


def map_samples(
    manifest: Manifest, function: Callable[[str, Sample | BrokenSample], T]
) -> Iterator[T]:
    """Call `function` in threads with shard and sample, for each sample; yield in order."""
    pieces = [
        (shard, start, min(start + ROWS_PER_READ, shard.num_samples))
        for shard in manifest.shards
        for start in range(0, shard.num_samples, ROWS_PER_READ)
    ]

    def read(piece: tuple[ShardInfo, int, int]) -> list[T]:
        shard, start, stop = piece
        return [function(shard.path, row) for row in read_samples(shard, start, stop)]

    with ThreadPoolExecutor(READ_THREADS) as pool:
        # A few at a time, because images are large.
        for first in range(0, len(pieces), READ_THREADS):
            for results in pool.map(read, pieces[first : first + READ_THREADS]):
                yield from results


def picture_shape(row: Sample | BrokenSample, in_chans: int) -> tuple[int, ...] | None:
    """Return height and width of a sample's upright image; None if it can't be decoded."""
    if isinstance(row, BrokenSample):
        return None
    header = jpeg_header(row.image)
    if header is not None and header.orientation == 1:
        return header.height, header.width
    try:
        return decode_image(row.image, in_chans).shape[:2]
    except CorruptSampleError:
        return None


def warn_of_absent(key: str, names: Sequence[str], counts: Mapping[int, int]) -> None:
    """Warn, before anything is trained, about classes without any training sample.

    Args:
        key: of the config that names the classes.
        names: of all classes.
        counts: training samples by the number of the class.
    """
    absent = [name for number, name in enumerate(names) if not counts.get(number)]
    if absent:
        logger.warning(
            "%s: no sample of data.train has the class %s: the model cannot learn it, and its "
            "scores will be 0 or missing",
            key,
            ", ".join(absent[:MAX_NAMED]) + (", ..." if len(absent) > MAX_NAMED else ""),
        )
