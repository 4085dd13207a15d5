"""The type of a decoded picture, and the error for a sample without one."""

from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.unsignedinteger[Any]]  # (H, W, C), uint8 or uint16


class CorruptSampleError(ValueError):
    """A sample's image can't be used; the message has the reason, not the sample.

    Such samples are counted by `kind`: empty, lfs_pointer, not_an_image, truncated, bomb,
    memory, channels, unsupported, corrupt.
    """

    def __init__(self, message: str, kind: str = "corrupt") -> None:
        super().__init__(message)
        self.kind = kind


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Rotate and mirror a picture as TIFF 6.0, tag 274, specifies."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    flips_rows, flips_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    turned: Pixels = pixels[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1]
    return turned


def to_unsigned(pixels: npt.NDArray[Any], what: str) -> Pixels:
    """Convert integers from 0 to 65535 to uint8 or uint16.

    Raises:
        CorruptSampleError: There are other values; `what` describes the picture.
    """
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    whole = pixels.dtype.kind in "iu" and pixels.size > 0
    if not whole or pixels.min() < 0 or pixels.max() > 65_535:
        raise CorruptSampleError(f"{what}: only whole numbers from 0 to 65535", "unsupported")
    return pixels.astype(np.uint16)


def scale_to_full(pixels: Pixels, bits: int) -> Pixels:
    """Scale values of `bits` bits to the full range of 8 or 16 bits."""
    if bits in (8, 16):
        return pixels
    kind, limit = (np.uint8, 255) if bits < 8 else (np.uint16, 65_535)
    table = np.rint(np.arange(2**bits) * (limit / (2**bits - 1))).astype(kind)
    full: Pixels = table[np.minimum(pixels, 2**bits - 1)]
    return full
