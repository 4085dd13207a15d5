"""Bytes to pixels: a whole 8-bit picture, upright, or an error; never half of one."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae_core.data.decode import CorruptSampleError, decode_image

# What must come of each file of bad_inputs that Pillow opens but that is no whole 8-bit picture.
REFUSED = {
    "mode_16bit/16bit.MM.cropped.tif": "mode I;16B is not 8 bits a channel",
    "mode_16bit/16bit.cropped.tif": "mode I;16 is not 8 bits a channel",
    "mode_16bit/hopper_16bit.pgm": "mode I is not 8 bits a channel",
    "mode_16bit/i_trns.png": "mode I;16 is not 8 bits a channel",
    "mode_other/rasterio_float_nan.tif": "mode F is not 8 bits a channel",
    "bad_annotations/BloodImage_00338.xml": "not an image of a known format",
    "bad_annotations/BloodImage_00343.xml": "not an image of a known format",
}
# Files of bad_inputs that are shown with sides exchanged (orientations 5 to 8) and not square.
TURNED = {"orientation_rectangle.jpg", "n02951585_can_opener.JPEG"}


@pytest.fixture(autouse=True)
def _quiet_pillow() -> Iterator[None]:
    """Pillow warns of and logs odd metadata; these tests are about what comes back."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("PIL").setLevel(logging.NOTSET)


def encode(pixels: npt.NDArray[np.uint8], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def make_pixels(height: int = 20, width: int = 30) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_lossless_picture_comes_back_bit_for_bit(kind: str) -> None:
    pixels = make_pixels()
    decoded = decode_image(encode(pixels, kind), 3)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


def test_grey_has_one_channel_and_rgb_three() -> None:
    grey = make_pixels()[..., 0]
    np.testing.assert_array_equal(decode_image(encode(grey, "PNG"), 1), grey[..., None])
    np.testing.assert_array_equal(decode_image(encode(grey, "PNG"), 3), np.stack([grey] * 3, -1))


def test_colour_becomes_grey_by_luma() -> None:
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B.
    colours = np.asarray([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    assert decode_image(encode(colours, "PNG"), 1)[0, :, 0].tolist() == [76, 150, 29, 255]


def test_alpha_is_dropped_not_blended() -> None:
    rgba = np.asarray([[[10, 20, 30, 0], [40, 50, 60, 128]]], np.uint8)
    assert decode_image(encode(rgba, "PNG"), 3).tolist() == [[[10, 20, 30], [40, 50, 60]]]


# Where the top left pixel of the stored picture lies when it is shown: TIFF 6.0, tag 274.
@pytest.mark.parametrize(
    ("orientation", "row", "column", "shape"),
    [
        (1, 0, 0, (2, 3)),
        (2, 0, 2, (2, 3)),
        (3, 1, 2, (2, 3)),
        (4, 1, 0, (2, 3)),
        (5, 0, 0, (3, 2)),
        (6, 0, 1, (3, 2)),
        (7, 2, 1, (3, 2)),
        (8, 2, 0, (3, 2)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_picture_is_upright_as_exif_says(
    kind: str, orientation: int, row: int, column: int, shape: tuple[int, int]
) -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_image(encode(pixels, kind, exif=exif, **options), 3)
    assert decoded.shape == (*shape, 3)
    assert np.argwhere(decoded[..., 0] == 255).tolist() == [[row, column]]


@pytest.mark.parametrize("in_chans", [0, 2, 4])
def test_other_numbers_of_channels_are_refused(in_chans: int) -> None:
    with pytest.raises(CorruptSampleError, match=f"in_chans={in_chans}: only 1 and 3"):
        decode_image(encode(make_pixels(), "PNG"), in_chans)


def test_sixteen_bits_are_refused_not_clipped() -> None:
    deep = np.full((4, 4), 4000, np.uint16)
    with pytest.raises(CorruptSampleError, match="mode I;16 is not 8 bits a channel"):
        decode_image(encode(deep, "PNG"), 1)


def test_formats_that_run_other_programs_are_not_opened() -> None:
    with pytest.raises(CorruptSampleError, match="not an image of a known format"):
        decode_image(encode(make_pixels(), "EPS"), 3)


def test_reason_is_the_same_each_time() -> None:
    for data in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>404</html>"):
        with pytest.raises(CorruptSampleError) as error:
            decode_image(data, 3)
        assert str(error.value) == "not an image of a known format"


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("TIFF", {})],
)
def test_picture_cut_anywhere_is_an_error(kind: str, options: dict[str, Any]) -> None:
    data = encode(make_pixels(48, 48), kind, **options)
    whole = decode_image(data, 3)
    for size in range(0, len(data) - 16, max(1, len(data) // 60)):
        try:
            decoded = decode_image(data[:size], 3)
        except CorruptSampleError:
            continue
        # Only what does not belong to the pixels may be missing.
        np.testing.assert_array_equal(decoded, whole, err_msg=f"cut at {size} of {len(data)}")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "PPM"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_bytes_raise_nothing_but_our_error(
    kind: str, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(encode(make_pixels(), kind))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        decoded = decode_image(bytes(data), 3)
    except CorruptSampleError:
        return
    assert decoded.dtype == np.uint8
    assert decoded.ndim == 3


@pytest.mark.realdata
@pytest.mark.parametrize("in_chans", [1, 3])
def test_each_bad_input_gives_a_whole_picture_or_our_error(real_data: Path, in_chans: int) -> None:
    folder = real_data / "bad_inputs"
    items = json.loads((folder / "manifest.json").read_text())["items"]
    num_pictures = 0
    for item in items:
        path = str(item["path"])
        data = (folder / path).read_bytes()
        if item.get("pillow") != "loads" or path in REFUSED:
            with pytest.raises(CorruptSampleError) as error:
                decode_image(data, in_chans)
            assert str(error.value) == REFUSED.get(path, str(error.value))
            continue
        decoded = decode_image(data, in_chans)
        width, height = item["pillow_open"]["size"]
        if Path(path).name in TURNED:
            width, height = height, width
        assert decoded.shape == (height, width, in_chans), path
        assert decoded.dtype == np.uint8
        num_pictures += 1
    assert (len(items), num_pictures) == (69, 41)


@pytest.mark.realdata
@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 7])
def test_turned_photographs_are_one_photograph(real_data: Path, orientation: int) -> None:
    """Upright, the turned files differ by JPEG's noise alone."""
    folder = real_data / "bad_inputs/exif_rotated"
    upright = decode_image((folder / "hopper_orientation_2.jpg").read_bytes(), 3).astype(int)
    turned = decode_image((folder / f"hopper_orientation_{orientation}.jpg").read_bytes(), 3)
    assert abs(turned - upright).mean() < 8.0  # measured: 3.9; 58 and more if not upright
