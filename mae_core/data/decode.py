"""Bytes to pixels, one sample at a time.

JPEG by libjpeg-turbo (simplejpeg), DICOM by pydicom, TIFFs that Pillow can't read whole by
tifffile, everything else by Pillow. 8 bits stay uint8, 16 bits stay uint16, until the device.
"""

import io
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pydicom
import simplejpeg
import tifffile
from PIL import Image, UnidentifiedImageError
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import pixel_array

from mae_core.data.pixels import CorruptSampleError, Pixels

MAX_TIFF_BYTES = 2**30
MAX_PIXELS = 178_956_970  # Pillow's own limit: what claims more is taken for an attack
SHRINKS = (8, 4, 2)  # by which libjpeg-turbo decodes faster than in full

# What comes under the names of IMAGE_EXTENSIONS. Not all that Pillow knows: EPS runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM")
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"}) | {
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
}
_SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N", "I"})
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 258
_SAMPLES_PER_PIXEL_TAG = 277
# Of a JPEG's segment: 0xFF, marker, length, and if it starts a frame bits, height, width, channels.
_SEGMENT = struct.Struct(">BBHBHHB")
_START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_START_OF_SCAN = 0xDA
_APP1 = 0xE1
_SAY_ORIENTATION = (b"Exif\0", b"tiff:Orientation")
_DEFLATED = pydicom.uid.DeflatedExplicitVRLittleEndian.encode()
_LUMA = np.asarray([0.299, 0.587, 0.114])  # ITU-R 601

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is raised
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


class JpegHeader(NamedTuple):
    """What a JPEG says of itself before its pixels."""

    height: int  # as stored
    width: int
    orientation: int  # TIFF 6.0, tag 274; 1: as stored


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a grey or colour JPEG that libjpeg-turbo reads; None for anything else.

    Of the segments up to the first scan, which are few; a search of the file costs more (0.1 ms).
    """
    if data[:2] != b"\xff\xd8":
        return None
    size, may_turn, at = None, False, 2
    while at + _SEGMENT.size <= len(data):
        mark, marker, length, precision, height, width, channels = _SEGMENT.unpack_from(data, at)
        if mark != 0xFF:  # also after a length below 2, whose own bytes come next
            return None
        end = at + 2 + length
        if marker == _START_OF_SCAN:
            break
        if marker in _START_OF_FRAME:
            size = height, width
            if precision != 8 or channels not in (1, 3) or not 0 < height * width <= MAX_PIXELS:
                return None
        elif marker == _APP1:
            may_turn = may_turn or any(data.find(name, at, end) >= 0 for name in _SAY_ORIENTATION)
        at = end
    if size is None:
        return None
    return JpegHeader(*size, _jpeg_orientation(data) if may_turn else 1)


def decode_image(
    data: bytes, in_chans: int, *, shrink: int = 1, header: JpegHeader | None = None
) -> Pixels:
    """Return (H, W, in_chans) uint8 or uint16, upright as EXIF says.

    Grey fills three channels, colour becomes grey by its luma, alpha is dropped; any other number
    of channels must be `in_chans`.

    Args:
        data: the file.
        in_chans: channels that the model takes.
        shrink: 2, 4 or 8 lets a plain JPEG come out smaller by that, rounded up, which is faster.
        header: what `jpeg_header` says of it, where it was asked already.

    Raises:
        CorruptSampleError: the bytes are no whole image, or one of other channels.
    """
    header = (header or jpeg_header(data)) if in_chans in (1, 3) else None
    if header is not None:
        pixels = _decode_jpeg(data, in_chans, header, shrink if header.orientation == 1 else 1)
        if pixels is not None:
            return np.ascontiguousarray(_upright(pixels, header.orientation))
    if not data:
        raise CorruptSampleError("holds no bytes", "empty")
    if data.startswith(b"version https://git-lfs"):
        raise CorruptSampleError("is a Git LFS pointer, not the file itself", "lfs_pointer")
    with _corrupt_sample_errors():
        pixels = _decode_dicom(data) if data[128:132] == b"DICM" else _decode_any(data, in_chans)
    return _to_channels(pixels, in_chans)


def _decode_jpeg(data: bytes, in_chans: int, header: JpegHeader, shrink: int) -> Pixels | None:
    """None where Pillow may know better.

    libjpeg goes on with grey after data that ends early or makes no sense, and Pillow does not
    hear its warning: that must not pass for a picture.
    """
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data,
            "RGB" if in_chans == 3 else "GRAY",
            fastdct=True,
            fastupsample=True,
            min_height=-(-header.height // shrink) if shrink > 1 else 0,
            min_width=-(-header.width // shrink) if shrink > 1 else 0,
        )
    except Exception as error:
        text = str(error)
        if "remature end" in text:
            raise CorruptSampleError(text, "truncated") from error
        if any(harm in text for harm in ("Huffman", "instead of RST", "progress")):
            raise CorruptSampleError(text, "corrupt") from error
        return None  # such as a broken colour profile, or bytes between the segments
    return pixels


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """(H, W, 1 or 3) uint8 to a JPEG; full colour resolution from quality 90 on."""
    colorspace = "GRAY" if pixels.shape[2] == 1 else "RGB"
    subsampling = "444" if quality >= 90 and colorspace == "RGB" else "420"
    if colorspace == "GRAY":
        subsampling = "Gray"
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality, colorspace, subsampling, fastdct=False
    )
    return data


def _jpeg_orientation(data: bytes) -> int:
    """How a JPEG is to be turned, as EXIF or XMP say; 1 for not at all."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _orientation(image)
    except Exception:  # no JPEG for Pillow either: told when it is decoded
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow raises anything on broken EXIF; the pixels may be fine
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode_any(data: bytes, in_chans: int) -> Pixels:
    is_tiff = data[:4] in _TIFF_MAGIC
    if is_tiff and in_chans not in (1, 3):
        return _decode_tiff(data)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if not is_tiff or _pillow_shows_all(image):
                return _decode_pillow(image, in_chans)
    except (UnidentifiedImageError, CorruptSampleError):
        if not is_tiff:
            raise
    return _decode_tiff(data)


def _pillow_shows_all(image: Any) -> bool:
    """False for a TIFF of which Pillow would show one band of many, or 8 bits of 16."""
    tags, num_bands = image.tag_v2, len(image.getbands())
    if image.mode in ("P", "PA", "1"):
        return True
    deep_colour = num_bands > 1 and 16 in tags.get(_BITS_PER_SAMPLE_TAG, ())
    return not deep_colour and int(tags.get(_SAMPLES_PER_PIXEL_TAG, num_bands)) == num_bands


def _decode_pillow(image: Image.Image, in_chans: int) -> Pixels:
    mode = image.mode
    if mode not in _EIGHT_BIT_MODES | _SIXTEEN_BIT_MODES:
        raise CorruptSampleError(f"mode {mode} is neither 8 nor 16 bits a channel", "unsupported")
    # Never load() twice: after an error Pillow returns half a picture the second time.
    image.load()
    orientation = _orientation(image)
    if mode in _SIXTEEN_BIT_MODES:
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65_535:
            raise CorruptSampleError(f"mode {mode} holds values beyond 16 bits", "unsupported")
        return _upright(deep.astype(np.uint16)[..., None], orientation)
    if mode == "LAB":  # Pillow has no way from LAB to L
        image = image.convert("RGB")
    pixels = np.asarray(image.convert("L" if in_chans == 1 else "RGB"))
    return _upright(pixels[..., None] if pixels.ndim == 2 else pixels, orientation)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn and mirror as TIFF 6.0, tag 274, says."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    flips_rows, flips_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    turned: Pixels = pixels[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1]
    return turned


def _decode_tiff(data: bytes) -> Pixels:
    """The first page of a TIFF of any number of bands."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        if page.imagewidth * page.imagelength > MAX_PIXELS or page.nbytes > MAX_TIFF_BYTES:
            raise CorruptSampleError(f"claims too many pixels {page.shape}", "bomb")
        pixels = page.asarray()
        if page.axes.startswith("S"):  # bands one after the other
            pixels = np.moveaxis(pixels, 0, -1)
        orientation = page.tags.valueof(_ORIENTATION_TAG) or 1
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise CorruptSampleError(f"TIFF of axes {page.axes}", "unsupported")
    pixels = _to_unsigned(pixels, f"TIFF of {pixels.dtype}")
    return _upright(pixels, orientation if 1 <= orientation <= 8 else 1)


def _to_unsigned(pixels: npt.NDArray[Any], what: str) -> Pixels:
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    whole = pixels.dtype.kind in "iu" and pixels.size > 0
    if not whole or pixels.min() < 0 or pixels.max() > 65_535:
        raise CorruptSampleError(f"{what}: only whole numbers from 0 to 65535", "unsupported")
    return pixels.astype(np.uint16)


def _decode_dicom(data: bytes) -> Pixels:
    """The first frame: colours as they are, grey through its window, bright where it is dense."""
    if _DEFLATED in data[:4096]:  # it would inflate without a limit
        raise CorruptSampleError("deflated DICOM", "unsupported")
    dataset = pydicom.dcmread(io.BytesIO(data))
    if dataset.Rows * dataset.Columns * dataset.get("SamplesPerPixel", 1) > MAX_PIXELS:
        raise CorruptSampleError(f"claims {dataset.Rows} x {dataset.Columns} pixels", "bomb")
    try:
        values = pixel_array(dataset, index=0)
    except (RuntimeError, NotImplementedError) as error:
        raise CorruptSampleError(
            f"DICOM in a compression without a decoder: {error}", "unsupported"
        ) from error
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
    if values.ndim == 3:
        return _to_unsigned(values, "DICOM")
    values = apply_modality_lut(values, dataset).astype(np.float64)
    low, high = _dicom_window(dataset)
    share = np.clip((values - low) / max(high - low, 1e-9), 0.0, 1.0)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":  # low values are shown bright
        share = 1.0 - share
    return np.rint(share * 65_535).astype(np.uint16)[..., None]


def _dicom_window(dataset: pydicom.Dataset) -> tuple[float, float]:
    """Values shown black and white: the first window, or all that the stored bits can hold."""

    def first(name: str) -> float | None:
        value = dataset.get(name)
        if value is None or value == "":
            return None
        return float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)

    center, width = first("WindowCenter"), first("WindowWidth")
    if center is not None and width is not None:
        return center - width / 2, center + width / 2
    bits = int(dataset.BitsStored)
    signed = int(dataset.get("PixelRepresentation", 0)) == 1
    slope, intercept = first("RescaleSlope"), first("RescaleIntercept") or 0.0
    slope = 1.0 if slope is None else slope
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return low * slope + intercept, high * slope + intercept


def _to_channels(pixels: Pixels, in_chans: int) -> Pixels:
    channels = pixels.shape[2]
    if channels == in_chans:
        return np.ascontiguousarray(pixels)
    if channels == 1 and in_chans == 3:
        return np.repeat(pixels, 3, axis=2)
    if channels == 4 and in_chans == 3:
        return np.ascontiguousarray(pixels[..., :3])
    if channels in (3, 4) and in_chans == 1:
        return np.rint(pixels[..., :3] @ _LUMA).astype(pixels.dtype)[..., None]
    raise CorruptSampleError(f"has {channels} channels, model.in_chans={in_chans}", "channels")


@contextmanager
def _corrupt_sample_errors() -> Iterator[None]:
    """The readers raise anything on broken files; all of it becomes a CorruptSampleError.

    Seen: OSError, ValueError, SyntaxError, TypeError, EOFError, RuntimeError, struct.error,
    zlib.error, DecompressionBombError.
    """
    try:
        yield
    except (CorruptSampleError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        # Pillow's text has the address of the buffer: never the same twice.
        raise CorruptSampleError("not an image of a known format", "not_an_image") from error
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        is_bomb = isinstance(error, Image.DecompressionBombError) or "too large" in text
        kind = "bomb" if is_bomb else "truncated" if "truncated" in text else "corrupt"
        raise CorruptSampleError(text, kind) from error
