#!/usr/bin/env python
"""Classify with a pretrained encoder: nearest neighbours, linear probe, fine-tuning, from scratch.

    python pipelines/classify.py configs/classify/cifar10.yaml init_from=CHECKPOINT

If it was stopped, the same command resumes; a finished run is not trained again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import the package, not the files beside this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipelines.cli import main

    sys.exit(main(["classify", *sys.argv[1:]]))

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_core.checkpoint_manifest import CheckpointManifest
from mae_core.data.augment import rand_augment, random_erase
from mae_core.data.class_labels import (
    RawLabel,
    class_indices,
    names_of,
    one_class,
    read_labels,
)
from mae_core.data.decode import decode_image
from mae_core.data.label_budget import LabelBudget
from mae_core.data.manifest import Manifest
from mae_core.data.mixing import mix_batch, soft_targets
from mae_core.data.randomness import named_generator
from mae_core.data.samples import DataError
from mae_core.data.transforms import center_crop
from mae_core.data.views import ViewSpec, training_view
from mae_core.evaluation.attention_picture import attention_picture
from mae_core.evaluation.classification import encode_features, knn_accuracy
from mae_core.evaluation.classifier_report import (
    ClassificationScores,
    confusion_picture,
    label_fraction_picture,
    markdown_table,
    most_wrong_picture,
    reliability_picture,
    roc_picture,
    score_classification,
    score_multilabel,
)
from mae_core.evaluation.linear_probe import fit_linear_probe
from mae_core.model.classifier import Classifier, build_classifier
from mae_core.model.family import Encoder
from mae_core.optim import build_lars
from mae_core.train_step import BatchLoss
from pipelines.config.arms import ArmKind
from pipelines.config.downstream import ClassifyConfig, ClassifySection
from pipelines.downstream import run as downstream
from pipelines.downstream.arms import Arm
from pipelines.downstream.run import LabelledData, Study, TaskKind, adamw
from pipelines.downstream.targets import read_targets, warn_of_absent
from pipelines.downstream.task import (
    ArmStart,
    Batch,
    EncodedSample,
    Evaluation,
    Example,
    FitInput,
    TaskInfo,
)
from pipelines.outcome import ConfigError, StageResult
from pipelines.reading.class_names import (
    CLASSES_FILE,
    Classes,
    classes_by_name,
    folder_of,
    read_class_names,
    united_names,
    warn_of_unnamed,
)

MOST_WRONG = 16
NUM_ATTENDED = 8  # number of images whose attention weights are drawn
_HEADS: dict[ArmKind, Literal["linear", "attentive"]] = {
    ArmKind.LINEAR: "linear",
    ArmKind.ATTENTIVE: "attentive",
}
MAX_START_IMAGES = 5000
# Smallest spread of a feature that the head's start uses, relative to the median of all spreads.
SMALLEST_SPREAD = 1e-3


def run(config: ClassifyConfig, *, fresh: bool) -> StageResult:
    """Train and measure each arm; see `downstream.run`."""
    targets = ("cls",) if config.classify.label_key is None else ("json",)
    kind = TaskKind(targets, _study, ClassifyTask, _summarize)
    return downstream.run(config, kind, fresh=fresh)


def _study(config: ClassifyConfig, data: LabelledData, _encoder: CheckpointManifest) -> Study:
    """Return the class names, and the class or classes of each training sample."""
    section = config.classify
    train, val = (_raw_labels(section, manifest) for manifest in (data.train, data.val))
    names, numbers = _classes(section, data, train)
    if len(names) < 2:
        raise ConfigError(f"data.train has one class, {', '.join(names)}: nothing to tell apart")
    strata: list[Hashable] = []
    counts: Counter[int] = Counter()
    for i, sample in enumerate([*train, *val]):
        indices = class_indices(sample.labels, sample.where, names, numbers.get(sample.folder))
        if section.labels == "one" and not sample.is_broken:
            one_class(indices, sample.where)
        strata.append(indices)
        counts.update(indices if i < len(train) else ())
    key = "data.train" if section.names is None else "classify.names"
    warn_of_absent(key, names, counts)
    return Study(names, strata[: len(train)], numbers)


class _RawLabels(NamedTuple):
    folder: str
    where: str
    labels: tuple[RawLabel, ...]
    is_broken: bool


def _raw_labels(section: ClassifySection, manifest: Manifest) -> list[_RawLabels]:
    extensions = ("cls",) if section.label_key is None else ("json",)
    found = []
    for shard, where, data, is_broken in read_targets(manifest, extensions):
        labels = () if is_broken else read_labels(data, where, key=section.label_key)
        found.append(_RawLabels(folder_of(shard), where, labels, is_broken))
    return found


def _classes(section: ClassifySection, data: LabelledData, train: Sequence[_RawLabels]) -> Classes:
    """Return the run's classes, by their names if the sets name their numbers.

    Raises:
        DataError: data.val names its classes and data.train does not.
    """
    ours, theirs = read_class_names(data.train.shards), read_class_names(data.val.shards)
    warn_of_unnamed(ours | theirs)
    given = section.names
    if given is None and not any(ours.values()):
        given = names_of([sample.labels for sample in train])
        if unknown := [name for name in united_names(theirs) if name not in given]:
            raise DataError(
                f"data.val names its classes {', '.join(unknown[:10])}; data.train only knows "
                f"{', '.join(given[:10])}: put a {CLASSES_FILE} beside the shards of data.train, "
                "or give classify.names"
            )
    return classes_by_name(ours, theirs, given)


Label = npt.NDArray[np.int64]  # () a class, or (K,) 0 and 1 for each finding


class Prediction(NamedTuple):
    values: npt.NDArray[np.float32]  # logits (K,), or features (D,) where nothing is trained
    label: Label
    place: tuple[int, int]
    attention: npt.NDArray[np.float32] | None = None  # (h, w), of some images of an attentive probe


class ClassifyTask:
    """See `pipelines.downstream.task.Task`."""

    def __init__(self, config: ClassifyConfig, info: TaskInfo) -> None:
        self.config = config
        self.section = config.classify
        self.info = info

    def training_example(self, sample: EncodedSample, arm: Arm) -> Example[Label]:
        section, model = self.section, self.info.model
        label = self._label(sample)
        spec = ViewSpec(arm.seed, model.in_chans, model.img_size, section.crop_scale, section.flip)
        pixels = training_view(sample.image, sample.epoch, sample.key, spec)
        if arm.kind.trains_encoder and section.rand_augment > 0:
            generator = named_generator(arm.seed, "augment", sample.epoch, sample.key)
            pixels = rand_augment(pixels, generator, magnitude=section.rand_augment)
        return Example(pixels, label)

    def validation_example(self, sample: EncodedSample) -> Example[Label]:
        label = self._label(sample)
        pixels = decode_image(sample.image, self.info.model.in_chans)
        size, share = self.info.model.img_size, self.section.eval_crop
        return Example(center_crop(pixels, size, share), label)

    def _label(self, sample: EncodedSample) -> Label:
        names = self.info.names
        raw = read_labels(sample.target, sample.where, key=self.section.label_key)
        indices = class_indices(raw, sample.where, names, self.info.numbers.get(sample.folder))
        if self.section.labels == "one":
            return np.asarray(one_class(indices, sample.where))
        label = np.zeros(len(names), np.int64)
        label[list(indices)] = 1
        return label

    def build_model(self, encoder: Encoder, arm: Arm) -> nn.Module:
        if not self.section.takes_steps(arm.kind):
            return encoder
        blocks = self.section.trainable_blocks
        return build_classifier(
            encoder,
            num_classes=len(self.info.names),
            kind=_HEADS.get(arm.kind, "finetune"),
            pool=self.section.pool,
            trainable_blocks=blocks if arm.kind is ArmKind.FINETUNE else None,
        )

    def start(self, arm: Arm) -> ArmStart[Label] | None:
        """Fit the head as a logistic regression; the linear probe keeps the paper's recipe."""
        if self.section.head_start == "zero" or arm.kind is ArmKind.LINEAR:
            return None
        return ArmStart(MAX_START_IMAGES, _fit_inputs, partial(self._fit_head, seed=arm.seed))

    def _fit_head(self, model: nn.Module, inputs: list[FitInput], *, seed: int) -> None:
        assert isinstance(model, Classifier)
        features = torch.from_numpy(np.stack([x.values for x in inputs]))
        labels = torch.from_numpy(np.stack([x.label for x in inputs if x.label is not None]))
        std = features.std(dim=0, correction=0)
        # A feature that hardly varies is left out, because standardising it would amplify noise.
        features = features * (std > SMALLEST_SPREAD * std.median())
        # The probabilities must be right, because training would first have to unlearn an
        # overconfident head.
        num_classes = len(self.info.names)
        probe = fit_linear_probe(features, labels, num_classes=num_classes, seed=seed)
        model.start_from(**probe._asdict())

    def build_optimizer(self, model: nn.Module, arm: Arm) -> torch.optim.Optimizer:
        if arm.kind is ArmKind.LINEAR:
            learning_rate = self.config.optim.scaled(self.section.linear_base_lr)
            return build_lars(model, learning_rate=learning_rate)
        return adamw(model, self.config.optim, arm)

    def peak_learning_rate(self, arm: Arm, base_lr: float) -> float:
        is_linear = arm.kind is ArmKind.LINEAR
        return self.config.optim.scaled(self.section.linear_base_lr if is_linear else base_lr)

    def loss(self, model: nn.Module, batch: Batch[Label], arm: Arm) -> BatchLoss:
        images, targets = self.augmented(batch, arm)
        logits = model(images).float()
        if self.section.labels == "many":
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        else:
            losses = -(targets * logits.log_softmax(dim=1)).sum(dim=1)
        loss = (losses * batch.weights).sum() / len(batch.weights)
        return BatchLoss(loss, batch.weights.sum())

    def augmented(self, batch: Batch[Label], arm: Arm) -> tuple[Tensor, Tensor]:
        """Return images and (B, K) targets, which are erased and mixed if the arm is fine-tuned.

        An image is mixed with its neighbour in the global batch. The random draws belong to the
        pair, so splitting the batch into micro batches of an even size changes nothing.
        """
        section, is_tuned = self.section, arm.kind.trains_encoder
        images, device = batch.images, batch.images.device
        if section.labels == "many":
            empty = np.zeros(len(self.info.names), np.int64)
            rows = [empty if target is None else target for target in batch.targets]
            targets = torch.from_numpy(np.stack(rows)).float().to(device)
        else:
            labels = [0 if target is None else int(target) for target in batch.targets]
            smoothing = section.smoothing if is_tuned else 0.0
            targets = soft_targets(
                torch.tensor(labels, device=device), len(self.info.names), smoothing
            )
        # A hole that is mixed into an image has no class.
        targets = targets * batch.weights[:, None]
        if is_tuned and section.random_erase > 0:
            erased = [
                random_erase(
                    image,
                    named_generator(arm.seed, "erase", batch.step, place),
                    probability=section.random_erase,
                )
                for place, image in enumerate(images, batch.first)
            ]
            images = torch.stack(erased)
        if is_tuned and section.mixes:
            mixed = [
                mix_batch(
                    images[i : i + 2],
                    targets[i : i + 2],
                    named_generator(arm.seed, "mix", batch.step, batch.first + i),
                    mixup_alpha=section.mixup,
                    cutmix_alpha=section.cutmix,
                )
                for i in range(0, len(images), 2)
            ]
            pairs, shares = zip(*mixed, strict=True)
            images, targets = torch.cat(pairs), torch.cat(shares)
        return images, targets

    def predict(
        self, model: nn.Module, images: Tensor, examples: Sequence[Example[Label]]
    ) -> list[Prediction]:
        if not isinstance(model, Classifier):
            values = encode_features(model, images, pool=self.section.pool)
            return _with_labels(values, examples)
        predictions = _with_labels(model(images), examples)
        if model.query is not None and any(_is_attended(p.place) for p in predictions):
            maps = model.attention(images).float().cpu().numpy()
            return [
                p._replace(attention=weights if _is_attended(p.place) else None)
                for p, weights in zip(predictions, maps, strict=True)
            ]
        return predictions

    def evaluate(
        self,
        predictions: list[Prediction],
        arm: Arm,
        read: Callable[[tuple[int, int]], Example[Label]],
        training: list[Prediction],
    ) -> Evaluation:
        values = torch.from_numpy(np.stack([p.values for p in predictions]))
        labels = torch.from_numpy(np.stack([p.label for p in predictions]))
        if not self.section.takes_steps(arm.kind):
            bank = torch.from_numpy(np.stack([p.values for p in training]))
            bank_labels = torch.from_numpy(np.stack([p.label for p in training]))
            if arm.kind is ArmKind.KNN:
                k = min(self.section.k, len(bank))
                top1 = knn_accuracy(bank, bank_labels, values, labels, k=k)
                return Evaluation({"top1": top1}, {}, {})
            num_classes = len(self.info.names)
            probe = fit_linear_probe(bank, bank_labels, num_classes=num_classes, seed=arm.seed)
            values = probe.logits(values)
        if self.section.labels == "many":
            evaluation = self._evaluate_many(values, labels, arm)
        else:
            evaluation = self._evaluate_one(predictions, values, labels, arm, read)
        if shown := [p for p in predictions if p.attention is not None]:
            evaluation.pictures["attention"] = attention_picture(
                [read(p.place).pixels for p in shown],
                [p.attention for p in shown if p.attention is not None],
                f"{self._title(arm)}: what it looks at",
            )
        return evaluation

    def _evaluate_one(
        self,
        predictions: list[Prediction],
        logits: Tensor,
        labels: Tensor,
        arm: Arm,
        read: Callable[[tuple[int, int]], Example[Label]],
    ) -> Evaluation:
        names, title = self.info.names, self._title(arm)
        scores = score_classification(logits, labels, names)
        metrics = {"top1": scores.top1, "ece": scores.ece}
        if scores.top5 is not None:
            metrics["top5"] = scores.top5
        pictures = {}
        if arm.seed == self.section.seeds[0]:
            chances = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
            worst = chances.argsort()[:MOST_WRONG].tolist()
            pictures = {
                "confusion": confusion_picture(scores, f"{title}: top-1 {scores.top1:.3f}"),
                "calibration": reliability_picture(scores, f"{title}: ECE {scores.ece:.3f}"),
                "most_wrong": most_wrong_picture(
                    [read(predictions[i].place).pixels for i in worst],
                    logits[worst],
                    labels[worst],
                    names,
                    f"{title}: the most wrong of {len(labels)}",
                ),
            }
        return Evaluation(metrics, pictures, {"per_class.md": _per_class_table(scores)})

    def _evaluate_many(self, logits: Tensor, labels: Tensor, arm: Arm) -> Evaluation:
        names, title = self.info.names, self._title(arm)
        scores = score_multilabel(logits, labels, names)
        metrics = {
            "auroc": scores.macro_auroc,
            "average_precision": scores.macro_average_precision,
            **{f"auroc/{name}": value for name, value in scores.auroc.items()},
        }
        rows = [
            f"| {x} | {auroc:.3f} | {scores.average_precision[x]:.3f} | {scores.support[x]} |"
            for x, auroc in scores.auroc.items()
        ]
        rows += [f"| {x} | all or none have it | | {scores.support[x]} |" for x in scores.left_out]
        head = "| finding | AUROC | average precision | images with it |\n|---|---|---|---|\n"
        pictures = {}
        if arm.seed == self.section.seeds[0]:
            pictures = {"roc": roc_picture(logits, labels, names, title)}
        return Evaluation(metrics, pictures, {"per_finding.md": head + "\n".join(rows) + "\n"})

    def _title(self, arm: Arm) -> str:
        share = "" if arm.budget.is_all else f", {arm.budget.phrase}"
        return f"{self.info.title}, {arm.kind}{share}"


def _is_attended(place: tuple[int, int]) -> bool:
    return place[0] == 0 and place[1] < NUM_ATTENDED


def _fit_inputs(
    model: nn.Module, images: Tensor, examples: Sequence[Example[Label]]
) -> list[FitInput]:
    assert isinstance(model, Classifier)
    features = model.features(images).float().cpu().numpy()
    return [FitInput(row, x.target) for row, x in zip(features, examples, strict=True)]


def _with_labels(values: Tensor, examples: Sequence[Example[Label]]) -> list[Prediction]:
    return [
        Prediction(row, example.target, example.place or (0, 0))
        for row, example in zip(values.float().cpu().numpy(), examples, strict=True)
    ]


def _per_class_table(scores: ClassificationScores) -> str:
    lines = ["| class | precision | recall | F1 | images |", "|---|---|---|---|---|"]
    for name, row in scores.per_class.items():
        cells = " | ".join(_cell(score) for score in (row.precision, row.recall, row.f1))
        lines.append(f"| {name} | {cells} | {row.support} |")
    return "\n".join(lines) + "\n"


def _cell(score: float) -> str:
    """Write a score, or a dash where there was nothing to score."""
    return "-" if math.isnan(score) else f"{score:.3f}"


def _summarize(
    config: ClassifyConfig, info: TaskInfo, found: dict[Arm, dict[str, float]]
) -> Evaluation:
    """Make the table of all arms, and the figure if there are several label budgets."""
    metric = config.classify.metric
    grouped: dict[tuple[ArmKind, LabelBudget], list[float]] = {}
    for arm, metrics in found.items():
        if metric in metrics:
            grouped.setdefault((arm.kind, arm.budget), []).append(metrics[metric])
    rows = [(str(kind), budget, values) for (kind, budget), values in grouped.items()]
    shown = {"top1": "top-1 accuracy", "auroc": "mean AUROC"}[metric]
    pictures = {}
    if rows and len(config.classify.label_budgets) > 1:
        title = f"{info.title}: {shown}"
        pictures["label_fraction"] = label_fraction_picture(rows, title, metric=shown)
    return Evaluation({}, pictures, {"summary.md": f"{shown}\n\n{markdown_table(rows)}"})
