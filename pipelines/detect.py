#!/usr/bin/env python
"""Train a detector on a pretrained encoder, and the same one from scratch.

    python pipelines/detect.py configs/detect/bccd.yaml init_from=CHECKPOINT

If it was stopped, the same command resumes; a finished run is not trained again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import the package, not the files beside this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipelines.cli import main

    sys.exit(main(["detect", *sys.argv[1:]]))

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mae_core.checkpoint_manifest import CheckpointManifest
from mae_core.data.boxes import (
    Boxes,
    collect_categories,
    detection_view,
    fitted_view,
    parse_boxes,
)
from mae_core.data.decode import decode_image
from mae_core.data.randomness import sample_generator
from mae_core.data.samples import Sample
from mae_core.evaluation.detection import (
    DetectionScores,
    best_f1_score,
    detection_picture,
    evaluate_detections,
    precision_recall_picture,
)
from mae_core.model.dense import DenseModel, MapOptions
from mae_core.model.detector import (
    Detections,
    Detector,
    box_targets,
    build_detector,
)
from mae_core.model.family import Encoder
from mae_core.train_step import BatchLoss
from pipelines.config.downstream import DetectConfig, DetectSection
from pipelines.downstream import run as downstream
from pipelines.downstream.arms import Arm, arms_table
from pipelines.downstream.conditioned_map import conditioning_start
from pipelines.downstream.run import LabelledData, Study, TaskKind, adamw
from pipelines.downstream.targets import map_samples, picture_shape, warn_of_absent
from pipelines.downstream.task import (
    ArmStart,
    Batch,
    EncodedSample,
    Evaluation,
    Example,
    TaskInfo,
)
from pipelines.outcome import ConfigError, StageResult
from pipelines.reading.class_names import folder_of, folders_of, read_category_names
from pipelines.reading.shards import BrokenSample, target_of

TARGETS = ("json",)
NUM_PICTURES = 6


def run(config: DetectConfig, *, fresh: bool) -> StageResult:
    """Train and measure each arm; see `downstream.run`."""
    kind = TaskKind(TARGETS, _study, DetectTask, _summarize)
    return downstream.run(config, kind, fresh=fresh)


def _study(config: DetectConfig, data: LabelledData, encoder: CheckpointManifest) -> Study:
    """Return the names of the categories; check every box of both sets before any training."""
    section = config.detect
    train, val = (
        list(map_samples(manifest, partial(_look, in_chans=encoder.model.in_chans)))
        for manifest in (data.train, data.val)
    )
    categories = _categories(section, train)
    if len(set(categories.names)) < len(categories.names):
        raise ConfigError(
            f"two categories have the same name: {', '.join(sorted(categories.names))}; give "
            "detect.categories"
        )
    folders = folders_of([*data.train.shards, *data.val.shards])
    numbers = {folder: categories.numbers_of(read_category_names(folder)) for folder in folders}
    counts: Counter[int] = Counter()
    for i, sample in enumerate([*train, *val]):
        if sample.is_broken:
            continue
        boxes = parse_boxes(
            sample.data, sample.where, numbers[sample.folder], picture=sample.picture
        )
        counts.update(set(boxes.labels.tolist()) if i < len(train) else ())
    key = "data.train" if section.categories is None else "detect.categories"
    warn_of_absent(key, categories.names, counts)
    return Study(categories.names, [0] * len(train), numbers, categories.identifiers)


class _Look(NamedTuple):
    """What is known about a sample before any training."""

    folder: str
    where: str
    data: bytes | None  # of the boxes
    is_broken: bool
    picture: tuple[int, ...] | None  # height and width; None where the image can't be decoded


def _look(shard: str, row: Sample | BrokenSample, *, in_chans: int) -> _Look:
    return _Look(
        folder_of(shard),
        f"{shard}: {row.key}",
        target_of(row, TARGETS),
        isinstance(row, BrokenSample),
        picture_shape(row, in_chans),
    )


class _Categories(NamedTuple):
    """The classes of a run of detection, in the order of their labels."""

    identifiers: tuple[int, ...]  # category_id; if sets differ, that of the first set
    names: tuple[str, ...]

    def numbers_of(self, named: Mapping[int, str]) -> dict[int, int]:
        """Map a folder's category_ids to labels, by name if the folder has any of our names."""
        labels = {name: label for label, name in enumerate(self.names)}
        by_number = {number: label for label, number in enumerate(self.identifiers)}
        if not set(labels) & set(named.values()):
            return by_number
        unnamed = {n: x for n, x in by_number.items() if self.names[x] == str(n) and n not in named}
        return unnamed | {number: labels[name] for number, name in named.items() if name in labels}


def _categories(section: DetectSection, train: Sequence[_Look]) -> _Categories:
    """Return the categories that the config lists, or otherwise those of the training samples."""
    if section.categories:
        given = dict(sorted(section.categories.items()))
        return _Categories(tuple(given), tuple(given.values()))
    identifiers: dict[str, int] = {}  # by name
    for folder in dict.fromkeys(sample.folder for sample in train):
        named = read_category_names(folder)
        found = sorted(collect_categories(x.data for x in train if x.folder == folder))
        names = [named.get(number, str(number)) for number in found]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"{folder}: two categories have the same name: {', '.join(sorted(names))}; give "
                "detect.categories"
            )
        for number, name in zip(found, names, strict=True):
            # A number that another set uses already can't be used for this name.
            free = max([-1, *identifiers.values()]) + 1
            taken = number in identifiers.values()
            identifiers.setdefault(name, free if taken else number)
    if not identifiers:
        raise ConfigError("data.train: no sample has a box; there is nothing to detect")
    ordered = sorted(identifiers.items(), key=lambda item: item[1])
    return _Categories(tuple(x for _, x in ordered), tuple(name for name, _ in ordered))


class _Wanted(NamedTuple):
    """What the loss of a training example depends on."""

    boxes: Boxes  # in the example's pixels
    part: tuple[int, int]  # height and width of the picture in the example
    seed: int


class _Truth(NamedTuple):
    boxes: Boxes  # in the original's pixels
    part: tuple[int, int]
    scale: tuple[float, float]  # from x and y in the original to x and y in the example


class Prediction(NamedTuple):
    found: Detections  # in the original's pixels, as is the truth
    truth: Boxes
    scale: tuple[float, float]
    place: tuple[int, int]


class DetectTask:
    """See `pipelines.downstream.task.Task`."""

    def __init__(self, config: DetectConfig, info: TaskInfo) -> None:
        self.config = config
        self.section = config.detect
        self.info = info
        self.numbers = {number: label for label, number in enumerate(info.identifiers)}
        self.names = info.names

    def training_example(self, sample: EncodedSample, arm: Arm) -> Example[_Wanted]:
        original = decode_image(sample.image, self.info.model.in_chans)
        generator = sample_generator(arm.seed, sample.epoch, sample.key)
        view, boxes = detection_view(
            original,
            self._boxes(sample, original.shape),
            generator,
            size=self.info.model.img_size,
            fill=self.info.channel_mean,
            scale=self.section.scale,
            flip=self.section.flip,
        )
        return Example(view.pixels, _Wanted(boxes, view.part, int(generator.integers(2**31))))

    def validation_example(self, sample: EncodedSample) -> Example[_Truth]:
        original = decode_image(sample.image, self.info.model.in_chans)
        boxes = self._boxes(sample, original.shape)
        view = fitted_view(original, self.info.model.img_size, self.info.channel_mean)
        return Example(view.pixels, _Truth(boxes, view.part, view.scale))

    def _boxes(self, sample: EncodedSample, picture: tuple[int, ...]) -> Boxes:
        numbers = self.info.numbers.get(sample.folder, self.numbers)
        return parse_boxes(sample.target, sample.where, numbers, picture=picture)

    def build_model(self, encoder: Encoder, arm: Arm) -> nn.Module:
        section = self.section
        return build_detector(
            encoder,
            num_classes=len(self.names),
            head=section.head,
            img_size=self.info.model.img_size,
            strides=section.strides,
            channels=section.channels,
            num_convs=section.num_convs,
            options=MapOptions(section.window, not arm.kind.trains_encoder, section.conditioning),
        )

    def start(self, arm: Arm) -> ArmStart[_Truth] | None:
        return conditioning_start(self.section.conditioning, _places)

    def build_optimizer(self, model: nn.Module, arm: Arm) -> torch.optim.Optimizer:
        return adamw(model, self.config.optim, arm)

    def peak_learning_rate(self, arm: Arm, base_lr: float) -> float:
        return self.config.optim.scaled(base_lr)

    def loss(self, model: nn.Module, batch: Batch[_Wanted], arm: Arm) -> BatchLoss:
        there = {i: target for i, target in enumerate(batch.targets) if target is not None}
        # The loss is a mean over the places that the detector counts, so a hole leaves no gap in
        # it.
        num_samples = torch.ones_like(batch.weights).sum()
        # Every worker must take part, so a blank image that counts nothing is passed on.
        if not there:
            sums, divisor = model(batch.images[:1], [box_targets(_no_boxes(), batch.images.device)])
            blank = torch.stack(list(sums.values())).sum()
            return BatchLoss(0.0 * blank, num_samples, 0.0 * divisor)
        targets = [
            box_targets(w.boxes, batch.images.device, picture=w.part, seed=w.seed)
            for w in there.values()
        ]
        sums, divisor = model(batch.images[list(there)], targets)
        return BatchLoss(torch.stack(list(sums.values())).sum(), num_samples, divisor)

    def predict(
        self, model: nn.Module, images: Tensor, examples: Sequence[Example[_Truth]]
    ) -> list[Prediction]:
        assert isinstance(model, Detector)
        parts = [example.target.part for example in examples]
        predictions = []
        for found, example in zip(model.detect(images, parts), examples, strict=True):
            truth = example.target
            boxes = found.boxes.cpu() / torch.tensor(truth.scale * 2)
            there = Detections(boxes, found.scores.cpu(), found.labels.cpu())
            place = example.place or (0, 0)
            predictions.append(Prediction(there, truth.boxes, truth.scale, place))
        return predictions

    def evaluate(
        self,
        predictions: list[Prediction],
        arm: Arm,
        read: Callable[[tuple[int, int]], Example[_Truth]],
        training: list[Prediction],
    ) -> Evaluation:
        truths = [p.truth for p in predictions]
        scores = evaluate_detections([p.found for p in predictions], truths, self.names)
        metrics = {"ap": scores.ap, "ap50": scores.ap50, "ap75": scores.ap75}
        named = {f"ap/{name}": x for name, x in scores.ap_per_class.items() if not np.isnan(x)}
        title = f"{self.info.title}, {arm.kind}: AP {scores.ap:.3f}, AP50 {scores.ap50:.3f}"
        spread = np.linspace(0, len(predictions) - 1, min(NUM_PICTURES, len(predictions)))
        shown = [predictions[int(i)] for i in spread]
        pictures = {
            "detections": detection_picture(
                [read(p.place).pixels for p in shown],
                [
                    p.truth._replace(xyxy=p.truth.xyxy * np.asarray(p.scale * 2, np.float32))
                    for p in shown
                ],
                [p.found._replace(boxes=p.found.boxes * torch.tensor(p.scale * 2)) for p in shown],
                self.names,
                title,
                min_score=best_f1_score([p.found for p in predictions], truths),
            ),
            "precision_recall": precision_recall_picture(scores, title),
        }
        return Evaluation(metrics | named, pictures, {"per_class.md": _per_class_table(scores)})


def _places(
    model: DenseModel, images: Tensor, examples: Sequence[Example[_Truth]], limit: int
) -> list[Tensor]:
    return model.sampled_places(images, [example.target.part for example in examples], limit=limit)


def _no_boxes() -> Boxes:
    return Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_))


def _per_class_table(scores: DetectionScores) -> str:
    rows = [
        f"| {name} | {ap:.3f} | {scores.curves[name].ap50:.3f} |"
        for name, ap in scores.ap_per_class.items()
        if name in scores.curves
    ]
    return "| class | AP | AP50 |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _summarize(
    config: DetectConfig, info: TaskInfo, found: dict[Arm, dict[str, float]]
) -> Evaluation:
    return Evaluation({}, {}, {"summary.md": arms_table(found)})
