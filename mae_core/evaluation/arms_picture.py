"""Draw how several ways to train compare: each with its seeds, and their paired differences."""

import io
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

Picture = npt.NDArray[np.uint8]


class ArmBar(NamedTuple):
    """One way to train with one share of the labels."""

    label: str
    values: Sequence[float]  # the metric, one for each seed


class PairedBar(NamedTuple):
    """The difference between two arms."""

    label: str
    mean: float
    standard_error: float | None  # None for one seed


def arms_picture(
    arms: Sequence[ArmBar], pairs: Sequence[PairedBar], title: str, *, metric: str
) -> Picture:
    """Draw the arms on the left, and on the right what pretraining gives.

    A small point is one seed. On the left, an error bar is one standard deviation over the seeds;
    on the right, two standard errors of the mean of the paired differences.

    Args:
        arms: In the order in which they are drawn, from the top; may be empty.
        pairs: May be empty; then there is no right half.
        title: Title of the whole picture.
        metric: Label of the left axis.
    """
    rows = max(len(arms), len(pairs), 1)
    figure = Figure(figsize=(9 if pairs else 5.5, 1.6 + 0.32 * rows), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes: list[Axes] = list(figure.subplots(1, 2 if pairs else 1, squeeze=False)[0])
    left, is_spread = axes[0], any(len(arm.values) > 1 for arm in arms)
    for row, (_, values) in enumerate(arms):
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        left.errorbar(statistics.fmean(values), row, xerr=spread, fmt="o", color="C0", capsize=4)
        left.plot(values, [row] * len(values), ".", color="C0", alpha=0.5)
    left.set_yticks(range(len(arms)), [arm.label for arm in arms])
    left.set_xlabel(metric)
    left.set_title("bars: standard deviation over the seeds" if is_spread else "one seed")
    if pairs:
        right = axes[1]
        right.axvline(0, color="0.5", linewidth=1)
        for row, (_, mean, error) in enumerate(pairs):
            right.errorbar(mean, row, xerr=2 * (error or 0.0), fmt="o", color="C1", capsize=4)
        right.set_yticks(range(len(pairs)), [pair.label for pair in pairs])
        right.set_xlabel(f"gain in {metric}")
        right.set_title("bars: 2 standard errors of the paired mean")
    for panel in axes:
        panel.invert_yaxis()
        panel.margins(y=0.15)
        panel.grid(alpha=0.3, axis="x")
        panel.title.set_fontsize(9)
    FigureCanvasAgg(figure)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", bbox_inches="tight", pad_inches=0.1)
    return np.array(Image.open(encoded).convert("RGB"))
