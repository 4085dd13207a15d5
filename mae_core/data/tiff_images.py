"""Decode TIFF with any number of bands, as its tags describe it.

Pillow reads files with 8 bits or less and no bands beyond colour and alpha; tifffile and
imagecodecs read the rest. A file that neither can show correctly is refused, never shown wrongly.

Source: TIFF 6.0; its supplements by Adobe for the compressions 7, 8 and 32946.
"""

import math
import struct
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from mae_core.data.decode_limits import (
    WatchedBytes,
    check_size,
    check_tiff_directory,
    hold_memory,
)
from mae_core.data.pillow_images import decode_pillow
from mae_core.data.pixels import CorruptSampleError, Pixels, scale_to_full, to_unsigned, upright

_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE, _CMYK, _YCBCR, _CIELAB = 0, 1, 2, 3, 5, 6, 8
_COLOURS = {
    _MIN_IS_WHITE: 1,
    _MIN_IS_BLACK: 1,
    _RGB: 3,
    _PALETTE: 1,
    _CMYK: 4,
    _YCBCR: 3,
    _CIELAB: 3,
}
_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA = 1, 2  # values of ExtraSamples
_JPEGS = (6, 7)
# Compressions that inflate into a buffer of known size, and the codec that each needs.
_CODECS = {
    1: None,
    2: "CCITTRLE",
    3: "CCITTFAX3",
    4: "CCITTFAX4",
    5: "LZW",
    6: "JPEG8",
    7: "JPEG8",
    8: "ZLIB",
    32773: "PACKBITS",
    32946: "ZLIB",
    34925: "LZMA",
    50000: "ZSTD",
}
_WAY_OUT = "gdal_translate -co COMPRESS=DEFLATE writes one that is read"
_LARGEST_SEGMENT_BYTES = 2**26  # of a picture that is smaller than this
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3)


class _Layout(NamedTuple):
    """What a page's tags say about its samples."""

    photometric: int
    bits: int
    num_samples: int
    extra_samples: tuple[int, ...]
    compression: int

    @property
    def num_colours(self) -> int:
        return _COLOURS[self.photometric]

    @property
    def has_alpha(self) -> bool:
        """Whether the last sample is alpha and not a band of its own.

        A fourth sample of a colour picture counts as alpha whatever the file calls it, as in all
        other formats.
        """
        if self.extra_samples[-1:] in ((_ASSOCIATED_ALPHA,), (_UNASSOCIATED_ALPHA,)):
            return self.num_samples > self.num_colours
        return self.num_colours >= 3 and self.num_samples == self.num_colours + 1


def missing_codecs() -> list[str]:
    """List the TIFF compressions that this installation can't read."""
    return sorted({name for name in _CODECS.values() if name is not None and not _has_codec(name)})


def decode_tiff(data: bytes, in_chans: int) -> Pixels:
    """Decode the first page to (H, W, C) pixels, upright.

    Args:
        data: The file's bytes.
        in_chans: Number of channels that the model takes; alpha is dropped unless it is included.

    Raises:
        CorruptSampleError: The file exceeds the limits, or can't be shown correctly.
    """
    check_tiff_directory(data)
    with tifffile.TiffFile(WatchedBytes(data)) as tiff:
        page: Any = tiff.pages[0]
        layout = _layout(page)
        _check_claims(page, layout)
        _check_codec(page, layout)
        if in_chans in (1, 3) and _is_for_pillow(page, layout):
            return decode_pillow(data, in_chans)
        if page.sampleformat not in (1, 2) or page.dtype is None or layout.bits > 32:
            kind = "floating point" if page.sampleformat == 3 else f"format {page.sampleformat}"
            raise _unsupported(
                f"is a TIFF of {layout.bits}-bit samples of {kind}: only whole numbers from 0 to "
                "65535"
            )
        if layout.compression in _JPEGS:
            _check_jpegs(page, data)
        hold_memory(3 * page.nbytes)
        pixels = page.asarray(maxworkers=1)
        if page.axes.startswith("S"):  # bands are stored one after the other
            pixels = np.moveaxis(pixels, 0, -1)
        orientation = page.tags.valueof(274) or 1
        colours = page.colormap
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise _unsupported(f"is a TIFF of axes {page.axes}")
    shown = _shown(pixels, layout, colours, in_chans)
    return upright(shown, orientation if orientation in range(1, 9) else 1)


def _unsupported(what: str) -> CorruptSampleError:
    return CorruptSampleError(what, "unsupported")


def _layout(page: Any) -> _Layout:
    bits, photometric = page.bitspersample, page.tags.valueof(262)
    if isinstance(bits, tuple):
        raise _unsupported(f"is a TIFF of {bits} bits a sample")
    if photometric is None:  # guess as libtiff does
        photometric = _RGB if page.samplesperpixel in (3, 4) else _MIN_IS_BLACK
    if int(photometric) not in _COLOURS:
        raise _unsupported(f"is a TIFF of photometric interpretation {photometric!r}")
    return _Layout(
        int(photometric),
        bits,
        page.samplesperpixel,
        tuple(int(kind) for kind in page.extrasamples),
        int(page.compression),
    )


def _check_claims(page: Any, layout: _Layout) -> None:
    """Raise a CorruptSampleError if the page or its segments claim too large a size."""
    pixel_bytes = math.ceil(layout.num_samples * layout.bits / 8)
    check_size(page.imagelength, page.imagewidth, max(pixel_bytes, 1))
    page_bytes = max(page.nbytes, page.imagelength * page.imagewidth * pixel_bytes)
    check_size(1, 1, page_bytes)
    if not page.is_tiled:
        return
    bands = layout.num_samples if int(page.planarconfig) == 1 else 1
    # Size of a tile in memory, where a bit takes a byte.
    tile_bytes = page.tiledepth * page.tilelength * page.tilewidth * bands
    tile_bytes *= max(1, layout.bits // 8)
    room = _LARGEST_SEGMENT_BYTES + 8 * page_bytes
    if tile_bytes > room or tile_bytes * len(page.dataoffsets) > 2 * room:
        raise CorruptSampleError(
            f"claims {len(page.dataoffsets)} tiles of {tile_bytes} bytes for a picture of "
            f"{page_bytes}",
            "bomb",
        )


def _is_for_pillow(page: Any, layout: _Layout) -> bool:
    """Return whether Pillow shows the whole picture correctly."""
    if layout.bits > 8 or page.sampleformat != 1 or page.tags.valueof(262) is None:
        return False
    if layout.photometric == _YCBCR and layout.compression == 1 and page.is_subsampled:
        return False  # Pillow would read band after band as if it were pixel after pixel
    if layout.num_samples == layout.num_colours:
        return layout.num_samples == 1 or int(page.planarconfig) == 1
    # Pillow can read alpha only in RGB pictures.
    four_samples = layout.photometric == _RGB and layout.num_samples == 4
    return four_samples and int(page.planarconfig) == 1


def _has_codec(name: str) -> bool:
    codec = getattr(imagecodecs, name, None)
    return codec is not None and bool(codec.available)


def _check_codec(page: Any, layout: _Layout) -> None:
    name = _CODECS.get(layout.compression, "")
    if name == "":
        method = getattr(page.compression, "name", page.compression)
        raise _unsupported(f"is a TIFF compressed by {method}, which is not read; {_WAY_OUT}")
    if name is not None and not _has_codec(name):
        raise _unsupported(
            f"is a TIFF compressed by {page.compression.name}, which this installation can't "
            f"read: pip install imagecodecs, or {_WAY_OUT}"
        )


def _check_jpegs(page: Any, data: bytes) -> None:
    """Raise a CorruptSampleError if a JPEG in the page is larger than its segment."""
    sides = (page.tilelength, page.tilewidth) if page.is_tiled else page.shape[:2]
    if not page.is_tiled and page.axes.startswith("S"):
        sides = page.shape[1:3]
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        at, end = offset + 2, offset + count
        while at + 9 <= min(end, len(data)) and data[at] == 0xFF:
            marker, length, _, height, width = struct.unpack_from(">xBHBHH", data, at)
            if marker in _JPEG_FRAMES and (height > sides[0] or width > sides[1]):
                raise CorruptSampleError(
                    f"holds a JPEG of {height} x {width} pixels for {sides[0]} x {sides[1]}",
                    "bomb",
                )
            if marker in _JPEG_FRAMES or length < 2:
                break
            at += 2 + length


def _shown(
    pixels: npt.NDArray[Any], layout: _Layout, colours: npt.NDArray[Any] | None, in_chans: int
) -> Pixels:
    """Convert samples so that high is bright, colours are RGB and alpha is separate."""
    num_samples = pixels.shape[2]
    photometric = layout.photometric
    if photometric == _YCBCR and layout.compression in _JPEGS:
        photometric = _RGB  # imagecodecs has converted them
    what = f"is a TIFF of {pixels.dtype}"
    shown = to_unsigned(pixels.view(np.uint8) if pixels.dtype == bool else pixels, what)
    if photometric == _PALETTE and colours is not None and num_samples == 1:
        return _looked_up(shown, colours)
    if photometric == _MIN_IS_WHITE:
        shown = _negative(shown, layout, pixels.dtype.kind)
    if layout.bits <= 16 and pixels.dtype.kind != "i":
        shown = scale_to_full(shown, layout.bits)
    if layout.has_alpha and layout.extra_samples[-1:] == (_ASSOCIATED_ALPHA,):
        shown = _without_alpha_in_colours(shown)
    if in_chans == num_samples and photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB):
        return shown
    if layout.has_alpha:
        shown = shown[..., :-1]
    if photometric == _CMYK and shown.shape[2] == 4:
        return _from_inks(shown)
    if photometric not in (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB):
        raise _unsupported(
            f"is a TIFF of photometric interpretation {photometric} with {num_samples} samples "
            f"of {layout.bits} bits"
        )
    return shown


def _negative(pixels: Pixels, layout: _Layout, kind: str) -> Pixels:
    if layout.num_samples - layout.has_alpha > 1:
        raise _unsupported(f"is a TIFF of {layout.num_samples} bands whose low values are white")
    if layout.bits > 16 or kind == "i":
        raise _unsupported("is a TIFF whose low values are white, signed or of more than 16 bits")
    turned = pixels.copy()
    turned[..., 0] = (2**layout.bits - 1) - turned[..., 0]
    return turned


def _looked_up(indices: Pixels, colours: npt.NDArray[Any]) -> Pixels:
    """Look up palette colours: 16 bits, or 8 if the palette uses no more."""
    if int(indices.max()) >= colours.shape[1]:
        raise CorruptSampleError(f"has colours beyond its palette of {colours.shape[1]}")
    table = colours.astype(np.uint16)
    if indices.dtype == np.uint8:  # as Pillow does
        table = (table >> 8).astype(np.uint8)
    shown: Pixels = table.T[indices[..., 0]]
    return shown


def _without_alpha_in_colours(pixels: Pixels) -> Pixels:
    """Divide colours by the alpha that they were multiplied by; the last channel is alpha."""
    limit = np.iinfo(pixels.dtype).max
    alpha = np.maximum(pixels[..., -1:], 1).astype(np.float32)
    divided = np.minimum(np.rint(pixels[..., :-1] * (limit / alpha)), limit).astype(pixels.dtype)
    return np.concatenate([divided, pixels[..., -1:]], axis=2)


def _from_inks(pixels: Pixels) -> Pixels:
    """Convert cyan, magenta, yellow and black to RGB; each ink absorbs its share of the light."""
    limit = np.iinfo(pixels.dtype).max
    left = (limit - pixels).astype(np.float32)
    return np.rint(left[..., :3] * left[..., 3:] / limit).astype(pixels.dtype)
