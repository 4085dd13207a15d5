#!/usr/bin/env python
"""Train a segmenter on a pretrained encoder, and the same one from scratch.

    python pipelines/segment.py configs/segment/nuclei.yaml init_from=CHECKPOINT

If it was stopped, the same command resumes; a finished run is not trained again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import the package, not the files beside this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipelines.cli import main

    sys.exit(main(["segment", *sys.argv[1:]]))

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mae_core.checkpoint_manifest import CheckpointManifest
from mae_core.config import ModelConfig
from mae_core.data.decode import decode_image
from mae_core.data.label_maps import (
    IGNORE,
    INSTANCE_CLASSES,
    InstanceMap,
    LabelMap,
    MaskValues,
    check_same_size,
    check_shape,
    decode_indices,
    decode_label_map,
    instances_to_classes,
    segmentation_view,
)
from mae_core.data.randomness import sample_generator
from mae_core.data.samples import DataError, Sample
from mae_core.evaluation.segmentation import (
    InstanceMatches,
    confusion_counts,
    foreground_iou,
    instance_f1,
    scores_from_counts,
    segmentation_picture,
)
from mae_core.evaluation.segmentation_ceiling import oracle_classes
from mae_core.model.dense import DenseModel, MapOptions
from mae_core.model.family import Encoder
from mae_core.model.segmenter import (
    build_segmenter,
    central_window,
    output_stride,
    segmentation_loss,
    sliding_window_logits,
)
from mae_core.train_step import BatchLoss
from pipelines.config.downstream import SegmentConfig, SegmentSection
from pipelines.downstream import run as downstream
from pipelines.downstream.arms import Arm, arms_table
from pipelines.downstream.conditioned_map import conditioning_start
from pipelines.downstream.run import LabelledData, Study, TaskKind, adamw
from pipelines.downstream.targets import map_samples, picture_shape
from pipelines.downstream.task import (
    ArmStart,
    Batch,
    EncodedSample,
    Evaluation,
    Example,
    TaskInfo,
)
from pipelines.outcome import ConfigError, StageResult
from pipelines.reading.shards import BrokenSample, target_of

logger = logging.getLogger(__name__)

TARGETS = ("seg.png",)
NUM_PICTURES = 6
# About this many images of data.val; an oracle's scores change little with more.
CEILING_IMAGES = 200
BACKGROUND = INSTANCE_CLASSES[0]
# Scores of the ceiling that are shown in one line.
SHOWN = ("miou", "foreground_iou", "iou/boundary", "instance_f1")


def run(config: SegmentConfig, *, fresh: bool) -> StageResult:
    """Train and measure each arm; see `downstream.run`."""
    kind = TaskKind(TARGETS, _study, SegmentTask, _summarize)
    return downstream.run(config, kind, fresh=fresh)


def _study(config: SegmentConfig, data: LabelledData, encoder: CheckpointManifest) -> Study:
    """Return the names of the classes; check every mask of both sets before any training.

    Raises:
        ConfigError: the head can't have the stride that the config asks for.
        DataError: a mask is missing, can't be used or is of another size than its image, or the
            masks of data.train hold one class alone.
    """
    section, model = config.segment, encoder.model
    names = _names(section)
    try:
        stride = output_stride(section.head, model.patch_size, section.stride)
    except ValueError as error:
        raise ConfigError(f"segment.{error}") from error
    logger.info("looking at the masks of data.train and data.val")
    look = partial(_pixel_counts, section=section, in_chans=model.in_chans)
    counts = [x for x in map_samples(data.train, look) if x is not None]
    _tell_absent(section, np.asarray(counts).reshape(-1, len(names) + 1))
    oracle = partial(
        _oracle_scores,
        section=section,
        model=model,
        stride=stride,
        every=-(-data.val.num_samples // CEILING_IMAGES),
    )
    ceiling = _metrics([x for x in map_samples(data.val, oracle) if x is not None], names)
    ceiling = {f"ceiling/{name}": value for name, value in ceiling.items()}
    logger.info(
        "ceiling: an oracle on the grid of the head's output (one place for %dx%d pixels) reaches "
        "%s; a smaller segment.stride or a larger segment.boundary raises it",
        stride,
        stride,
        _shown(ceiling),
    )
    return Study(names, [0] * data.train.num_samples, ceiling=ceiling)


def _shown(ceiling: Mapping[str, float]) -> str:
    known = {name: ceiling[f"ceiling/{name}"] for name in SHOWN if f"ceiling/{name}" in ceiling}
    return ", ".join(f"{name} {value:.3f}" for name, value in known.items())


class _Score(NamedTuple):
    """What one image adds to the scores."""

    counts: npt.NDArray[np.int64]  # (K, K), see confusion_counts
    matches: InstanceMatches | None


def _oracle_scores(
    shard: str,
    row: Sample | BrokenSample,
    *,
    section: SegmentSection,
    model: ModelConfig,
    stride: int,
    every: int,
) -> _Score | None:
    """Check a mask of data.val; for one in `every`, return what an oracle scores on it."""
    if _pixel_counts(shard, row, section=section, in_chans=model.in_chans) is None:
        return None
    if zlib.crc32(row.key.encode()) % every:
        return None
    truth = _Truth(*_decode_mask(section, target_of(row, TARGETS), f"{shard}: {row.key}"))
    found = oracle_classes(
        truth.classes,
        output_stride=stride,
        crop=model.img_size,
        stride=_window_stride(section, model.img_size),
        class_weights=section.class_weights,
    )
    return _score(section, found, truth)


def _score(section: SegmentSection, found: LabelMap, truth: "_Truth") -> _Score:
    counts = confusion_counts(
        torch.from_numpy(found), torch.from_numpy(truth.classes.copy()), len(_names(section))
    )
    matches = None
    if truth.instances is not None:
        matches = instance_f1(found, truth.instances, boundary=section.boundary)
    return _Score(counts.numpy(), matches)


def _metrics(scores: Sequence["_Score | Prediction"], names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of some images; {} if no pixel of them has a class."""
    total = np.sum([score.counts for score in scores], axis=0)
    if not np.any(total):
        return {}
    counts = torch.from_numpy(total)
    found = scores_from_counts(counts, names)
    metrics = {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy}
    if names[0] == BACKGROUND:
        metrics["foreground_iou"] = foreground_iou(counts)
    metrics |= {f"iou/{name}": value for name, value in found.iou_per_class.items()}
    matches = [score.matches for score in scores if score.matches is not None]
    if matches:
        metrics["instance_f1"] = InstanceMatches(*np.sum(matches, axis=0).tolist()).f1
    return metrics


def _window_stride(section: SegmentSection, img_size: tuple[int, int]) -> tuple[int, int]:
    """Return the distance down and across from one window to the next."""
    height, width = img_size
    step = 1 - section.overlap
    return max(1, round(height * step)), max(1, round(width * step))


def _names(section: SegmentSection) -> tuple[str, ...]:
    names = INSTANCE_CLASSES if section.masks == "instances" else section.names
    assert names is not None, "the config checks it"
    return names


def _pixel_counts(
    shard: str, row: Sample | BrokenSample, *, section: SegmentSection, in_chans: int
) -> npt.NDArray[np.int64] | None:
    """Count the pixels of each class in a mask, and the ignored ones; None for a broken sample."""
    if isinstance(row, BrokenSample):
        return None
    where = f"{shard}: {row.key}"
    classes, _ = _decode_mask(section, target_of(row, TARGETS), where)
    shape = picture_shape(row, in_chans)
    if shape is not None:
        check_shape(shape, classes, where)
    num_classes = len(_names(section))
    return np.bincount(np.minimum(classes, num_classes).ravel(), minlength=num_classes + 1)


def _decode_mask(
    section: SegmentSection, data: bytes | None, where: str
) -> tuple[LabelMap, InstanceMap | None]:
    """Return the classes of a mask's pixels, and the instances if they are separated."""
    if section.masks == "instances":
        instances = decode_indices(data, where)
        return instances_to_classes(instances, section.boundary), instances
    values = MaskValues(section.values, section.ignore_value)
    num_classes = len(_names(section))
    try:
        return decode_label_map(data, where, num_classes=num_classes, values=values), None
    except DataError as error:
        if "but the classes are" not in str(error):
            raise
        raise DataError(
            f"{error}; segment.values lists the values of the classes in the masks, "
            "segment.ignore_value the one that is ignored"
        ) from error


def _tell_absent(section: SegmentSection, counts: npt.NDArray[np.int64]) -> None:
    """Report the classes that no training mask contains.

    Args:
        section: of the config.
        counts: pixels of each class, and of those ignored, in each mask.

    Raises:
        DataError: the masks hold one class alone: there is nothing to tell apart.
    """
    names, ignored = _names(section), counts[:, -1]
    pixels = counts[:, :-1].sum(axis=0)
    absent = [f"class {i} ({name})" for i, name in enumerate(names) if not pixels[i]]
    if not absent:
        return
    text = f"segment.names: {', '.join(absent[:10])} is in no mask of data.train"
    if ignored.any():
        share = 100 * ignored.sum() / counts.sum()
        value = section.ignore_value
        text += (
            f", and {value} (ignored) covers {share:.2g} % of it, in {np.count_nonzero(ignored)} "
            f"of {len(counts)} masks: are these masks of 0 and {value}? Then give segment.values="
            f"[0,{value}]"
        )
    if np.count_nonzero(pixels) < 2:
        raise DataError(f"{text}; there is nothing to tell apart")
    logger.warning("%s", text)


class _Truth(NamedTuple):
    classes: LabelMap
    instances: InstanceMap | None  # only if instances are separated


class Prediction(NamedTuple):
    counts: npt.NDArray[np.int64]  # as in _Score
    matches: InstanceMatches | None
    classes: LabelMap | None  # only for the first images, which are drawn
    place: tuple[int, int]


class SegmentTask:
    """See `pipelines.downstream.task.Task`."""

    def __init__(self, config: SegmentConfig, info: TaskInfo) -> None:
        self.config = config
        self.section = config.segment
        self.info = info

    def training_example(self, sample: EncodedSample, arm: Arm) -> Example[_Truth]:
        pixels, truth = self._decode(sample)
        view, classes = segmentation_view(
            pixels,
            truth.classes,
            sample_generator(arm.seed, sample.epoch, sample.key),
            size=self.info.model.img_size,
            fill=self.info.channel_mean,
            scale=self.section.scale,
            flip=self.section.flip,
        )
        return Example(view, _Truth(classes, None))

    def validation_example(self, sample: EncodedSample) -> Example[_Truth]:
        return Example(*self._decode(sample))

    def _decode(self, sample: EncodedSample) -> tuple[npt.NDArray[np.uint8], _Truth]:
        pixels = decode_image(sample.image, self.info.model.in_chans)
        classes, instances = _decode_mask(self.section, sample.target, sample.where)
        check_same_size(pixels, classes, sample.where)
        return pixels, _Truth(classes, instances)

    def build_model(self, encoder: Encoder, arm: Arm) -> nn.Module:
        return build_segmenter(
            encoder,
            num_classes=len(self.info.names),
            head=self.section.head,
            stride=self.section.stride,
            channels=self.section.channels,
            options=MapOptions(
                self.section.window, not arm.kind.trains_encoder, self.section.conditioning
            ),
        )

    def start(self, arm: Arm) -> ArmStart[_Truth] | None:
        return conditioning_start(self.section.conditioning, self._places)

    def _places(
        self, model: DenseModel, images: Tensor, examples: Sequence[Example[_Truth]], limit: int
    ) -> list[Tensor]:
        """Sample the map of a window, because a whole picture would have other positions."""
        return model.sampled_places(central_window(images, self.info.model.img_size), limit=limit)

    def build_optimizer(self, model: nn.Module, arm: Arm) -> torch.optim.Optimizer:
        return adamw(model, self.config.optim, arm)

    def peak_learning_rate(self, arm: Arm, base_lr: float) -> float:
        return self.config.optim.scaled(base_lr)

    def loss(self, model: nn.Module, batch: Batch[_Truth], arm: Arm) -> BatchLoss:
        hole = np.full(self.info.model.img_size, IGNORE, np.uint8)
        maps = [hole if target is None else target.classes for target in batch.targets]
        targets = torch.from_numpy(np.stack(maps)).long().to(batch.images.device)
        class_weights = None
        if self.section.class_weights is not None:
            class_weights = torch.tensor(self.section.class_weights, device=targets.device)
        loss = segmentation_loss(model(batch.images), targets, batch.weights, class_weights)
        return BatchLoss(loss, batch.weights.sum())

    def predict(
        self, model: nn.Module, images: Tensor, examples: Sequence[Example[_Truth]]
    ) -> list[Prediction]:
        crop = self.info.model.img_size
        stride = _window_stride(self.section, crop)
        logits = sliding_window_logits(model, images, crop=crop, stride=stride)
        maps = logits.argmax(dim=1).to(torch.uint8).cpu()
        return [
            self._prediction(classes, example)
            for classes, example in zip(maps, examples, strict=True)
        ]

    def _prediction(self, classes: Tensor, example: Example[_Truth]) -> Prediction:
        place = example.place or (0, 0)
        found = classes.numpy()
        score = _score(self.section, found, example.target)
        is_shown = place[0] == 0 and place[1] < NUM_PICTURES
        return Prediction(*score, found if is_shown else None, place)

    def evaluate(
        self,
        predictions: list[Prediction],
        arm: Arm,
        read: Callable[[tuple[int, int]], Example[_Truth]],
        training: list[Prediction],
    ) -> Evaluation:
        metrics = _metrics(predictions, self.info.names)
        if not metrics:
            raise ValueError("no pixel of data.val has a class: there is nothing to score")
        shown = [p for p in predictions if p.classes is not None]
        examples = [read(p.place) for p in shown]
        title = f"{self.info.title}, {arm.kind}: mIoU {metrics['miou']:.3f}"
        table = {"per_class.md": _per_class_table(metrics)}
        if not shown:
            return Evaluation(metrics, {}, table)
        picture = segmentation_picture(
            [example.pixels for example in examples],
            [example.target.classes for example in examples],
            [p.classes for p in shown if p.classes is not None],
            self.info.names,
            title,
        )
        return Evaluation(metrics, {"segmentation": picture}, table)


def _per_class_table(metrics: Mapping[str, float]) -> str:
    scores = {k.removeprefix("iou/"): x for k, x in metrics.items() if k.startswith("iou/")}
    rows = [f"| {name} | {value:.3f} |" for name, value in scores.items()]
    return "| class | IoU |\n|---|---|\n" + "\n".join(rows) + "\n"


def _summarize(
    config: SegmentConfig, info: TaskInfo, found: dict[Arm, dict[str, float]]
) -> Evaluation:
    """Write below the arms' results what the grid of the head's output allows."""
    text = arms_table(found)
    if info.ceiling:
        text += f"\nCeiling (an oracle on the grid of the head's output): {_shown(info.ceiling)}\n"
    return Evaluation({}, {}, {"summary.md": text})
