"""Stronger augmentation for training a classifier: RandAugment and random erasing.

All randomness comes from the caller's generator; threads share nothing.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

from mae_core.data.pixels import Pixels

Fill = int | tuple[int, ...]
Move = Callable[[Image.Image, float, Fill], Image.Image]  # image, strength, fill
Tone = Callable[[Image.Image, float], Image.Image]  # image, strength
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


def _enhancement(signed: float) -> float:
    """Return the factor of an enhancement; 1 changes nothing."""
    return max(0.1, 1 + 0.9 * signed)


def _moved(operation: Callable[..., Image.Image], most: float) -> Move:
    """Return an operation of timm's that moves pixels; `most` is its argument at full strength."""

    def move(image: Image.Image, signed: float, fill: Fill) -> Image.Image:
        return operation(image, most * signed, resample=Image.Resampling.BICUBIC, fillcolor=fill)

    return move


def _toned(
    operation: Callable[..., Image.Image], argument: Callable[[float], float] | None = None
) -> Tone:
    """Return an operation of timm's on tones; `argument` computes its argument of the strength."""

    def tone(image: Image.Image, signed: float) -> Image.Image:
        return operation(image) if argument is None else operation(image, argument(signed))

    return tone


# Each takes a strength in -1..1. Those without two directions ignore the sign.
_MOVES: dict[str, Move] = {
    "rotate": _moved(auto_augment.rotate, 30.0),
    "shear_x": _moved(auto_augment.shear_x, 0.3),
    "shear_y": _moved(auto_augment.shear_y, 0.3),
    "translate_x": _moved(auto_augment.translate_x_rel, 0.45),
    "translate_y": _moved(auto_augment.translate_y_rel, 0.45),
}
_TONES: dict[str, Tone] = {
    "auto_contrast": _toned(auto_augment.auto_contrast),
    "equalize": _toned(auto_augment.equalize),
    "invert": _toned(auto_augment.invert),
    "posterize": _toned(auto_augment.posterize, lambda x: max(1, 4 - int(abs(x) * 4))),
    "solarize": _toned(auto_augment.solarize, lambda x: 256 - int(abs(x) * 256)),
    "solarize_add": _toned(auto_augment.solarize_add, lambda x: int(abs(x) * 110)),
    "color": _toned(auto_augment.color, _enhancement),
    "contrast": _toned(auto_augment.contrast, _enhancement),
    "brightness": _toned(auto_augment.brightness, _enhancement),
    "sharpness": _toned(auto_augment.sharpness, _enhancement),
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
