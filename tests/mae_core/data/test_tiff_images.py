"""TIFF of any depth is shown as its tags describe, or is unsupported; never shown wrongly."""

import io
from types import SimpleNamespace
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from mae_core.data.decode import decode_image
from mae_core.data.pixels import CorruptSampleError


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 5, 13])
def test_tiffs_of_many_bands_keep_them(planar: str, dtype: type, channels: int) -> None:
    limit = np.iinfo(dtype).max
    pixels = np.random.default_rng(0).integers(0, limit, (8, 12, channels)).astype(dtype)
    stored = pixels if planar == "contig" else np.moveaxis(pixels, -1, 0)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, stored, planarconfig=planar, photometric="minisblack", compression="zlib"
    )
    decoded = decode_image(buffer.getvalue(), channels)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, pixels)
    if channels > 4:
        for in_chans in (1, 3):
            with pytest.raises(
                CorruptSampleError, match=f"has {channels} channels, model.in_chans"
            ):
                decode_image(buffer.getvalue(), in_chans)


def test_a_tiff_that_claims_gigapixels_is_a_bomb() -> None:
    buffer = io.BytesIO()
    pixels = np.zeros((4, 4, 5), np.uint8)
    tifffile.imwrite(buffer, pixels, photometric="minisblack", planarconfig="contig")
    data = buffer.getvalue()
    width = b"\x00\x01\x04\0\x01\0\0\0"  # tag 256, one LONG
    wide = data.replace(width + b"\x04\0\0\0", width + b"\0\0\0\x20")
    assert wide != data
    with pytest.raises(CorruptSampleError) as error:
        decode_image(wide, 5)
    assert error.value.kind == "bomb"


def test_colour_tiffs_keep_sixteen_bits_and_are_turned() -> None:
    pixels = np.random.default_rng(0).integers(0, 65_535, (4, 6, 3)).astype(np.uint16)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="rgb", extratags=[(274, "H", 1, 3, True)])
    decoded = decode_image(buffer.getvalue(), 3)
    assert decoded.dtype == np.uint16
    np.testing.assert_array_equal(decoded, pixels[::-1, ::-1])


def make_tiff(pixels: npt.NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits", "lzma"])
@pytest.mark.parametrize(
    ("photometric", "dtype", "shown"),
    [
        ("miniswhite", np.uint8, 225),
        ("miniswhite", np.uint16, 57_825),
        ("minisblack", np.uint8, 30),
        ("minisblack", np.uint16, 7710),
    ],
)
def test_sixteen_bits_of_a_tiff_show_what_eight_bits_show(
    photometric: str, dtype: type, shown: int, compression: str | None
) -> None:
    stored = np.full((16, 16), 30 if dtype is np.uint8 else 7710, dtype)
    for options in ({}, {"tile": (16, 16)}):
        data = make_tiff(stored, photometric=photometric, compression=compression, **options)
        decoded = decode_image(data, 1)
        assert decoded.dtype == dtype
        assert np.unique(decoded).tolist() == [shown]


@pytest.mark.parametrize(
    ("bits", "stored", "black_is_0", "white_is_0"),
    [
        (1, 1, 255, 0),
        (2, 1, 85, 170),
        (4, 5, 85, 170),
        (10, 341, 21_845, 43_690),
        (12, 1365, 21_845, 43_690),
        (14, 5461, 21_845, 43_690),
    ],
)
def test_bits_of_a_tiff_fill_8_or_16(
    bits: int, stored: int, black_is_0: int, white_is_0: int
) -> None:
    kind = bool if bits == 1 else np.uint8 if bits < 8 else np.uint16
    pixels = np.full((16, 16), stored, kind)
    for photometric, shown in (("minisblack", black_is_0), ("miniswhite", white_is_0)):
        data = make_tiff(pixels, photometric=photometric, bitspersample=bits)
        assert np.unique(decode_image(data, 1)).tolist() == [shown]


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize(
    ("dtype", "unit", "divided"), [(np.uint8, 1, [40, 80, 120]), (np.uint16, 257, [40, 80, 120])]
)
@pytest.mark.parametrize("extra", ["unspecified", "unassalpha", "assocalpha"])
def test_alpha_of_a_tiff_is_left_out_and_taken_out_of_colours(
    extra: str, dtype: type, unit: int, divided: list[int], planar: str
) -> None:
    pixels = np.full((16, 16, 4), [20, 40, 60, 127.5], float) * unit
    stored = pixels.astype(dtype)
    data = make_tiff(
        stored if planar == "contig" else np.moveaxis(stored, -1, 0),
        photometric="rgb",
        planarconfig=planar,
        extrasamples=[extra],
    )
    shown = np.asarray(divided if extra == "assocalpha" else [20, 40, 60]) * unit
    decoded = decode_image(data, 3)
    assert decoded.dtype == dtype
    assert np.abs(decoded[0, 0].astype(int) - shown).max() <= unit
    assert decode_image(data, 4)[0, 0, 3] == stored[0, 0, 3]
    assert decode_image(data, 1).shape == (16, 16, 1)


@pytest.mark.parametrize(
    ("dtype", "unit", "shown"),
    [(np.uint8, 1, [0, 204, 163]), (np.uint16, 257, [0, 52_428, 41_942])],
)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_inks_and_palettes_become_colours(
    dtype: type, unit: int, shown: list[int], planar: str
) -> None:
    inks = np.full((16, 16, 4), np.asarray([255, 0, 51, 51]) * unit, dtype)
    stored = inks if planar == "contig" else np.moveaxis(inks, -1, 0)
    data = make_tiff(stored, photometric="separated", planarconfig=planar)
    assert decode_image(data, 3)[0, 0].tolist() == shown
    colours = np.zeros((3, 2 ** (8 * np.dtype(dtype).itemsize)), np.uint16)
    colours[:, 7] = 0, 65_535, 257
    data = make_tiff(np.full((16, 16), 7, dtype), photometric="palette", colormap=colours)
    full, one = (255, 1) if dtype is np.uint8 else (65_535, 257)
    assert decode_image(data, 3)[0, 0].tolist() == [0, full, one]


DEEP_COLOUR = np.full((16, 16, 3), 9, np.uint16)


@pytest.mark.parametrize(
    ("pixels", "options", "in_chans", "told"),
    [
        (np.ones((16, 16), np.float32), {}, 1, "floating point"),
        (np.full((16, 16), -1, np.int8), {}, 1, "only whole numbers"),
        (DEEP_COLOUR, {"photometric": "cielab"}, 3, "photometric interpretation 8"),
        (DEEP_COLOUR, {"photometric": "ycbcr"}, 3, "photometric interpretation 6"),
        (np.ones((16, 16, 5), np.uint8), {"photometric": "miniswhite"}, 5, "low values are white"),
        (DEEP_COLOUR.astype(np.uint8), {"compression": "jpeg2000"}, 3, "by JPEG2000, which is not"),
        (DEEP_COLOUR.astype(np.uint8), {"compression": "webp"}, 3, "gdal_translate -co COMPRESS"),
    ],
)
def test_a_tiff_that_can_not_be_shown_as_it_means_is_unsupported(
    pixels: npt.NDArray[Any], options: dict[str, Any], in_chans: int, told: str
) -> None:
    options = {"photometric": "rgb" if pixels.shape[-1] == 3 else "minisblack"} | options
    if pixels.ndim == 3:
        options["planarconfig"] = "contig"
    with pytest.raises(CorruptSampleError, match=told) as error:
        decode_image(make_tiff(pixels, **options), in_chans)
    assert error.value.kind == "unsupported"


def test_bands_that_are_grey_are_no_colours() -> None:
    data = make_tiff(
        np.ones((16, 16, 4), np.uint16), photometric="minisblack", planarconfig="contig"
    )
    with pytest.raises(CorruptSampleError, match=r"has 4 channels, model\.in_chans=3"):
        decode_image(data, 3)


def test_a_codec_that_is_not_installed_is_no_broken_data(monkeypatch: pytest.MonkeyPatch) -> None:
    bands = {"photometric": "minisblack", "planarconfig": "contig"}
    data = make_tiff(np.ones((16, 16, 6), np.uint8), compression="lzw", **bands)
    assert decode_image(data, 6).shape == (16, 16, 6)
    monkeypatch.setattr(imagecodecs, "LZW", SimpleNamespace(available=False))
    with pytest.raises(CorruptSampleError, match="pip install imagecodecs, or gdal_tr") as error:
        decode_image(data, 6)
    assert error.value.kind == "unsupported"


def test_jpeg_in_a_tiff_is_its_picture() -> None:
    small = np.random.default_rng(0).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((64, 64))
    files = [make_tiff(np.asarray(picture), photometric="rgb", compression="jpeg")]
    for mode in ("RGB", "YCbCr"):
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, "TIFF", compression="jpeg", quality=90)
        files.append(buffer.getvalue())
    for data in files:
        off = decode_image(data, 3).astype(int) - np.asarray(picture)
        assert np.abs(off).mean() < 3
