"""What a decoded picture is, and the error that is raised where there is none."""

from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.unsignedinteger[Any]]  # (H, W, C), uint8 or uint16


class CorruptSampleError(ValueError):
    """A sample's image can't be used; names the reason, not the sample.

    `kind` is what such samples are counted by: empty, lfs_pointer, not_an_image, truncated, bomb,
    memory, channels, unsupported, corrupt.
    """

    def __init__(self, message: str, kind: str = "corrupt") -> None:
        super().__init__(message)
        self.kind = kind


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn and mirror a picture as TIFF 6.0, tag 274, says."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    flips_rows, flips_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    turned: Pixels = pixels[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1]
    return turned


def to_unsigned(pixels: npt.NDArray[Any], what: str) -> Pixels:
    """Give whole numbers from 0 to 65535 as uint8 or uint16.

    Raises:
        CorruptSampleError: there are others; `what` names the picture.
    """
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    whole = pixels.dtype.kind in "iu" and pixels.size > 0
    if not whole or pixels.min() < 0 or pixels.max() > 65_535:
        raise CorruptSampleError(f"{what}: only whole numbers from 0 to 65535", "unsupported")
    return pixels.astype(np.uint16)


def scale_to_full(pixels: Pixels, bits: int) -> Pixels:
    """Bring values of which `bits` bits are used to the full range of 8 or 16 bits."""
    if bits in (8, 16):
        return pixels
    kind, limit = (np.uint8, 255) if bits < 8 else (np.uint16, 65_535)
    table = np.rint(np.arange(2**bits) * (limit / (2**bits - 1))).astype(kind)
    full: Pixels = table[np.minimum(pixels, 2**bits - 1)]
    return full
