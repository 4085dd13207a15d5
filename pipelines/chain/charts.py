"""Draw the curves of a report. A module of its own, because matplotlib takes long to load."""

import io
import logging
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

# It logs every font that it finds when it first starts.
logging.getLogger("matplotlib").setLevel(logging.WARNING)
INK = "#7d8794"  # readable on a light and on a dark page


def draw(curves: Mapping[str, Sequence[tuple[int, float]]], label: str) -> bytes:
    """Draw curves over the optimizer step as SVG, with a legend unless the only one has no name."""
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "mae"}):
        figure = Figure(figsize=(5, 2.8), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=name or None, linewidth=1.6)
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel(label, color=INK)
        axes.tick_params(colors=INK)
        axes.grid(color=INK, alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        if any(curves):
            axes.legend(frameon=False, labelcolor=INK)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
