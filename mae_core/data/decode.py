"""Bytes to pixels, one sample at a time."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

# What comes under the names of IMAGE_EXTENSIONS. Not all that Pillow knows: EPS runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM")
_MODES = {1: "L", 3: "RGB"}
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"}) | {
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
}


class CorruptSampleError(ValueError):
    """A sample's image can't be used; names the reason, not the sample."""


def decode_image(data: bytes, in_chans: int) -> npt.NDArray[np.uint8]:
    """Return (H, W, in_chans) uint8, upright as EXIF says; in_chans is 1 (grey) or 3 (RGB).

    Raises:
        CorruptSampleError: the bytes are no whole 8-bit image.
    """
    mode = _MODES.get(in_chans)
    if mode is None:
        raise CorruptSampleError(f"in_chans={in_chans}: only 1 and 3 can be decoded")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.mode not in _EIGHT_BIT_MODES:
                raise CorruptSampleError(f"mode {image.mode} is not 8 bits a channel")
            # Never load() twice: after an error Pillow returns half a picture the second time.
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "LAB":  # Pillow has no way from LAB to L
                upright = upright.convert("RGB")
            upright = upright.convert(mode)
    except (CorruptSampleError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        # Pillow's text has the address of the buffer: never the same twice.
        raise CorruptSampleError("not an image of a known format") from error
    # Pillow's plug-ins raise anything. Seen on broken files: OSError, ValueError, SyntaxError,
    # TypeError, EOFError, RuntimeError, struct.error, zlib.error, DecompressionBombError.
    except Exception as error:
        raise CorruptSampleError(f"{type(error).__name__}: {error}") from error
    pixels = np.asarray(upright)
    return pixels[..., None] if mode == "L" else pixels
