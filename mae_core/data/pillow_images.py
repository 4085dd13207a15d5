"""Decode PNG, WebP, GIF, BMP, PPM, and some JPEGs and TIFFs with Pillow."""

import struct
import zlib
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from mae_core.data.decode_limits import (
    WatchedBytes,
    check_size,
    check_tiff_directory,
    hold_memory,
)
from mae_core.data.pixels import CorruptSampleError, Pixels, upright

# Formats found under IMAGE_EXTENSIONS. Pillow knows more, but its EPS reader runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM")
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"}) | {
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
}
_SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N", "I"})
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_ORIENTATION_TAG = 0x0112
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# PNG colour types that Pillow reduces from 16 to 8 bits: colour, grey with alpha, and both.
_PNG_DEEP_COLOUR = (2, 4, 6)
_PIXELS_AT_A_TIME = 2**22
_WORK_BYTES_PER_PIXEL = 8  # Pillow uses 4 for a colour picture, and we use up to 4

# Formats that are often stored under a wrong extension, by the first bytes of the file.
_OTHER_FORMATS = (
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "a Photoshop document"),
    (b"v/1\x01", "OpenEXR"),
    (b"%PDF", "PDF"),
    (b"SIMPLE  =", "FITS"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
)
_OTHER_BRANDS = {
    "AVIF": (b"avif", b"avis"),
    "HEIC": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
}


def decode_pillow(data: bytes, in_chans: int) -> Pixels:
    """Decode the first frame to (H, W, C) pixels, upright.

    8-bit pictures become grey for a model of one channel and RGB for others, with alpha if the
    model takes one channel more than there are colours. 16-bit grey stays as it is.

    Raises:
        CorruptSampleError: The file exceeds the limits of size or time, or its format is known
            and not supported.
    """
    if data[:8] == _PNG_MAGIC and data[24:26] in {bytes((16, kind)) for kind in _PNG_DEEP_COLOUR}:
        return _decode_deep_png(data, in_chans)
    _check_webp(data)
    with _open(data) as image:
        check_size(image.height, image.width)
        hold_memory(image.width * image.height * _WORK_BYTES_PER_PIXEL)
        return _decode(image, in_chans)


def jpeg_orientation(data: bytes) -> int:
    """Read a JPEG's orientation from EXIF or XMP; 1 if it need not be rotated."""
    try:
        with Image.open(WatchedBytes(data), formats=("JPEG",)) as image:
            return _orientation(image)
    except MemoryError:
        raise
    except Exception:  # Pillow can't read it either, and decoding reports that
        return 1


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(WatchedBytes(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        name = _other_format(data)
        if name is not None:
            raise CorruptSampleError(
                f"is {name}, which is not read; convert it to PNG, TIFF or JPEG", "unsupported"
            ) from error
        # Pillow's text contains the buffer's address, which is never the same twice.
        raise CorruptSampleError("not an image of a known format", "not_an_image") from error


def _other_format(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, min(64, len(data)), 4))}
        return next((name for name, of in _OTHER_BRANDS.items() if brands & set(of)), None)
    return next((name for magic, name in _OTHER_FORMATS if data.startswith(magic)), None)


def _check_webp(data: bytes) -> None:
    """Check the size before Pillow does, because Pillow allocates the canvas when it opens one."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return
    if data[12:16] == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    check_size(height, width)
    hold_memory(width * height * 2 * _WORK_BYTES_PER_PIXEL)


def _decode_deep_png(data: bytes, in_chans: int) -> Pixels:
    """Decode 16-bit colour or alpha, of which Pillow would keep 8 bits."""
    width, height = struct.unpack_from(">II", data, 16)
    channels = {2: 4, 4: 2, 6: 4}[data[25]]  # a transparent colour counts as alpha
    check_size(height, width, 2 * channels)
    hold_memory(2 * width * height * 2 * channels)
    with _open(data) as image:  # reads its metadata and checks each chunk
        image.load()
        orientation = _orientation(image)
    _check_png_data(data, height * (width * 2 * channels + 8))
    pixels: Pixels = imagecodecs.png_decode(data)
    if pixels.shape[2] in (2, 4) and pixels.shape[2] != in_chans:
        pixels = pixels[..., :-1]
    return upright(pixels, orientation)


def _check_png_data(data: bytes, max_bytes: int) -> None:
    """Raise a CorruptSampleError if the pixels inflate to more; libpng has no such limit."""
    inflater, at, num_bytes = zlib.decompressobj(), 8, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        piece = data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        while piece:
            num_bytes += len(inflater.decompress(piece, 2**20))
            if num_bytes > max_bytes:
                raise CorruptSampleError(f"inflates to more than {max_bytes} bytes", "bomb")
            piece = inflater.unconsumed_tail
        at += 12 + length


def _orientation(image: Image.Image) -> int:
    try:
        exif = image.info.get("exif")
        if isinstance(exif, bytes):
            check_tiff_directory(exif.removeprefix(b"Exif\0\0"))
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except (MemoryError, CorruptSampleError):
        raise
    except Exception:  # Pillow raises any error for broken EXIF; the pixels may be fine
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode(image: Image.Image, in_chans: int) -> Pixels:
    mode = image.mode
    if mode not in _EIGHT_BIT_MODES | _SIXTEEN_BIT_MODES:
        raise CorruptSampleError(f"mode {mode} is neither 8 nor 16 bits a channel", "unsupported")
    # Never load() twice: after an error, Pillow returns half a picture the second time.
    image.load()
    orientation = _orientation(image)
    if mode in _SIXTEEN_BIT_MODES:
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65_535:
            raise CorruptSampleError(f"mode {mode} holds values beyond 16 bits", "unsupported")
        return upright(deep.astype(np.uint16)[..., None], orientation)
    if mode == "LAB":  # Pillow has no way from LAB to L
        image = image.convert("RGB")
    elif mode in ("La", "RGBa"):  # nor from colours premultiplied by alpha
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    return upright(_pixels(image, _mode_for(image, in_chans)), orientation)


def _mode_for(image: Image.Image, in_chans: int) -> str:
    """Choose the mode to which Pillow converts an 8-bit picture."""
    has_alpha = image.mode in _ALPHA_MODES or "transparency" in image.info
    if in_chans == 4 and has_alpha:
        return "RGBA"
    if in_chans == 2 and image.mode == "LA":
        return "LA"
    return "L" if in_chans == 1 else "RGB"


def _pixels(image: Image.Image, mode: str) -> npt.NDArray[np.uint8]:
    """Convert to `mode` some rows at a time: a large picture would be in memory three times."""
    rows = max(1, _PIXELS_AT_A_TIME // image.width)
    if rows >= image.height:
        return _with_channels(np.asarray(image.convert(mode)))
    whole: Any = None
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = _with_channels(np.asarray(image.crop((0, top, image.width, bottom)).convert(mode)))
        if whole is None:
            whole = np.empty((image.height, *strip.shape[1:]), np.uint8)
        whole[top:bottom] = strip
    return whole


def _with_channels(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return pixels[..., None] if pixels.ndim == 2 else pixels
