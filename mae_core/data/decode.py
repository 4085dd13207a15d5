"""Decode the bytes of one image to pixels.

simplejpeg (libjpeg-turbo) decodes JPEG, pydicom DICOM, tifffile the TIFFs that Pillow can't read as
a whole, and Pillow everything else. 8 bits stay uint8 and 16 bits stay uint16 up to the device.
"""

import logging
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from mae_core.data.decode_limits import MAX_PIXELS, hold_memory, memory_in_flight
from mae_core.data.dicom_images import decode_dicom
from mae_core.data.pillow_images import decode_pillow, jpeg_orientation
from mae_core.data.pixels import CorruptSampleError, Pixels, upright
from mae_core.data.tiff_images import decode_tiff

SHRINKS = (8, 4, 2)  # libjpeg-turbo decodes to these fractions of the size faster than in full

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# A JPEG segment: 0xFF, marker, length; a frame goes on with bits, height, width, channels.
_SEGMENT = struct.Struct(">BBHBHHB")
_START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF)  # lossless, hierarchical
_PROGRESSIVE = 0xC2
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_APP1 = 0xE1
_SAY_ORIENTATION = (b"Exif\0", b"tiff:Orientation")
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # markers that can't be part of coded data
# Each scan may cover the whole picture, and each segment costs one turn of a loop. Encoders write
# up to a dozen scans; extended XMP and colour profiles take up to a few hundred segments.
_MAX_SCANS, _MAX_SEGMENTS = 200, 2000
# Parts of the decoders' messages for data that inflates to more than its buffer holds.
_INFLATES_FURTHER = (
    "data too large",
    "Too much memory",
    "Z_BUF_ERROR",
    "SUFFICIENT_SPACE",
    "TOO_SMALL",
    "too small",
)
_LUMA = np.asarray([0.299, 0.587, 0.114])  # ITU-R 601

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # faults of a file are raised instead
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


class JpegHeader(NamedTuple):
    """The facts in a JPEG's header."""

    height: int  # as stored
    width: int
    orientation: int  # TIFF 6.0, tag 274; 1 means as stored


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the header of a grey or colour JPEG that libjpeg-turbo reads; None for anything else.

    Only the segments before the first scan are read, which are few; searching the whole file
    costs more (0.1 ms).

    Raises:
        CorruptSampleError: The file has more segments or scans than any camera or program writes.
    """
    if data[:2] != b"\xff\xd8":
        return None
    size, may_turn, can_read, at = None, False, True, 2
    frame = num_channels = num_segments = 0
    while at + _SEGMENT.size <= len(data):
        mark, marker, length, precision, height, width, channels = _SEGMENT.unpack_from(data, at)
        if mark != 0xFF:  # also after a length below 2, which points to its own bytes
            return None
        num_segments += 1
        if num_segments > _MAX_SEGMENTS:
            raise CorruptSampleError(f"has more than {_MAX_SEGMENTS} segments", "bomb")
        end = at + 2 + length
        if marker == _START_OF_SCAN:
            # The byte after the length is the number of channels in the scan.
            if frame == _PROGRESSIVE or precision < num_channels:
                _check_scans(data, at)
            break
        if marker in _START_OF_FRAME:
            size, frame, num_channels = (height, width), marker, channels
            can_read = precision == 8 and channels in (1, 3) and 0 < height * width <= MAX_PIXELS
        elif marker == _APP1:
            may_turn = may_turn or any(data.find(name, at, end) >= 0 for name in _SAY_ORIENTATION)
        at = end
    if size is None or not can_read:
        return None
    return JpegHeader(*size, jpeg_orientation(data) if may_turn else 1)


def _check_scans(data: bytes, at: int) -> None:
    """Raise a CorruptSampleError if more scans follow byte `at` than any encoder writes."""
    num_scans = 0
    while (found := _MARKER.search(data, at)) is not None:
        at = found.start()
        if data[at + 1] == _END_OF_IMAGE:
            return
        num_scans += data[at + 1] == _START_OF_SCAN
        if num_scans > _MAX_SCANS:
            raise CorruptSampleError(f"has more than {_MAX_SCANS} scans", "bomb")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def decode_image(
    data: bytes, in_chans: int, *, shrink: int = 1, header: JpegHeader | None = None
) -> Pixels:
    """Return (H, W, in_chans) uint8 or uint16 pixels, rotated upright by EXIF.

    Grey is repeated for three channels and colour becomes grey by its luma. Alpha is dropped
    unless `in_chans` includes it. Any other number of channels must equal `in_chans`.

    Args:
        data: The file's bytes.
        in_chans: Number of channels that the model takes.
        shrink: 2, 4 or 8 allows a plain JPEG to be decoded at that fraction of its size, rounded
            up, which is faster.
        header: The result of `jpeg_header` if it is known already.

    Raises:
        CorruptSampleError: The bytes are not a whole image, or have other channels.
    """
    with memory_in_flight(), _corrupt_sample_errors():
        header = (header or jpeg_header(data)) if in_chans in (1, 3) else None
        if header is not None:
            pixels = _decode_jpeg(data, in_chans, header, shrink if header.orientation == 1 else 1)
            if pixels is not None:
                return np.ascontiguousarray(upright(pixels, header.orientation))
        if not data:
            raise CorruptSampleError("holds no bytes", "empty")
        if data.startswith(b"version https://git-lfs"):
            raise CorruptSampleError("is a Git LFS pointer, not the file itself", "lfs_pointer")
        return _to_channels(_decode_other(data, in_chans), in_chans)


def _decode_other(data: bytes, in_chans: int) -> Pixels:
    if data[128:132] == b"DICM":
        return decode_dicom(data)
    if data[:4] in _TIFF_MAGIC:
        return decode_tiff(data, in_chans)
    _check_jpeg_kind(data)
    return decode_pillow(data, in_chans)


def _check_jpeg_kind(data: bytes) -> None:
    """Raise a CorruptSampleError for valid kinds of JPEG that Pillow can't decode."""
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + _SEGMENT.size <= len(data):
        mark, marker, length, precision, *_ = _SEGMENT.unpack_from(data, at)
        if mark != 0xFF or marker == _START_OF_SCAN:
            return
        if marker in _OTHER_FRAMES or (marker in _START_OF_FRAME and precision not in (0, 8)):
            what = "lossless or hierarchical" if marker in _OTHER_FRAMES else f"{precision}-bit"
            raise CorruptSampleError(
                f"is a {what} JPEG, which is not read; convert it to PNG or TIFF", "unsupported"
            )
        at += 2 + length


def _decode_jpeg(data: bytes, in_chans: int, header: JpegHeader, shrink: int) -> Pixels | None:
    """Decode a JPEG with libjpeg-turbo; return None where Pillow may do better.

    After data that ends early or makes no sense, libjpeg continues with grey, and Pillow does not
    notice its warning. Such a file must not pass as a picture.
    """
    hold_memory(_jpeg_bytes(data, in_chans, header, shrink))
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data,
            "RGB" if in_chans == 3 else "GRAY",
            fastdct=True,
            fastupsample=True,
            min_height=-(-header.height // shrink) if shrink > 1 else 0,
            min_width=-(-header.width // shrink) if shrink > 1 else 0,
        )
    except MemoryError:
        raise
    except Exception as error:
        text = str(error)
        if "remature end" in text:
            raise CorruptSampleError(text, "truncated") from error
        if any(harm in text for harm in ("Huffman", "instead of RST", "progress")):
            raise CorruptSampleError(text, "corrupt") from error
        return None  # for example a broken colour profile, or bytes between the segments
    return pixels


def _jpeg_bytes(data: bytes, in_chans: int, header: JpegHeader, shrink: int) -> int:
    """Estimate the memory for decoding: the pixels, and all coefficients of a progressive JPEG."""
    num_pixels = header.height * header.width
    num_bytes = num_pixels * in_chans // shrink**2
    if num_bytes + 6 * num_pixels > 2**25 and b"\xff\xc2" in data[: 2**16]:
        num_bytes += 2 * in_chans * num_pixels
    return num_bytes


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Encode (H, W, 1 or 3) uint8 pixels as JPEG, with full colour resolution from quality 90."""
    colorspace = "GRAY" if pixels.shape[2] == 1 else "RGB"
    subsampling = "444" if quality >= 90 and colorspace == "RGB" else "420"
    if colorspace == "GRAY":
        subsampling = "Gray"
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality, colorspace, subsampling, fastdct=False
    )
    return data


def _to_channels(pixels: Pixels, in_chans: int) -> Pixels:
    channels = pixels.shape[2]
    if channels == in_chans:
        return np.ascontiguousarray(pixels)
    if channels == 1 and in_chans == 3:
        return np.repeat(pixels, 3, axis=2)
    if channels == 3 and in_chans == 1:
        return np.rint(pixels @ _LUMA).astype(pixels.dtype)[..., None]
    raise CorruptSampleError(f"has {channels} channels, model.in_chans={in_chans}", "channels")


@contextmanager
def _corrupt_sample_errors() -> Iterator[None]:
    """Turn every error that the decoders raise for broken files into a CorruptSampleError.

    Observed: OSError, ValueError, SyntaxError, TypeError, EOFError, RuntimeError, RecursionError,
    struct.error, zlib.error, DecompressionBombError.
    """
    try:
        yield
    except CorruptSampleError:
        raise
    except MemoryError as error:
        raise CorruptSampleError("needs more memory than there is", "memory") from error
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        is_bomb = isinstance(error, Image.DecompressionBombError) or any(
            sign in text for sign in _INFLATES_FURTHER
        )
        kind = "bomb" if is_bomb else "truncated" if "truncated" in text else "corrupt"
        raise CorruptSampleError(text, kind) from error
