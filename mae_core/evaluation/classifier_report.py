"""Report a classifier's performance in numbers and in pictures.

Logits are (N, K), one row per image. Shares and probabilities are in 0..1. An undefined value,
such as the recall of a class without images, is NaN and not 0. Pictures are (height, width, 3) RGB.
"""

import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator, PercentFormatter
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_roc,
    multiclass_accuracy,
    multiclass_confusion_matrix,
)

from mae_core.data.label_budget import LabelBudget

Picture = npt.NDArray[np.uint8]
AnyPixels = npt.NDArray[np.unsignedinteger[Any]]
BudgetRow = tuple[str, LabelBudget, Sequence[float]]  # arm, labels, the metric by seed

_NUM_BINS = 15  # Guo et al. 2017, section 4
_MAX_NAMED_CLASSES = 40  # with more classes, axes show some of the class numbers
_MAX_COUNTED_CLASSES = 20  # with more classes, cells have no room for a number
_MAX_LEGEND = 20
_ARM_SPACING = 1.025  # factor between the points of two arms
_TOP = 5


class ClassScore(NamedTuple):
    precision: float  # NaN if no image was predicted as this class
    recall: float  # NaN if no image has this class
    f1: float  # NaN if both are NaN
    support: int  # number of images of this class


class ReliabilityBin(NamedTuple):
    """The images whose predicted class has a probability in [lower, upper)."""

    lower: float
    upper: float
    num_images: int
    confidence: float  # mean probability of the predicted class; NaN if there is no image
    accuracy: float  # NaN if there is no image


@dataclass(frozen=True, eq=False)
class ClassificationScores:
    top1: float
    top5: float | None  # None for 5 classes or fewer
    per_class: dict[str, ClassScore]
    confusion: npt.NDArray[np.int64]  # (K, K): rows are true classes, columns predicted ones
    ece: float  # expected calibration error: |accuracy - confidence| over the bins, by count
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class MultiLabelScores:
    """Scores of each finding; one that all images or none have has none and is left out."""

    auroc: dict[str, float]
    average_precision: dict[str, float]
    support: dict[str, int]  # number of images with each finding, including those left out
    left_out: tuple[str, ...]
    macro_auroc: float  # NaN if all findings are left out
    macro_average_precision: float


def score_classification(
    logits: Float[Tensor, "N K"], labels: Int[Tensor, " N"], names: Sequence[str]
) -> ClassificationScores:
    """Score predictions with one label per image.

    Calibration: Guo et al. 2017, https://arxiv.org/abs/1706.04599, with 15 bins of equal width.

    Args:
        logits: Values before the softmax.
        labels: Class indices from 0.
        names: Names of the K classes, all different.
    """
    logits, labels = logits.detach().float().cpu(), labels.cpu().long()
    _check_logits(logits, names)
    num_classes = len(names)
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels are {tuple(labels.shape)}, not ({len(logits)},)")
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise ValueError(f"label {wrong} is not in 0..{num_classes - 1}, the named classes")
    # torchmetrics would take logits that all lie in 0..1 for probabilities.
    probabilities = logits.softmax(dim=1)
    top = {
        k: float(multiclass_accuracy(logits, labels, num_classes, top_k=k, average="micro"))
        for k in (1, _TOP)
        if k == 1 or k < num_classes
    }
    confusion = multiclass_confusion_matrix(probabilities, labels, num_classes).numpy()
    bins = _reliability_bins(probabilities, labels)
    return ClassificationScores(
        top1=top[1],
        top5=top.get(_TOP),
        per_class=_class_scores(confusion, names),
        confusion=confusion.astype(np.int64),
        ece=_calibration_error(bins),
        bins=bins,
    )


def _check_logits(logits: Tensor, names: Sequence[str]) -> None:
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f"logits are {tuple(logits.shape)}, not (N, K) with N > 0")
    if not logits.isfinite().all():
        raise ValueError("logits hold NaN or infinity")
    if len(names) != logits.shape[1]:
        raise ValueError(f"{len(names)} names for {logits.shape[1]} columns of logits")
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"two classes are named {twice!r}")


def _class_scores(confusion: npt.NDArray[np.int64], names: Sequence[str]) -> dict[str, ClassScore]:
    right, support, said = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return {
        name: ClassScore(
            precision=_share(right[k], said[k]),
            recall=_share(right[k], support[k]),
            f1=_share(2 * right[k], support[k] + said[k]),
            support=int(support[k]),
        )
        for k, name in enumerate(names)
    }


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _reliability_bins(probabilities: Tensor, labels: Tensor) -> tuple[ReliabilityBin, ...]:
    confidence, predicted = probabilities.max(dim=1)
    is_right = (predicted == labels).float()
    edges = torch.linspace(0, 1, _NUM_BINS + 1)
    places = torch.bucketize(confidence, edges[1:-1], right=True)
    bins = []
    for place in range(_NUM_BINS):
        inside = places == place
        count = int(inside.sum())
        lower, upper = float(edges[place]), float(edges[place + 1])
        means = (float(x[inside].mean()) if count else math.nan for x in (confidence, is_right))
        bins.append(ReliabilityBin(lower, upper, count, *means))
    return tuple(bins)


def _calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Compute torchmetrics' error, which has an extra bin for a confidence of exactly 1."""
    total = sum(b.num_images for b in bins)
    gaps = (b.num_images * abs(b.accuracy - b.confidence) for b in bins if b.num_images)
    return sum(gaps) / total


def score_multilabel(
    logits: Float[Tensor, "N K"], labels: Int[Tensor, "N K"], names: Sequence[str]
) -> MultiLabelScores:
    """Score each finding on its own: how well its logits rank images with it above the others.

    Args:
        logits: Any numbers; only their order within a finding matters.
        labels: 1 where an image has a finding, else 0.
        names: Names of the K findings, all different.
    """
    ranks, labels = _ranks(logits, labels, names)
    auroc: dict[str, float] = {}
    average_precision: dict[str, float] = {}
    for name, scores, truth in zip(names, ranks.T, labels.T, strict=True):
        if 0 < int(truth.sum()) < len(truth):
            auroc[name] = float(binary_auroc(scores, truth))
            average_precision[name] = float(binary_average_precision(scores, truth))
    return MultiLabelScores(
        auroc=auroc,
        average_precision=average_precision,
        support={name: int(truth.sum()) for name, truth in zip(names, labels.T, strict=True)},
        left_out=tuple(name for name in names if name not in auroc),
        macro_auroc=statistics.fmean(auroc.values()) if auroc else math.nan,
        macro_average_precision=(
            statistics.fmean(average_precision.values()) if average_precision else math.nan
        ),
    )


def _ranks(logits: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Map logits to 0..1 in the same order, and return them with the labels, on the CPU.

    torchmetrics would apply a sigmoid, which makes all large logits equal.
    """
    logits, labels = logits.detach().float().cpu(), labels.cpu()
    _check_logits(logits, names)
    if labels.shape != logits.shape:
        raise ValueError(f"labels are {tuple(labels.shape)}, not {tuple(logits.shape)}")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels hold other values than 0 and 1")
    places = [column.unique(return_inverse=True)[1] for column in logits.T]
    return torch.stack(places, dim=1).double() / len(logits), labels.long()


def confusion_picture(scores: ClassificationScores, title: str) -> Picture:
    """Draw the confusion matrix: shades are shares of the true class, numbers count images."""
    names = list(scores.per_class)
    num_classes = len(names)
    counts = scores.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 1.5 + 0.55 * num_classes), 11.0)
    figure, axes = _figure(title, side + 1.4, side + 0.5)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    colorbar = figure.colorbar(image, ax=axes, fraction=0.046, format=PercentFormatter(1))
    colorbar.set_label("share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if num_classes <= _MAX_NAMED_CLASSES:
        size = 10 if num_classes <= _MAX_COUNTED_CLASSES else 7
        shown = [_shortened(name) for name in names]
        axes.set_xticks(range(num_classes), shown, rotation=45, ha="right", fontsize=size)
        axes.set_yticks(range(num_classes), shown, fontsize=size)
    if num_classes <= _MAX_COUNTED_CLASSES:
        for row, column in np.argwhere(counts > 0):
            color = "white" if shares[row, column] > 0.6 else "black"
            count = f"{counts[row, column]}"
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=9)
    return _drawn(figure)


def reliability_picture(scores: ClassificationScores, title: str) -> Picture:
    """Draw accuracy against confidence; a perfectly calibrated classifier is on the diagonal."""
    figure, axes = _figure(title, 5.6, 6.4, rows=2, height_ratios=(3, 1))
    width = 1 / len(scores.bins)
    filled = [b for b in scores.bins if b.num_images]
    centers = [(b.lower + b.upper) / 2 for b in filled]
    axes[0].bar(
        centers,
        [b.accuracy for b in filled],
        width,
        color="C0",
        edgecolor="white",
        label="accuracy",
    )
    axes[0].plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    axes[0].plot(
        [b.confidence for b in filled],
        [b.accuracy for b in filled],
        marker="o",
        color="C1",
        linewidth=1,
        label="at mean confidence",
    )
    axes[0].set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    axes[0].set_title(f"expected calibration error {scores.ece:.3f}", fontsize=10)
    axes[0].legend(loc="upper left", fontsize=9)
    total = sum(b.num_images for b in filled)
    axes[1].bar(
        centers, [b.num_images / total for b in filled], width, color="C7", edgecolor="white"
    )
    axes[1].set(xlim=(0, 1), ylabel="images", xlabel="confidence: probability of the prediction")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _drawn(figure)


def roc_picture(
    logits: Float[Tensor, "N K"], labels: Int[Tensor, "N K"], names: Sequence[str], title: str
) -> Picture:
    """Draw a ROC curve for each finding in `score_multilabel`; the legend names the best 20."""
    scores = score_multilabel(logits, labels, names)
    ranks, labels = _ranks(logits, labels, names)
    figure, axes = _figure(title, 9.0, 6.0)
    order = sorted(scores.auroc, key=lambda name: -scores.auroc[name])
    for place, name in enumerate(order):
        column = list(names).index(name)
        false_rate, true_rate, _ = binary_roc(ranks[:, column], labels[:, column])
        axes.plot(
            false_rate,
            true_rate,
            color=f"C{place % 10}",
            linestyle="-" if place < 10 else "--",
            linewidth=1.5,
            label=f"{_shortened(name)}  {scores.auroc[name]:.3f}" if place < _MAX_LEGEND else None,
        )
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    note = f"mean AUROC {scores.macro_auroc:.3f}" if order else "no finding can be scored"
    if scores.left_out:
        note += f"; {len(scores.left_out)} left out: all images or none have them"
    axes.set_title(note, fontsize=10)
    if order:
        axes.legend(
            title="AUROC", loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9, frameon=False
        )
    return _drawn(figure)


def most_wrong_picture(
    pixels: Sequence[AnyPixels],
    logits: Float[Tensor, "N K"],
    labels: Int[Tensor, " N"],
    names: Sequence[str],
    title: str,
    *,
    max_images: int = 16,
) -> Picture:
    """Show the images whose true class got the lowest probability, worst first.

    Args:
        pixels: (H, W, C) arrays of any size; of more than 3 channels the first 3 are shown, of 2
            the first. 16-bit images are stretched to their own maximum.
        logits: One row for each of `pixels`.
        labels: Class indices from 0.
        names: Names of the K classes.
        title: Title of the whole picture.
        max_images: Largest number of images shown.
    """
    if not len(pixels) == len(logits) == len(labels) > 0:
        raise ValueError(f"{len(pixels)} pixels, {len(logits)} logits, {len(labels)} labels")
    _check_logits(logits, names)
    labels = labels.cpu().long()
    probabilities = logits.detach().float().cpu().softmax(dim=1)
    of_truth = probabilities[torch.arange(len(labels)), labels]
    worst = of_truth.argsort(stable=True)[:max_images].tolist()
    columns = min(len(worst), max(1, math.ceil(math.sqrt(len(worst)))))
    rows = math.ceil(len(worst) / columns)
    figure, grid = _figure(
        title, max(2.2 * columns, 4.0), 2.6 * rows + 0.5, rows=rows, columns=columns
    )
    for axes in np.ravel(grid):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, index in zip(np.ravel(grid), worst, strict=False):
        axes.imshow(_shown(pixels[index]), interpolation="nearest")
        predicted = int(probabilities[index].argmax())
        true_name = _shortened(names[int(labels[index])])
        predicted_name = _shortened(names[predicted])
        axes.set_xlabel(
            f"true: {true_name} {float(of_truth[index]):.2g}\n"
            f"predicted: {predicted_name} {float(probabilities[index, predicted]):.2g}",
            fontsize=9,
        )
    return _drawn(figure)


def _shown(pixels: AnyPixels) -> Picture:
    if pixels.dtype != np.uint8:
        pixels = (pixels / max(int(pixels.max()), 1) * 255).round().astype(np.uint8)
    channels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)
    return channels.astype(np.uint8)


def label_fraction_picture(rows: Sequence[BudgetRow], title: str, *, metric: str) -> Picture:
    """Plot a metric against the number of labels used for training, with a line per arm.

    A small point is one seed. A line connects the means; its error bars reach one standard
    deviation to either side. Arms are shifted slightly, so that their bars do not overlap.

    Args:
        rows: The results, in any order.
        title: Title of the whole picture.
        metric: Label of the y axis.
    """
    if not rows:
        raise ValueError("there are no rows to draw")
    figure, axes = _figure(title, 7.0, 4.8)
    arms = list(dict.fromkeys(arm for arm, _, _ in rows))
    for number, arm in enumerate(arms):
        own = sorted((budget, values) for name, budget, values in rows if name == arm)
        apart = _ARM_SPACING ** (number - (len(arms) - 1) / 2)  # a factor: the axis is logarithmic
        places = [budget.amount * apart for budget, _ in own]
        axes.errorbar(
            places,
            [statistics.fmean(values) for _, values in own],
            [_deviation(values) for _, values in own],
            color=f"C{number}",
            marker="o",
            markersize=5,
            capsize=4,
            label=arm,
        )
        for place, (_, values) in zip(places, own, strict=True):
            axes.plot(
                [place] * len(values), values, ".", color=f"C{number}", alpha=0.5, markersize=4
            )
    budgets = sorted({budget for _, budget, _ in rows})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([budget.amount for budget in budgets]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FixedFormatter([budget.text for budget in budgets]))
    axes.set(xlabel="labels", ylabel=metric)
    axes.grid(alpha=0.3)
    most = max(len(values) for _, _, values in rows)
    axes.set_title(f"bars: standard deviation of {most} seeds" if most > 1 else "one seed")
    axes.title.set_fontsize(10)
    axes.legend()
    return _drawn(figure)


def markdown_table(rows: Sequence[BudgetRow]) -> str:
    """Write a table with a row per label budget and a column per arm.

    A cell holds mean +- standard deviation (number of seeds). The standard deviation is that of a
    sample, so a single seed has none.
    """
    arms = list(dict.fromkeys(arm for arm, _, _ in rows))
    cells = {(arm, budget): _cell(values) for arm, budget, values in rows}
    lines = [f"| labels | {' | '.join(arms)} |", "|---:|" + "---|" * len(arms)]
    for budget in sorted({budget for _, budget, _ in rows}):
        line = " | ".join(cells.get((arm, budget), "") for arm in arms)
        lines.append(f"| {budget.text} | {line} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f} (1 seed)"
    return f"{mean:.3f} \N{PLUS-MINUS SIGN} {_deviation(values):.3f} ({len(values)} seeds)"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _shortened(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "\N{HORIZONTAL ELLIPSIS}"


def _figure(
    title: str,
    width: float,
    height: float,
    *,
    rows: int = 1,
    columns: int = 1,
    height_ratios: Sequence[float] | None = None,
) -> tuple[Figure, Any]:
    """Create a figure (inches) and its axes, one or an array, without pyplot's global state."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes: Axes | npt.NDArray[Any] = figure.subplots(rows, columns, height_ratios=height_ratios)
    return figure, axes


def _drawn(figure: Figure) -> Picture:
    """Render the figure, extended so that labels beyond its edges stay whole."""
    FigureCanvasAgg(figure)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", bbox_inches="tight", pad_inches=0.1)
    return np.array(Image.open(encoded).convert("RGB"))
