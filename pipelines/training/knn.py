"""Measure the accuracy of the frozen encoder's features in the training workers, after training.

The workers are already running, have the GPUs, and share the images among them; rank 0 gathers the
features and computes the scores.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.data.class_labels import one_class, read_labels
from mae_core.data.decode import decode_image
from mae_core.data.manifest import ShardInfo
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.samples import DataError, Sample
from mae_core.data.transforms import center_crop, stack_pixels
from mae_core.data.views import normalize
from mae_core.evaluation.classification import encode_features, knn_accuracy
from pipelines.config.pretrain import KnnConfig
from pipelines.reading.class_names import Numbers, folder_of
from pipelines.reading.shards import read_rows
from pipelines.training.pretrain_evaluation import LINEAR_PREFIX, METRICS_PREFIX

logger = logging.getLogger(__name__)

ROWS_PER_READ = 64
CHECKED_SAMPLES = 512  # number of samples of each set whose labels are checked before training
MAX_EXAMPLES = 3
PIXELS = "top1_pixels"  # the raw pixels, as a baseline without an encoder
NAMES = {"top1": "trained", "top1_untrained": "untrained", PIXELS: "raw pixels"}
PICTURE_SIDE = 16
LEAST_OF_A_CLASS = 5  # number of images on which the probe chooses its penalty


class Slice(NamedTuple):
    shard: ShardInfo
    start: int
    stop: int


class ImageReader(NamedTuple):
    """Turns a sample into the encoder's input and its class."""

    model: ModelConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_threads: int
    numbers: Numbers
    needs_labels: bool = True  # if False, every sample has the label 0


# Maps normalised images (B, C, H, W) to (B, ...), on any device.
Measure = Callable[[Tensor], Tensor]


class LabelledFeatures(NamedTuple):
    features: dict[str, Tensor]  # from the name of the measure to (N, ...)
    labels: Tensor  # (N,) int64
    unlabelled: tuple[str, ...] = ()  # why samples were left out, for each of them


def features_of(encoder: nn.Module) -> Measure:
    """Return a function that encodes whole images on the encoder's device."""
    device = next(encoder.parameters()).device
    return lambda images: encode_features(encoder, images.to(device))


def knn_metrics(
    encoders: Mapping[str, nn.Module],
    train: Sequence[ShardInfo],
    val: Sequence[ShardInfo],
    reader: ImageReader,
    config: KnnConfig,
    tell: Callable[[int, int], None],
) -> dict[str, float] | None:
    """Return `knn/NAME` and `linear/NAME` for each encoder; None on all ranks but the first.

    `linear/` is also measured on the raw pixels. Samples without a usable label are left out, and
    counted in `knn/left_out`. `tell` is called with the number of pieces that are encoded, and the
    number of all pieces.

    Raises:
        DataError: no sample of a set has both a label and an image that can be decoded.
    """
    bank_slices = spread_slices(train, config.max_train)
    slices = spread_slices(val, config.max_val)
    total = len(bank_slices) + len(slices)

    def tell_bank(done: int) -> None:
        tell(done, total)

    def tell_queries(done: int) -> None:
        tell(len(bank_slices) + done, total)

    measures = {name: features_of(encoder) for name, encoder in encoders.items()}
    if config.max_linear:
        measures[PIXELS] = small_pictures
    bank = shared_features(measures, bank_slices, reader, tell_bank)
    queries = shared_features(measures, slices, reader, tell_queries)
    if bank is None or queries is None:
        return None
    k = min(config.k, len(bank.labels))
    metrics = {
        f"{METRICS_PREFIX}{name}": accuracy_of(name, bank, queries, k=k) for name in encoders
    }
    logger.info(
        "kNN accuracy, k=%d among %d images, of %d test images: %s",
        k,
        len(bank.labels),
        len(queries.labels),
        ", ".join(f"{name.removeprefix('knn/')}={value:.3f}" for name, value in metrics.items()),
    )
    if config.max_linear:
        metrics |= linear_metrics(bank, queries, config.max_linear)
    if unlabelled := (*bank.unlabelled, *queries.unlabelled):
        logger.warning(
            "%d samples are left out of the kNN evaluation, because they have no usable label: %s",
            len(unlabelled),
            "; ".join(unlabelled[:MAX_EXAMPLES]),
        )
        metrics[f"{METRICS_PREFIX}left_out"] = float(len(unlabelled))
    return metrics


def small_pictures(images: Tensor) -> Tensor:
    """Average images of (B, C, H, W) over areas, which leaves at most (B, C * 16 * 16) values."""
    height, width = (min(side, PICTURE_SIDE) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images, (height, width)).flatten(1)


def linear_metrics(
    bank: LabelledFeatures, queries: LabelledFeatures, limit: int
) -> dict[str, float]:
    """Return `linear/NAME`, the accuracy of logistic regression on the features of each measure.

    It is fitted to at most `limit` evenly spread images of the bank. The result is empty if the
    bank has too few images of every class.
    """
    chosen = torch.linspace(0, len(bank.labels) - 1, min(limit, len(bank.labels))).long()
    known, places = torch.unique(bank.labels[chosen], return_inverse=True)
    wanted = _places_among(known, queries.labels)
    if len(known) < 2 or int(places.bincount().max()) < LEAST_OF_A_CLASS:
        logger.info("no linear probe: %d labelled images are too few", len(chosen))
        return {}
    # Importing scikit-learn takes most of a second, and the start of a run need not wait for it.
    probe = import_module("mae_core.evaluation.linear_probe")
    metrics = {
        f"{LINEAR_PREFIX}{name}": probe.linear_probe_accuracy(
            features[chosen], places, queries.features[name], wanted, seed=0
        )
        for name, features in bank.features.items()
    }
    logger.info(
        "linear probe, on %d labelled images, of %d test images: %s",
        len(chosen),
        len(queries.labels),
        ", ".join(
            f"{NAMES.get(name, name)}={metrics[LINEAR_PREFIX + name]:.3f}" for name in bank.features
        ),
    )
    return metrics


def accuracy_of(name: str, bank: LabelledFeatures, queries: LabelledFeatures, *, k: int) -> float:
    """Return the kNN accuracy of a measure's features."""
    # Class numbers may be large and far apart.
    known, places = torch.unique(bank.labels, return_inverse=True)
    wanted = _places_among(known, queries.labels)
    return knn_accuracy(bank.features[name], places, queries.features[name], wanted, k=k)


def _places_among(known: Tensor, labels: Tensor) -> Tensor:
    """Return the index of each label in `known`, or `len(known)` for an unknown label."""
    places = torch.searchsorted(known, labels).clamp(max=len(known) - 1)
    return torch.where(known[places] == labels, places, len(known))


def spread_slices(shards: Sequence[ShardInfo], limit: int) -> list[Slice]:
    """Choose about `limit` samples, evenly spread: foreign shards are often sorted by class."""
    slices = [
        Slice(shard, start, min(start + ROWS_PER_READ, shard.num_samples))
        for shard in shards
        for start in range(0, shard.num_samples, ROWS_PER_READ)
    ]
    wanted = -(-limit // ROWS_PER_READ)
    if wanted >= len(slices):
        return slices
    return [slices[i * len(slices) // wanted] for i in range(wanted)]


def shared_features(
    measures: Mapping[str, Measure],
    slices: list[Slice],
    reader: ImageReader,
    tell: Callable[[int], None],
) -> LabelledFeatures | None:
    """Return the features of all slices on rank 0; each rank computes its share of them.

    Raises:
        DataError: there is no image with a label that can be used.
    """
    rank, world_size = 0, 1
    if torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with ThreadPoolExecutor(reader.num_threads) as pool:
        mine = []
        for place, piece in enumerate(slices[rank::world_size]):
            tell(place * world_size)
            mine.append(_encode_slice(measures, piece, reader, pool))
    parts: list[list[LabelledFeatures]] = [mine]
    if world_size > 1:
        parts = [[] for _ in range(world_size)]
        torch.distributed.all_gather_object(parts, mine)
    if rank != 0:
        return None
    # Back in the order of the slices, because ties among neighbours are decided by the order.
    ordered = [parts[i % world_size][i // world_size] for i in range(len(slices))]
    labels = torch.cat([part.labels for part in ordered])
    unlabelled = tuple(why for part in ordered for why in part.unlabelled)
    if not len(labels):
        why = unlabelled[0] if unlabelled else "no image can be decoded"
        raise DataError(f"{slices[0].shard.path}: nothing for the kNN evaluation: {why}")
    features = {
        name: torch.cat([part.features[name] for part in ordered if len(part.labels)])
        for name in measures
    }
    return LabelledFeatures(features, labels, unlabelled)


def _encode_slice(
    measures: Mapping[str, Measure],
    piece: Slice,
    reader: ImageReader,
    pool: ThreadPoolExecutor,
) -> LabelledFeatures:
    if reader.needs_labels:
        labelled, unlabelled = _labelled(piece, reader.numbers)
    else:
        labelled = [(s, 0) for s in read_rows(piece.shard, piece.start, piece.stop)]
        unlabelled = ()
    images = list(pool.map(lambda item: _image(item[0], reader.model), labelled))
    whole = [
        (image, label)
        for image, (_, label) in zip(images, labelled, strict=True)
        if image is not None
    ]
    if not whole:
        return LabelledFeatures({}, torch.zeros(0, dtype=torch.int64), unlabelled)
    batch = torch.from_numpy(
        normalize(stack_pixels([i for i, _ in whole]), reader.mean, reader.std)
    )
    return LabelledFeatures(
        {name: measure(batch).float().cpu() for name, measure in measures.items()},
        torch.tensor([label for _, label in whole]),
        unlabelled,
    )


def _labelled(piece: Slice, numbers: Numbers) -> tuple[list[tuple[Sample, int]], tuple[str, ...]]:
    """Return the samples of a slice with their classes, and why the other samples have none."""
    found: list[tuple[Sample, int]] = []
    unlabelled: list[str] = []
    for sample in read_rows(piece.shard, piece.start, piece.stop):
        try:
            found.append((sample, needed_label(piece.shard, sample, numbers)))
        except DataError as error:
            unlabelled.append(str(error))
    return found, tuple(unlabelled)


def needed_label(shard: ShardInfo, sample: Sample, numbers: Numbers = MappingProxyType({})) -> int:
    """Return the sample's class, by the run's numbering.

    Raises:
        DataError: it has none, several, or one that its own set does not name.
    """
    where = f"{shard.path}: {sample.key}"
    data = sample.parts.get("cls")
    if data is None:
        raise DataError(f"{where} has no .cls, which the kNN evaluation needs")
    label = one_class(read_labels(data, where, key=None), where)
    assert isinstance(label, int), "a .cls holds numbers"
    known = numbers.get(folder_of(shard.path))
    if known is None:
        return label
    if label not in known:
        raise DataError(f"{where}.cls holds {label}, but its set names {len(known)} classes")
    return known[label]


def has_labels(shards: Sequence[ShardInfo]) -> bool:
    """Return whether any of the first samples has a `.cls` file, usable or not."""
    return any(
        "cls" in sample.parts
        for piece in spread_slices(shards, CHECKED_SAMPLES)
        for sample in read_rows(piece.shard, piece.start, piece.stop)
    )


def check_labels(key: str, shards: Sequence[ShardInfo], numbers: Numbers) -> None:
    """Check the labels of some samples before training, and report what the evaluation will miss.

    Raises:
        DataError: none of them has a label that can be used.
    """
    num_good = 0
    bad: list[str] = []
    for piece in spread_slices(shards, CHECKED_SAMPLES):
        found, unlabelled = _labelled(piece, numbers)
        num_good += len(found)
        bad += unlabelled
    if bad and not num_good:
        raise DataError(
            f"{key}: {bad[0]}. The kNN evaluation needs labels: add .cls files to data.train and "
            "data.val, or leave data.val out"
        )
    if bad:
        logger.warning(
            "%s: %d of %d samples that were looked at have no label that can be used, and will be "
            "left out of the kNN evaluation: %s",
            key,
            len(bad),
            len(bad) + num_good,
            "; ".join(bad[:MAX_EXAMPLES]),
        )


def _image(sample: Sample, model: ModelConfig) -> Pixels | None:
    """Decode a sample's image; None if that fails, which training has counted already."""
    try:
        return center_crop(decode_image(sample.image, model.in_chans), model.img_size)
    except CorruptSampleError:
        return None
