#!/usr/bin/env python
"""Train a detector on a pretrained encoder, and the same one from scratch.

    python pipelines/detect.py configs/detect/bccd.yaml init_from=CHECKPOINT

The same command goes on where it was stopped; a finished run is not trained again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import the package, not the files beside this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipelines.cli import main

    sys.exit(main(["detect", *sys.argv[1:]]))

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from mae_core.data.boxes import (
    Boxes,
    collect_categories,
    detection_view,
    fitted_view,
    parse_boxes,
)
from mae_core.data.decode import decode_image
from mae_core.data.manifest import Manifest
from mae_core.data.randomness import sample_generator
from mae_core.data.samples import DataError
from mae_core.evaluation.detection import (
    DetectionScores,
    best_f1_score,
    detection_picture,
    evaluate_detections,
    precision_recall_picture,
)
from mae_core.model.detector import (
    Detections,
    Detector,
    box_targets,
    build_detector,
)
from mae_core.model.feature_pyramid import MapEncoder
from mae_core.train_step import BatchLoss
from pipelines import downstream
from pipelines.config import ConfigError, StageResult
from pipelines.downstream import (
    LabelledData,
    Stage,
    adamw,
    arms_table,
    read_json_beside,
    read_targets,
)
from pipelines.downstream_config import DetectConfig, DownstreamConfig
from pipelines.task import Arm, Batch, EncodedSample, Evaluation, Example, TaskInfo

TARGETS = ("json",)
CATEGORIES_FILE = "categories.json"
NUM_PICTURES = 6


def run(config: DetectConfig, *, fresh: bool) -> StageResult:
    """Train and measure each arm; see `downstream.run`."""
    return downstream.run(config, Stage(TARGETS, _study, _make_task, _summarize), fresh=fresh)


def _study(
    config: DownstreamConfig, data: LabelledData
) -> tuple[tuple[str, ...], Sequence[Hashable]]:
    """Names of the categories; every box of both sets is looked at before any training."""
    train, val = (read_targets(manifest, TARGETS) for manifest in (data.train, data.val))
    categories = _categories(cast(DetectConfig, config), data.train, [x.data for x in train])
    if cast(DetectConfig, config).detect.categories is None:
        _check_names_agree(data.val, categories)
    if len(set(categories.values())) < len(categories):
        raise ConfigError(
            f"two categories have the same name: {', '.join(sorted(categories.values()))}; give "
            "detect.categories"
        )
    numbers = {identifier: label for label, identifier in enumerate(categories)}
    for where, target, is_broken in [*train, *val]:
        if not is_broken:
            parse_boxes(target, where, numbers)
    # The numbers go with the names: a worker has nothing else to read them from.
    names = tuple(f"{identifier}:{name}" for identifier, name in categories.items())
    return names, [0] * len(train)


def _check_names_agree(val: Manifest, categories: dict[int, str]) -> None:
    """Raises: DataError: data.val gives a number another name than data.train."""
    for number, name in _named_beside(val).items():
        ours = categories.get(number, name)
        if ours not in (name, str(number)):
            raise DataError(
                f"data.val names category {number} {name}, data.train {ours}: pack both from files "
                "with the same categories, or give detect.categories"
            )


def _categories(
    config: DetectConfig, train: Manifest, targets: Sequence[bytes | None]
) -> dict[int, str]:
    """category_id to name, by number."""
    given = config.detect.categories
    if given is None:
        given = dict.fromkeys(collect_categories(targets), "")
        given |= {x: name for x, name in _named_beside(train).items() if x in given}
        given = {number: name or str(number) for number, name in given.items()}
    if not given:
        raise ConfigError("data.train: no sample has a box; there is nothing to detect")
    return dict(sorted(given.items()))


def _named_beside(train: Manifest) -> dict[int, str]:
    """What categories.json beside the shards says: COCO's list of ids and names."""
    uri, listed = read_json_beside(train, CATEGORIES_FILE)
    try:
        return {int(item["id"]): str(item["name"]) for item in listed or ()}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f'{uri}: not a list of {{"id": 1, "name": "..."}} ({error})') from error


def _make_task(config: DownstreamConfig, info: TaskInfo) -> "DetectTask":
    return DetectTask(cast(DetectConfig, config), info)


class _Target(NamedTuple):
    boxes: Boxes  # in the example's pixels, or the original's for validation
    factor: float = 1.0  # from the original to the example


class Prediction(NamedTuple):
    found: Detections  # in the original's pixels, as is the truth
    truth: Boxes
    factor: float
    place: tuple[int, int]


class DetectTask:
    """See `pipelines.task.Task`."""

    def __init__(self, config: DetectConfig, info: TaskInfo) -> None:
        self.config = config
        self.section = config.detect
        self.info = info
        pairs = [name.split(":", 1) for name in info.names]
        self.numbers = {int(number): label for label, (number, _) in enumerate(pairs)}
        self.names = [name for _, name in pairs]

    def training_example(self, sample: EncodedSample, arm: Arm) -> Example:
        boxes = parse_boxes(sample.target, sample.where, self.numbers)
        pixels, boxes = detection_view(
            decode_image(sample.image, self.info.model.in_chans),
            boxes,
            sample_generator(arm.seed, sample.epoch, sample.key),
            size=self.info.model.img_size,
            scale=self.section.scale,
            flip=self.section.flip,
        )
        return Example(np.ascontiguousarray(pixels), _Target(boxes))

    def validation_example(self, sample: EncodedSample) -> Example:
        boxes = parse_boxes(sample.target, sample.where, self.numbers)
        original = decode_image(sample.image, self.info.model.in_chans)
        pixels, factor = fitted_view(original, self.info.model.img_size)
        return Example(pixels, _Target(boxes, factor))

    def build_model(self, encoder: nn.Module, arm: Arm) -> nn.Module:
        section = self.section
        return build_detector(
            cast(MapEncoder, encoder),
            num_classes=len(self.names),
            head=section.head,
            img_size=self.info.model.img_size,
            strides=section.strides,
            channels=section.channels,
            num_convs=section.num_convs,
            window=section.window,
            frozen=arm.name == "frozen",
        )

    def build_optimizer(self, model: nn.Module, arm: Arm) -> torch.optim.Optimizer:
        return adamw(model, self.config.optim, arm)

    def peak_learning_rate(self, arm: Arm) -> float:
        return self.config.optim.learning_rate

    def loss(self, model: nn.Module, batch: Batch, arm: Arm) -> BatchLoss:
        there = [i for i, target in enumerate(batch.targets) if target is not None]
        if not there:  # every worker has to take part: a blank image, that counts nothing
            blank = box_targets(_no_boxes(), batch.images.device)
            losses = model(batch.images[:1], [blank])
            return BatchLoss(0.0 * torch.stack(list(losses.values())).sum(), batch.weights.sum())
        boxes = [box_targets(batch.targets[i].boxes, batch.images.device) for i in there]
        losses = model(batch.images[there], boxes)
        total = torch.stack(list(losses.values())).sum()
        return BatchLoss(total * batch.weights.mean(), batch.weights.sum())

    def predict(
        self, model: nn.Module, images: Tensor, examples: Sequence[Example]
    ) -> list[Prediction]:
        predictions = []
        for found, example in zip(cast(Detector, model).detect(images), examples, strict=True):
            boxes, factor = example.target
            there = Detections(found.boxes.cpu() / factor, found.scores.cpu(), found.labels.cpu())
            predictions.append(Prediction(there, boxes, factor, example.place or (0, 0)))
        return predictions

    def evaluate(
        self,
        predictions: list[Prediction],
        arm: Arm,
        read: Callable[[tuple[int, int]], Example],
        training: list[Prediction],
    ) -> Evaluation:
        truths = [p.truth for p in predictions]
        scores = evaluate_detections([p.found for p in predictions], truths, self.names)
        metrics = {"ap": scores.ap, "ap50": scores.ap50, "ap75": scores.ap75}
        named = {f"ap/{name}": x for name, x in scores.ap_per_class.items() if not np.isnan(x)}
        title = f"{self.info.title}, {arm.name}: AP {scores.ap:.3f}, AP50 {scores.ap50:.3f}"
        spread = np.linspace(0, len(predictions) - 1, min(NUM_PICTURES, len(predictions)))
        shown = [predictions[int(i)] for i in spread]
        pictures = {
            "detections": detection_picture(
                [read(p.place).pixels for p in shown],
                [p.truth._replace(xyxy=p.truth.xyxy * np.float32(p.factor)) for p in shown],
                [p.found._replace(boxes=p.found.boxes * p.factor) for p in shown],
                self.names,
                title,
                min_score=best_f1_score([p.found for p in predictions], truths),
            ),
            "precision_recall": precision_recall_picture(scores, title),
        }
        return Evaluation(metrics | named, pictures, {"per_class.md": _per_class_table(scores)})


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
    config: DownstreamConfig, info: TaskInfo, found: dict[Arm, dict[str, float]]
) -> Evaluation:
    return Evaluation({}, {}, {"summary.md": arms_table(found)})
