"""Find the images most similar to a query by the cosine of their features."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Floats = npt.NDArray[np.floating[Any]]
Picture = npt.NDArray[np.uint8]

_COLUMNS = 5


def cosine_similarity(features: Floats, query: Floats) -> npt.NDArray[np.float32]:
    """Compare each row of (N, D) with the (D,) query: (N,) cosines, 0 for a row of zeros."""
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(query)
    return (features @ query / np.maximum(lengths, 1e-12)).astype(np.float32)


def retrieval_picture(
    query: npt.NDArray[Any], found: Sequence[npt.NDArray[Any]], captions: Sequence[str], title: str
) -> Picture:
    """Draw the query, then the most similar images, best first, each with its caption.

    Args:
        query: (H, W, C) uint8 or uint16; of more than 3 channels the first 3 are shown.
        found: Images in the same form, any number of them.
        captions: One for each image in `found`.
        title: Title of the whole picture.
    """
    rows = -(-len(found) // _COLUMNS)
    figure = Figure(
        figsize=(2.1 * (_COLUMNS + 1), 2.5 * max(rows, 1) + 0.7), dpi=100, layout="constrained"
    )
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(max(rows, 1), _COLUMNS + 1, squeeze=False)
    for place in axes.ravel():
        place.axis("off")
    _show(axes[0, 0], query, "query")
    for number, (pixels, caption) in enumerate(zip(found, captions, strict=True)):
        _show(axes[number // _COLUMNS, 1 + number % _COLUMNS], pixels, caption)
    canvas: Any = FigureCanvasAgg(figure)  # untyped in matplotlib
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _show(axes: Any, pixels: npt.NDArray[Any], caption: str) -> None:
    channels = 3 if pixels.shape[2] >= 3 else 1
    scaled = pixels[..., :channels].astype(np.float32) / np.iinfo(pixels.dtype).max
    axes.imshow(scaled if channels == 3 else scaled[..., 0], cmap="gray", vmin=0, vmax=1)
    axes.set_title(caption, fontsize=8)
