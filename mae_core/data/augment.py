"""Stronger augmentation for training a classifier: RandAugment and random erasing.

All randomness comes from the caller's generator; threads share nothing.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from mae_core.data.pixels import Pixels

Fill = int | tuple[int, ...]
Floats = TypeVar("Floats", Tensor, npt.NDArray[np.float32])

_MAX_MAGNITUDE = 10.0
_OP_PROBABILITY = 0.5


def rand_augment(
    pixels: Pixels,
    generator: np.random.Generator,
    *,
    num_ops: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    fill: tuple[int, ...] | None = None,
) -> Pixels:
    """Apply `num_ops` random operations, each with probability 1/2: timm's "rand-m9-mstd0.5-inc1".

    8-bit RGB gets all 15 operations, 8-bit grey all but the one on colours. Images with another
    number of channels or 16 bits get the 5 that move pixels: the others are defined on 8-bit
    values of a screen.

    Source: Cubuk et al. 2019, https://arxiv.org/abs/1909.13719, in timm's variant that MAE uses
    for fine-tuning, bicubic. Differs: posterizing keeps at least one bit; timm's turns an image
    black at full magnitude.

    Args:
        pixels: (H, W, C); not changed.
        generator: Draws the same number of values for each of the `num_ops` operations.
        num_ops: Number of operations, drawn with replacement.
        magnitude: Mean strength, 0..10.
        magnitude_std: Standard deviation of the strength, which is clipped to 0..10.
        fill: Value of each channel for pixels from outside the image; None is mid-grey. The
            reference takes the mean of the data.
    """
    num_channels = pixels.shape[2]
    middle = (np.iinfo(pixels.dtype).max + 1) // 2
    fills = (middle,) * num_channels if fill is None else fill
    if len(fills) != num_channels:
        raise ValueError(f"fill={fill} has {len(fills)} values for {num_channels} channels")
    as_shown = pixels.dtype == np.uint8 and num_channels in (1, 3)
    ops = list(_MOVES)
    if as_shown:
        ops += [op for op in _TONES if num_channels == 3 or op != "color"]
    bands = [Image.fromarray(pixels)] if as_shown and num_channels == 3 else _bands(pixels)
    band_fills: list[Fill] = [fills] if len(bands) < num_channels else list(fills)
    for _ in range(num_ops):
        op = ops[int(generator.integers(len(ops)))]
        is_applied = generator.random() < _OP_PROBABILITY
        drawn = generator.normal(magnitude, magnitude_std)
        strength = min(max(drawn, 0.0), _MAX_MAGNITUDE) / _MAX_MAGNITUDE
        signed = -strength if generator.random() < 0.5 else strength
        if not is_applied:
            continue
        if op in _MOVES:
            bands = [_MOVES[op](b, signed, f) for b, f in zip(bands, band_fills, strict=True)]
        else:
            bands = [_TONES[op](band, signed) for band in bands]
    return _joined(bands, pixels)


def _bands(pixels: Pixels) -> list[Image.Image]:
    # Pillow interpolates 16-bit values only as float32, which represents all of them exactly.
    kind = np.uint8 if pixels.dtype == np.uint8 else np.float32
    return [
        Image.fromarray(np.ascontiguousarray(pixels[..., c], dtype=kind))
        for c in range(pixels.shape[2])
    ]


def _joined(bands: list[Image.Image], like: Pixels) -> Pixels:
    joined = np.stack([np.asarray(band) for band in bands], axis=-1).reshape(like.shape)
    if joined.dtype != like.dtype:
        joined = joined.round().clip(0, np.iinfo(like.dtype).max).astype(like.dtype)
    return joined


def _move(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    """Fill each place with the pixel that `matrix` (a, b, c, d, e, f) maps it to."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=fill,
    )


def _rotate(image: Image.Image, signed: float, fill: Fill) -> Image.Image:
    return image.rotate(30 * signed, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _shear_x(image: Image.Image, signed: float, fill: Fill) -> Image.Image:
    return _move(image, (1, 0.3 * signed, 0, 0, 1, 0), fill)


def _shear_y(image: Image.Image, signed: float, fill: Fill) -> Image.Image:
    return _move(image, (1, 0, 0, 0.3 * signed, 1, 0), fill)


def _translate_x(image: Image.Image, signed: float, fill: Fill) -> Image.Image:
    return _move(image, (1, 0, 0.45 * signed * image.width, 0, 1, 0), fill)


def _translate_y(image: Image.Image, signed: float, fill: Fill) -> Image.Image:
    return _move(image, (1, 0, 0, 0, 1, 0.45 * signed * image.height), fill)


def _auto_contrast(image: Image.Image, signed: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, signed: float) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, signed: float) -> Image.Image:
    return ImageOps.invert(image)


def _posterize(image: Image.Image, signed: float) -> Image.Image:
    return ImageOps.posterize(image, max(1, 4 - int(abs(signed) * 4)))


def _solarize(image: Image.Image, signed: float) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(abs(signed) * 256))


def _solarize_add(image: Image.Image, signed: float) -> Image.Image:
    """Brighten the darker half of the values."""
    added = int(abs(signed) * 110)
    table = [min(255, level + added) if level < 128 else level for level in range(256)]
    return image.point(table * len(image.getbands()))


def _enhancement(signed: float) -> float:
    """Convert a strength to Pillow's factor: 1 changes nothing, more exaggerates, less weakens."""
    return max(0.1, 1 + 0.9 * signed)


def _color(image: Image.Image, signed: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_enhancement(signed))


def _contrast(image: Image.Image, signed: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_enhancement(signed))


def _brightness(image: Image.Image, signed: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_enhancement(signed))


def _sharpness(image: Image.Image, signed: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_enhancement(signed))


# Each function takes a strength in -1..1. Those without two directions ignore the sign.
_MOVES: dict[str, Callable[[Image.Image, float, Fill], Image.Image]] = {
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
_TONES: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}


def random_erase(
    image: Floats,
    generator: np.random.Generator,
    *,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Floats:
    """Replace a random rectangle with noise; returns a new image if anything changed.

    Noise has mean 0 and deviation 1, as normalised pixels have, and is independent for each pixel
    and channel. After ten failed tries to fit a rectangle the image stays as it is. Source: Zhong
    et al. 2017, https://arxiv.org/abs/1708.04896, in timm's variant (mode "pixel").

    Args:
        image: (C, H, W), normalised.
        generator: Draws all random values.
        probability: Probability that a rectangle is erased.
        area: Range of its share of the image, uniform.
        aspect: Range of its height divided by its width, log-uniform.
    """
    if generator.random() >= probability:
        return image
    channels, height, width = image.shape
    for _ in range(10):
        target = height * width * generator.uniform(*area)
        by = math.exp(generator.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(target * by)), round(math.sqrt(target / by))
        if 0 < h < height and 0 < w < width:
            top = int(generator.integers(0, height - h + 1))
            left = int(generator.integers(0, width - w + 1))
            noise = generator.standard_normal((channels, h, w), dtype=np.float32)
            return _with_patch(image, noise, top, left)
    return image


def _with_patch(image: Floats, patch: npt.NDArray[np.float32], top: int, left: int) -> Floats:
    rows, columns = slice(top, top + patch.shape[1]), slice(left, left + patch.shape[2])
    if isinstance(image, Tensor):
        image = image.clone()
        image[:, rows, columns] = torch.from_numpy(patch).to(image)
    else:
        image = image.copy()
        image[:, rows, columns] = patch
    return image
