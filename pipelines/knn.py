"""kNN accuracy of the frozen encoder, computed by the training workers when they are done.

They are warm, have the GPUs, and share the images out among them; rank 0 gathers and scores.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from mae_core.config import ModelConfig
from mae_core.data.decode import decode_image
from mae_core.data.manifest import ShardInfo
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.samples import DataError, Sample
from mae_core.data.transforms import center_crop, stack_pixels
from mae_core.data.views import normalize
from mae_core.evaluation.classification import encode_features, knn_accuracy
from mae_core.model.encoder import MaskedEncoder
from pipelines.config import KnnConfig
from pipelines.datasets import read_rows

logger = logging.getLogger(__name__)

ROWS_PER_READ = 64


class Slice(NamedTuple):
    shard: ShardInfo
    start: int
    stop: int


class ImageReader(NamedTuple):
    """What turns a sample into the encoder's input."""

    model: ModelConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_threads: int


class LabelledFeatures(NamedTuple):
    features: dict[str, Tensor]  # encoder's name to (N, D)
    labels: Tensor  # (N,) int64


def knn_metrics(
    encoders: Mapping[str, MaskedEncoder],
    train: Sequence[ShardInfo],
    val: Sequence[ShardInfo],
    reader: ImageReader,
    config: KnnConfig,
) -> dict[str, float] | None:
    """`knn/NAME` for each encoder; None on the ranks that only help.

    Raises:
        DataError: a sample has no label, or no image can be decoded.
    """
    bank = _shared_features(encoders, spread_slices(train, config.max_train), reader)
    queries = _shared_features(encoders, spread_slices(val, config.max_val), reader)
    if bank is None or queries is None:
        return None
    k = min(config.k, len(bank.labels))
    metrics = {
        f"knn/{name}": knn_accuracy(
            bank.features[name], bank.labels, queries.features[name], queries.labels, k=k
        )
        for name in encoders
    }
    logger.info(
        "kNN accuracy, k=%d among %d images, of %d test images: %s",
        k,
        len(bank.labels),
        len(queries.labels),
        ", ".join(f"{name.removeprefix('knn/')}={value:.3f}" for name, value in metrics.items()),
    )
    return metrics


def spread_slices(shards: Sequence[ShardInfo], limit: int) -> list[Slice]:
    """About `limit` samples, evenly spread: foreign shards are often sorted by class."""
    slices = [
        Slice(shard, start, min(start + ROWS_PER_READ, shard.num_samples))
        for shard in shards
        for start in range(0, shard.num_samples, ROWS_PER_READ)
    ]
    wanted = -(-limit // ROWS_PER_READ)
    if wanted >= len(slices):
        return slices
    return [slices[i * len(slices) // wanted] for i in range(wanted)]


def _shared_features(
    encoders: Mapping[str, MaskedEncoder], slices: list[Slice], reader: ImageReader
) -> LabelledFeatures | None:
    """Features of all slices on rank 0; each rank encodes its part of them."""
    rank, world_size = 0, 1
    if torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with ThreadPoolExecutor(reader.num_threads) as pool:
        mine = [_encode_slice(encoders, piece, reader, pool) for piece in slices[rank::world_size]]
    parts: list[list[LabelledFeatures]] = [mine]
    if world_size > 1:
        parts = [[] for _ in range(world_size)]
        torch.distributed.all_gather_object(parts, mine)
    if rank != 0:
        return None
    # Back into the order of the slices: ties among neighbours go by place.
    ordered = [parts[i % world_size][i // world_size] for i in range(len(slices))]
    labels = torch.cat([part.labels for part in ordered])
    if not len(labels):
        raise DataError(f"{slices[0].shard.path}: no image can be decoded for the kNN evaluation")
    features = {name: torch.cat([part.features[name] for part in ordered]) for name in encoders}
    return LabelledFeatures(features, labels)


def _encode_slice(
    encoders: Mapping[str, MaskedEncoder],
    piece: Slice,
    reader: ImageReader,
    pool: ThreadPoolExecutor,
) -> LabelledFeatures:
    samples = read_rows(piece.shard, piece.start, piece.stop)
    labels = [needed_label(piece.shard, sample) for sample in samples]
    images = list(pool.map(lambda sample: _image(sample, reader.model), samples))
    whole = [
        (image, label) for image, label in zip(images, labels, strict=True) if image is not None
    ]
    if not whole:
        empty = torch.zeros(0, reader.model.encoder_shape.embed_dim)
        return LabelledFeatures(dict.fromkeys(encoders, empty), torch.zeros(0, dtype=torch.int64))
    batch = torch.from_numpy(
        normalize(stack_pixels([i for i, _ in whole]), reader.mean, reader.std)
    )
    return LabelledFeatures(
        {
            name: encode_features(encoder, batch.to(next(encoder.parameters()).device))
            .float()
            .cpu()
            for name, encoder in encoders.items()
        },
        torch.tensor([label for _, label in whole]),
    )


def needed_label(shard: ShardInfo, sample: Sample) -> int:
    """The sample's class.

    Raises:
        DataError: it has none.
    """
    text = sample.parts.get("cls")
    if text is None:
        raise DataError(
            f"{shard.path}: {sample.key} has no .cls, which the kNN evaluation needs; "
            "add labels to data.train and data.val, or leave data.val out"
        )
    try:
        return int(text)
    except ValueError as error:
        shown = text[:40].decode(errors="replace")
        raise DataError(f"{shard.path}: {sample.key}.cls holds {shown!r}, not a number") from error


def _image(sample: Sample, model: ModelConfig) -> Pixels | None:
    """None where it can't be decoded: training has counted it already."""
    try:
        return center_crop(decode_image(sample.image, model.in_chans), model.img_size)
    except CorruptSampleError:
        return None
