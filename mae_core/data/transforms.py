"""Crop, flip and resize. Pixels stay uint8 or uint16 up to the device.

Resizing is bicubic (a = -0.5) and antialiased like Pillow's, but uses the Rust library
fast_image_resize, which takes less time for the same pictures (median PSNR 55 dB over 256
photographs).
"""

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from cykooz_resizer import (
    CropBox,
    FilterType,
    ImageData,
    PixelType,
    ResizeAlg,
    ResizeOptions,
    Resizer,
)

from mae_core.data.decode import SHRINKS
from mae_core.data.pixels import Pixels

_BICUBIC = ResizeAlg.convolution(FilterType.catmull_rom)
_PIXEL_TYPES = {
    ("u1", 1): PixelType.U8,
    ("u1", 3): PixelType.U8x3,
    ("u2", 1): PixelType.U16,
    ("u2", 3): PixelType.U16x3,
}
_per_thread = threading.local()


class Crop(NamedTuple):
    """A crop in pixels, fractional if the picture was decoded smaller than the crop assumed."""

    top: float
    left: float
    height: float
    width: float

    def scaled(self, by: float) -> "Crop":
        return Crop(self.top * by, self.left * by, self.height * by, self.width * by)


def random_crop(
    generator: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """Draw a crop of random area (a share in `scale`) and aspect (log-uniform in `ratio`).

    After ten failed tries, returns the largest central crop with an allowed aspect. Source:
    torchvision's RandomResizedCrop, https://docs.pytorch.org/vision/stable.
    """
    area = height * width
    for _ in range(10):
        target = area * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.integers(0, height - h + 1))
            left = int(generator.integers(0, width - w + 1))
            return Crop(top, left, h, w)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = max(1, min(width, round(height * aspect)))
    h = max(1, min(height, round(width / aspect)))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def resize_crop(pixels: Pixels, crop: Crop, size: tuple[int, int]) -> Pixels:
    """Cut out `crop` and resize it to `size` (height, width)."""
    top, left = math.floor(crop.top), math.floor(crop.left)
    # Clip to the picture: a sum of fractions may exceed it by a rounding error.
    bottom = min(math.ceil(crop.top + crop.height - 1e-6), pixels.shape[0])
    right = min(math.ceil(crop.left + crop.width - 1e-6), pixels.shape[1])
    region = pixels[top:bottom, left:right]
    if (crop.height, crop.width) == size == region.shape[:2]:
        return np.ascontiguousarray(region)
    box = Crop(
        crop.top - top,
        crop.left - left,
        min(crop.height, bottom - crop.top),
        min(crop.width, right - crop.left),
    )
    if region.shape[2] in (1, 3):
        return _resize(region, box, size)
    bands = [_resize(region[..., c : c + 1], box, size) for c in range(region.shape[2])]
    return np.concatenate(bands, axis=2)


def _resize(region: Pixels, box: Crop, size: tuple[int, int]) -> Pixels:
    kind = _PIXEL_TYPES[region.dtype.str[1:], region.shape[2]]
    source = ImageData(region.shape[1], region.shape[0], kind, region.tobytes())
    target = ImageData(size[1], size[0], kind)
    crop_box = CropBox(box.left, box.top, box.width, box.height)
    _resizer().resize(source, target, ResizeOptions(resize_alg=_BICUBIC, crop_box=crop_box))
    resized: Pixels = np.frombuffer(target.get_buffer(), region.dtype)
    return resized.reshape(*size, region.shape[2])


def _resizer() -> Resizer:
    """Return this thread's resizer, which keeps its buffers."""
    resizer: Resizer | None = getattr(_per_thread, "resizer", None)
    if resizer is None:
        resizer = _per_thread.resizer = Resizer()
    return resizer


def cut_view(
    pixels: Pixels,
    crop: Crop,
    generator: np.random.Generator,
    *,
    size: tuple[int, int],
    flip: bool,
) -> Pixels:
    """Cut the crop at `size` and mirror it half of the time if `flip`."""
    view = resize_crop(pixels, crop, size)
    return _mirrored(view) if flip and generator.random() < 0.5 else view


def _mirrored(pixels: Pixels) -> Pixels:
    """Mirror one channel at a time: NumPy takes six times as long for whole reversed pixels."""
    mirrored = np.empty_like(pixels)
    for channel in range(pixels.shape[2]):
        mirrored[..., channel] = pixels[:, ::-1, channel]
    return mirrored


def largest_shrink(crops: Sequence[Crop], size: tuple[int, int]) -> int:
    """Return the largest of 8, 4, 2 by which no crop becomes smaller than `size`, else 1."""
    room = min(min(crop.height / size[0], crop.width / size[1]) for crop in crops)
    return next((shrink for shrink in SHRINKS if shrink <= room), 1)


def center_crop(pixels: Pixels, size: tuple[int, int], share: float = 1.0) -> Pixels:
    """Cut a central crop with `size`'s aspect and resize it to `size`, for evaluation.

    Its sides are `share` of those of the largest one. So 0.875 is what resizing the short side to
    256 and cutting 224 x 224 gives.
    """
    height, width = pixels.shape[:2]
    scale = share * min(height / size[0], width / size[1])
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return resize_crop(pixels, Crop((height - h) // 2, (width - w) // 2, h, w), size)


def shrink_to_short_side(pixels: Pixels, short_side: int) -> Pixels:
    """Shrink the whole picture so that its shorter side is at most `short_side` pixels."""
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return resize_crop(pixels, Crop(0, 0, height, width), size)


def blank_picture(
    size: tuple[int, int], num_channels: int, dtype: np.dtype[Any], fill: Sequence[float]
) -> Pixels:
    """Return a picture of one colour, into which a smaller one can be put.

    Args:
        size: Height and width.
        num_channels: Number of channels.
        dtype: uint8 or uint16.
        fill: Value of each channel, or one for all, as a share of full scale. With the channel
            means of `views.normalize`, the border becomes 0 (to half a grey level). Zeros would
            become many standard deviations, darker than anything that the encoder knows.
    """
    value = np.rint(np.asarray(fill, np.float64) * np.iinfo(dtype).max).astype(dtype)
    return np.full((*size, num_channels), value, dtype)


def stack_pixels(pictures: Sequence[Pixels]) -> Pixels:
    """Stack to (B, H, W, C), uint16 if any picture is; 8-bit values are then times 257."""
    deep = any(picture.dtype == np.uint16 for picture in pictures)
    if not deep:
        return np.stack(pictures)
    wide = [p if p.dtype == np.uint16 else p * np.uint16(257) for p in pictures]
    return np.stack(wide)
