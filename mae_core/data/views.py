"""The picture and the mask that a sample becomes in an epoch.

Both are functions of (seed, epoch, sample key) alone: not of the worker, the batch or the restart
that the sample met. Crop and mask have generators of their own, so that changing the one leaves
the other as it was.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.data.decode import decode_image
from mae_core.data.randomness import named_generator, sample_generator
from mae_core.data.transforms import Pixels, augment


class ViewSpec(NamedTuple):
    seed: int
    in_chans: int
    size: tuple[int, int]  # height, width
    crop_scale: tuple[float, float]
    flip: bool


def training_view(image: bytes, epoch: int, key: str, spec: ViewSpec) -> Pixels:
    """The sample's augmented pixels, (H, W, C) uint8.

    Raises:
        CorruptSampleError: the bytes are no image.
    """
    return augment(
        decode_image(image, spec.in_chans),
        sample_generator(spec.seed, epoch, key),
        size=spec.size,
        crop_scale=spec.crop_scale,
        flip=spec.flip,
    )


def mask_generator(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of the sample's masking noise."""
    return named_generator(seed, "mask", epoch, key)


def normalize(
    pixels: npt.NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...]
) -> npt.NDArray[np.float32]:
    """(B, H, W, C) uint8 to (B, C, H, W) float32, in units of the channels' deviation."""
    scaled = pixels.astype(np.float32) / 255.0
    normalized = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(normalized.transpose(0, 3, 1, 2))
