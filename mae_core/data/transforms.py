"""Crops, flips and sizes. Pixels stay uint8 until the device."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]  # (H, W, C)


class Crop(NamedTuple):
    top: int
    left: int
    height: int
    width: int


def random_crop(
    generator: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """A crop of random area (a share in `scale`) and aspect (log-uniform in `ratio`).

    Ten tries, then the largest central crop whose aspect is allowed: torchvision's
    RandomResizedCrop, https://docs.pytorch.org/vision/stable.
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
    """Cut `crop` out and bring it to `size` (height, width): bicubic, antialiased."""
    top, left, height, width = crop
    region = pixels[top : top + height, left : left + width]
    if region.shape[:2] == size:
        return np.ascontiguousarray(region)
    if region.shape[2] in (1, 3):
        return _resize(region[..., 0] if region.shape[2] == 1 else region, size)
    return np.concatenate([_resize(region[..., c], size) for c in range(region.shape[2])], axis=2)


def _resize(region: Pixels, size: tuple[int, int]) -> Pixels:
    image = Image.fromarray(np.ascontiguousarray(region))
    resized = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return resized[..., None] if resized.ndim == 2 else resized


def augment(
    pixels: Pixels,
    generator: np.random.Generator,
    *,
    size: tuple[int, int],
    crop_scale: tuple[float, float],
    flip: bool,
) -> Pixels:
    """The reference's augmentation: a random resized crop, and a flip half of the time."""
    crop = random_crop(generator, pixels.shape[0], pixels.shape[1], scale=crop_scale)
    out = resize_crop(pixels, crop, size)
    if flip and generator.random() < 0.5:
        out = np.ascontiguousarray(out[:, ::-1])
    return out


def center_crop(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The largest central crop of `size`'s aspect, brought to `size`. For evaluation."""
    height, width = pixels.shape[:2]
    scale = min(height / size[0], width / size[1])
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return resize_crop(pixels, Crop((height - h) // 2, (width - w) // 2, h, w), size)
