"""Compute the augmented picture and the mask of a sample in an epoch.

Both depend on (seed, epoch, sample key) alone, not on the worker, the batch or a restart. Crop and
mask have separate generators, so that a change to one does not affect the other.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.data.decode import decode_image, jpeg_header
from mae_core.data.decode_limits import memory_in_flight
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.randomness import named_generator, sample_generator
from mae_core.data.transforms import cut_view, largest_shrink, random_crop


class ViewSpec(NamedTuple):
    seed: int
    in_chans: int
    size: tuple[int, int]  # height, width
    crop_scale: tuple[float, float]
    flip: bool


def training_view(image: bytes, epoch: int, key: str, spec: ViewSpec) -> Pixels:
    """Return the first of `training_views`: augmented (H, W, C) uint8 or uint16 pixels."""
    return training_views(image, epoch, key, spec, 1)[0]


def training_views(
    image: bytes, epoch: int, key: str, spec: ViewSpec, num_views: int
) -> list[Pixels]:
    """Cut random resized crops of one sample, each mirrored half of the time; decode it once.

    Raises:
        CorruptSampleError: The bytes are not an image.
    """
    try:
        with memory_in_flight():
            return _training_views(image, epoch, key, spec, num_views)
    except MemoryError as error:
        raise CorruptSampleError("needs more memory than there is", "memory") from error


def _training_views(
    image: bytes, epoch: int, key: str, spec: ViewSpec, num_views: int
) -> list[Pixels]:
    generators = [view_generator(spec.seed, epoch, key, view) for view in range(num_views)]
    header = jpeg_header(image)
    pixels = None
    if header is not None and header.orientation == 1:
        size = header.height, header.width
    else:
        pixels = decode_image(image, spec.in_chans, header=header)
        size = pixels.shape[0], pixels.shape[1]
    crops = [random_crop(generator, *size, scale=spec.crop_scale) for generator in generators]
    scale = 1.0
    if pixels is None:
        shrink = largest_shrink(crops, spec.size)
        pixels = decode_image(image, spec.in_chans, shrink=shrink, header=header)
        if pixels.shape[:2] == tuple(-(-side // shrink) for side in size):
            scale = 1 / shrink  # sides are rounded up; one pixel stands for shrink x shrink
        elif pixels.shape[:2] != size:
            raise CorruptSampleError("is not of the size that its header claims")
    return [
        cut_view(pixels, crop.scaled(scale), generator, size=spec.size, flip=spec.flip)
        for generator, crop in zip(generators, crops, strict=True)
    ]


def view_generator(seed: int, epoch: int, key: str, view: int) -> np.random.Generator:
    """Return the generator for a view's crop and flip."""
    if view == 0:
        return sample_generator(seed, epoch, key)
    return named_generator(seed, "view", epoch, key, view)


def mask_generator(seed: int, epoch: int, key: str, view: int = 0) -> np.random.Generator:
    """Return the generator for a view's masking noise."""
    names = (epoch, key) if view == 0 else (epoch, key, view)
    return named_generator(seed, "mask", *names)


def normalize(
    pixels: Pixels, mean: tuple[float, ...], std: tuple[float, ...]
) -> npt.NDArray[np.float32]:
    """Convert (B, H, W, C) uint8 or uint16 to (B, C, H, W) float32, normalised per channel."""
    scaled = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    normalized = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(normalized.transpose(0, 3, 1, 2))
