"""Bytes to pixels: a whole picture, upright, or an error; never half of one."""

import io
import json
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae_core.data.decode import decode_image, encode_jpeg, jpeg_header
from mae_core.data.pixels import CorruptSampleError
from mae_core.data.samples import iter_samples

# Files in bad_inputs that Pillow opens and we refuse, and vice versa.
REFUSED = {"mode_other/rasterio_float_nan.tif", "corrupt/derived_bitflips.jpg"}
READ_WITHOUT_PILLOW = {"mode_16bit/rasterio_RGBA.uint16.tif": (3, 4)}
DEEP = {f"mode_16bit/{name}" for name in ("16bit.MM.cropped.tif", "16bit.cropped.tif")} | {
    "mode_16bit/hopper_16bit.pgm",
    "mode_16bit/i_trns.png",
}
# The kinds by which broken files are counted.
KINDS = {
    "truncated/truncated_jpeg.jpg": "truncated",
    "truncated/derived_cut60.jpg": "truncated",
    "wrong_ext/derived_empty.jpg": "empty",
    "lfs_pointer/agricultural00.tif": "lfs_pointer",
    "lfs_pointer/AnnualCrop_1.tif": "lfs_pointer",
    "bomb/decompression_bomb.gif": "bomb",
    "bomb/png_decompression_dos.png": "bomb",
    "corrupt/broken.png": "not_an_image",
    "bad_annotations/BloodImage_00338.xml": "not_an_image",
    "mode_other/rasterio_float_nan.tif": "unsupported",
}
# Files in bad_inputs that are not square and are shown rotated (orientations 5 to 8).
TURNED = {"orientation_rectangle.jpg", "n02951585_can_opener.JPEG"}


@pytest.fixture(autouse=True)
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings about odd metadata; these tests are about the pixels."""
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


@pytest.mark.parametrize("in_chans", [2, 4, 13])
def test_other_numbers_of_channels_are_refused(in_chans: int) -> None:
    with pytest.raises(CorruptSampleError, match=f"3 channels, model.in_chans={in_chans}") as error:
        decode_image(encode(make_pixels(), "PNG"), in_chans)
    assert error.value.kind == "channels"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_kept(kind: str) -> None:
    deep = np.asarray([[0, 255, 256], [4000, 40_000, 65_535]], np.uint16)
    for in_chans in (1, 3):
        decoded = decode_image(encode(deep, kind), in_chans)
        assert decoded.dtype == np.uint16
        assert decoded.shape == (2, 3, in_chans)
        assert (decoded == deep[..., None]).all()


def psnr(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9)))


@pytest.mark.parametrize("orientation", [1, 6])
def test_colour_pngs_keep_sixteen_bits_and_alpha_where_it_counts(orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 65_535, (5, 7, 4)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data: bytes = imagecodecs.png_encode(pixels)
    payload = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(payload) - 4) + payload + struct.pack(">I", zlib.crc32(payload))
    data = data[:33] + chunk + data[33:]
    shown = pixels if orientation == 1 else pixels.swapaxes(0, 1)[:, ::-1]
    np.testing.assert_array_equal(decode_image(data, 4), shown)
    np.testing.assert_array_equal(decode_image(data, 3), shown[..., :3])
    assert decode_image(data, 1).dtype == np.uint16


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_stays_where_the_model_takes_it(kind: str) -> None:
    rgba = np.full((4, 4, 4), [10, 20, 30, 128], np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(rgba, kind, **options)
    assert decode_image(data, 4)[0, 0].tolist() == [10, 20, 30, 128]
    with pytest.raises(CorruptSampleError, match=r"3 channels, model\.in_chans=4"):
        decode_image(encode(rgba[..., :3].copy(), kind, **options), 4)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(99), "is HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(99), "is AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0avifmif1" + bytes(99), "is AVIF"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "is JPEG 2000"),
        (b"\xff\x4f\xff\x51" + bytes(99), "is JPEG 2000"),
        (b"\xff\x0a" + bytes(99), "is JPEG XL"),
        (b"\xff\xd8\xff\xc3\0\x11\x08\0\x08\0\x08\x03" + bytes(99), "lossless"),
        (b"\xff\xd8\xff\xc1\0\x11\x0c\0\x08\0\x08\x03" + bytes(99), "12-bit JPEG"),
    ],
)
def test_a_known_format_that_is_not_read_is_named(data: bytes, told: str) -> None:
    with pytest.raises(CorruptSampleError, match=f"{told}.* not read; convert it to") as error:
        decode_image(data, 3)
    assert error.value.kind == "unsupported"


@pytest.mark.parametrize("options", [{"quality": 95}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_is_the_picture_that_pillow_shows(options: dict[str, Any]) -> None:
    pixels = np.asarray(Image.fromarray(make_pixels(8, 10)).resize((200, 160)))
    data = encode(pixels, "JPEG", **options)
    assert jpeg_header(data) == (160, 200, 1)
    with Image.open(io.BytesIO(data)) as image:
        assert psnr(decode_image(data, 3), np.asarray(image)) > 35
        grey = np.asarray(image.convert("L"))[..., None]
    assert psnr(decode_image(data, 1), grey) > 35


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_jpeg_can_come_out_smaller(shrink: int) -> None:
    pixels = np.asarray(Image.fromarray(make_pixels(8, 10)).resize((201, 162)))
    data = encode(pixels, "JPEG")
    small = decode_image(data, 3, shrink=shrink)
    assert small.shape == (-(-162 // shrink), -(-201 // shrink), 3)
    with Image.open(io.BytesIO(data)) as image:
        means = np.asarray(image.reduce(shrink))
    assert psnr(small[:-1, :-1], means[: len(small) - 1, : small.shape[1] - 1]) > 30


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("tail", [b"\xff\xd9", b"\0" * 900])
def test_half_a_jpeg_that_ends_well_is_no_picture(orientation: int, tail: bytes) -> None:
    """Test that it is refused, although Pillow silently shows the rest of it grey."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(make_pixels(64, 96), "JPEG", exif=exif)
    with pytest.raises(CorruptSampleError) as error:
        decode_image(data[: len(data) // 2] + tail, 3)
    assert error.value.kind in {"truncated", "corrupt"}


def test_xmp_turns_a_jpeg_too() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(make_pixels(24, 40), "JPEG", xmp=xmp)
    assert jpeg_header(data) == (24, 40, 6)
    assert decode_image(data, 3).shape == (40, 24, 3)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_header_is_read_as_libjpeg_reads_it_or_not_at_all(data: st.DataObject) -> None:
    whole = encode(make_pixels(24, 40), "JPEG", exif=Image.Exif(), comment=b"by hand")
    at = data.draw(st.integers(0, 700))
    harm = data.draw(st.binary(min_size=1, max_size=3))
    damaged = whole[:at] + harm + whole[at + data.draw(st.integers(0, 3)) :]
    header = jpeg_header(damaged)
    with suppress(ValueError, KeyError):  # libjpeg sees no picture
        height, width, *_ = simplejpeg.decode_jpeg_header(damaged, strict=False)
        assert header is None or header[:2] == (height, width)


def test_half_a_header_is_none() -> None:
    whole = encode(make_pixels(24, 40), "JPEG", comment=b"by hand")
    known = [jpeg_header(whole[:cut]) for cut in range(len(whole))]
    assert known == sorted(known, key=bool)  # from some byte on
    assert set(known) == {None, (24, 40, 1)}


def test_a_segment_of_no_length_is_no_header() -> None:
    whole = encode(make_pixels(24, 40), "JPEG")
    assert jpeg_header(whole[:2] + b"\xff\xfe\0\0" + whole[2:]) is None


def test_an_orientation_counts_whatever_comes_after_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b"<x:xmpmeta>of a camera</x:xmpmeta>"
    data = encode(make_pixels(24, 40), "JPEG", exif=exif, xmp=xmp)
    assert data.index(b"Exif\0") < data.index(xmp)
    assert jpeg_header(data) == (24, 40, 6)


def test_an_orientation_after_the_frame_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(make_pixels(24, 40), "JPEG", exif=exif)
    app1 = data.index(b"\xff\xe1")
    end = app1 + 2 + int.from_bytes(data[app1 + 2 : app1 + 4], "big")
    scan = data.index(b"\xff\xda")
    moved = data[:app1] + data[end:scan] + data[app1:end] + data[scan:]
    assert jpeg_header(moved) == (24, 40, 6)
    assert decode_image(moved, 3).shape == (40, 24, 3)


def test_a_turned_jpeg_comes_whole_and_cmyk_is_for_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(make_pixels(), "JPEG", exif=exif)
    assert jpeg_header(data) == (20, 30, 6)
    assert decode_image(data, 3, shrink=2).shape == (30, 20, 3)
    buffer = io.BytesIO()
    Image.fromarray(make_pixels()).convert("CMYK").save(buffer, "JPEG")
    assert jpeg_header(buffer.getvalue()) is None
    assert decode_image(buffer.getvalue(), 3).shape == (20, 30, 3)


def test_jpeg_comes_back_from_our_encoder() -> None:
    pixels = np.asarray(Image.fromarray(make_pixels(8, 10)).resize((200, 160)))
    for channels in (1, 3):
        data = encode_jpeg(pixels[..., :channels], 95)
        assert psnr(decode_image(data, channels), pixels[..., :channels]) > 35


def test_formats_that_run_other_programs_are_not_opened() -> None:
    with pytest.raises(CorruptSampleError, match="not an image of a known format"):
        decode_image(encode(make_pixels(), "EPS"), 3)


def test_reason_is_the_same_each_time() -> None:
    for data, told, kind in (
        (b"", "holds no bytes", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer", "lfs_pointer"),
        (b"<html>404</html>", "not an image of a known format", "not_an_image"),
    ):
        with pytest.raises(CorruptSampleError, match=told) as error:
            decode_image(data, 3)
        assert error.value.kind == kind


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


@settings(max_examples=300)
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
        if path in READ_WITHOUT_PILLOW:
            assert decode_image(data, in_chans).dtype == np.uint16
            num_pictures += 1
            continue
        if item.get("pillow") != "loads" or path in REFUSED:
            with pytest.raises(CorruptSampleError) as error:
                decode_image(data, in_chans)
            assert error.value.kind == KINDS.get(path, error.value.kind), path
            continue
        decoded = decode_image(data, in_chans)
        width, height = item["pillow_open"]["size"]
        if Path(path).name in TURNED:
            width, height = height, width
        assert decoded.shape == (height, width, in_chans), path
        assert decoded.dtype == (np.uint16 if path in DEEP else np.uint8), path
        num_pictures += 1
    assert (len(items), num_pictures) == (69, 45)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("shard", "dtype"),
    [
        ("sentinel2_8band/train-000000.tar", np.uint8),
        ("landsat7_8band/train-000000.tar", np.uint16),
    ],
)
def test_real_satellite_images_keep_their_bands(real_data: Path, shard: str, dtype: type) -> None:
    with (real_data / "multichannel" / shard).open("rb") as stream:
        for sample in iter_samples(stream, shard):
            decoded = decode_image(sample.image, 8)
            assert decoded.shape[2] == 8
            assert decoded.dtype == dtype


@pytest.mark.realdata
@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 7])
def test_turned_photographs_are_one_photograph(real_data: Path, orientation: int) -> None:
    """Upright, the turned files differ by JPEG's noise alone."""
    folder = real_data / "bad_inputs/exif_rotated"
    upright = decode_image((folder / "hopper_orientation_2.jpg").read_bytes(), 3).astype(int)
    turned = decode_image((folder / f"hopper_orientation_{orientation}.jpg").read_bytes(), 3)
    assert abs(turned - upright).mean() < 8.0  # measured: 3.9; 58 and more if not upright
