"""Draw where an attentive probe looks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Picture = npt.NDArray[np.uint8]

_SIDE = 160  # pixels of an image in the picture
_TITLE = 22


def attention_picture(
    pixels: Sequence[npt.NDArray[np.unsignedinteger[Any]]],
    weights: Sequence[npt.NDArray[np.float32]],
    title: str,
) -> Picture:
    """Draw images above the same images, dimmed where they have little weight.

    Args:
        pixels: The images, (H, W, C).
        weights: The weight of each patch of each image, (h, w); the largest is not dimmed.
        title: Title of the whole picture.
    """
    canvas = Image.new("RGB", (_SIDE * len(pixels), 2 * _SIDE + _TITLE), "white")
    ImageDraw.Draw(canvas).text((4, 4), title, fill="black")
    for column, (image, weight) in enumerate(zip(pixels, weights, strict=True)):
        shown = _as_rgb(image).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        share = Image.fromarray((weight / weight.max()).astype(np.float32))
        mask = np.asarray(share.resize((_SIDE, _SIDE), Image.Resampling.NEAREST))
        dimmed = (np.asarray(shown) * (0.15 + 0.85 * mask[..., None])).astype(np.uint8)
        canvas.paste(shown, (column * _SIDE, _TITLE))
        canvas.paste(Image.fromarray(dimmed), (column * _SIDE, _TITLE + _SIDE))
    return np.array(canvas)


def _as_rgb(image: npt.NDArray[np.unsignedinteger[Any]]) -> Image.Image:
    """Convert one or more channels of any depth; of more than three, show the first three."""
    values = image.astype(np.float32) * (255 / np.iinfo(image.dtype).max)
    channels = values[..., :3] if values.shape[-1] >= 3 else values[..., :1].repeat(3, axis=-1)
    return Image.fromarray(channels.astype(np.uint8))
