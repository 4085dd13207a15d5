import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mae_core.data import pillow_images
from mae_core.data.decode_limits import memory_in_flight
from mae_core.data.pillow_images import decode_pillow, jpeg_orientation
from mae_core.data.pixels import CorruptSampleError, Pixels

SCENE = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)


def decode(data: bytes, in_chans: int) -> Pixels:
    with memory_in_flight():
        return decode_pillow(data, in_chans)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
    ],
)
def test_a_lossless_format_gives_back_the_pixels(kind: str, options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(SCENE[..., :3]), kind, **options)
    np.testing.assert_array_equal(decode(data, 3), SCENE[..., :3])


@pytest.mark.parametrize(
    ("mode", "in_chans", "wanted"),
    [
        ("RGBA", 4, "RGBA"),
        ("RGBA", 3, "RGB"),
        ("RGBA", 1, "L"),
        ("LA", 2, "LA"),
        ("LA", 1, "L"),
        ("L", 1, "L"),
        ("L", 3, "RGB"),
        ("RGB", 4, "RGB"),
        ("1", 1, "L"),
        ("P", 3, "RGB"),
    ],
)
def test_the_mode_follows_the_channels_of_the_model(mode: str, in_chans: int, wanted: str) -> None:
    scene = SCENE if "A" in mode else SCENE[..., :3]
    image = Image.fromarray(scene).convert(mode)
    expected = np.asarray(image.convert(wanted)).reshape(5, 7, -1)
    np.testing.assert_array_equal(decode(encoded(image, "PNG"), in_chans), expected)


def test_16_bits_of_grey_stay_16_bits() -> None:
    deep = np.asarray([[0, 1], [256, 65_535]], np.uint16)
    found = decode(encoded(Image.fromarray(deep), "PNG"), 3)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found[..., 0], deep)


def test_a_large_picture_is_converted_in_strips_without_seams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(Image.fromarray(SCENE), "PNG")
    whole = decode(data, 1)
    monkeypatch.setattr(pillow_images, "_PIXELS_AT_A_TIME", 2 * SCENE.shape[1])
    np.testing.assert_array_equal(decode(data, 1), whole)


def test_a_jpeg_says_how_it_is_to_be_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(SCENE[..., :3])
    assert jpeg_orientation(encoded(image, "JPEG", exif=exif.tobytes())) == 6
    assert jpeg_orientation(encoded(image, "JPEG")) == 1
    assert jpeg_orientation(b"no JPEG") == 1
    assert decode(encoded(image, "PNG", exif=exif.tobytes()), 3).shape == (7, 5, 3)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"%PDF-1.7", "PDF"),
        (b"8BPS", "a Photoshop document"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x20ftypavif", "AVIF"),
        (b"\0\0\0\x20ftypmif1\0\0\0\0heic", "HEIC"),
        (b"\0\0\0\x1cftypisom\0\0\0\0avis", "AVIF"),
    ],
)
def test_a_known_format_that_is_not_read_is_named(start: bytes, name: str) -> None:
    with pytest.raises(CorruptSampleError, match=f"is {name}, which is not read") as raised:
        decode(start + bytes(64), 3)
    assert raised.value.kind == "unsupported"


@pytest.mark.parametrize("data", [b"plain text", bytes(64), b"\0\0\0\x20ftypmp42" + bytes(64)])
def test_what_is_no_image_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(CorruptSampleError, match="not an image of a known format") as raised:
        decode(data, 3)
    assert raised.value.kind == "not_an_image"


def vp8x(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + bytes(4) + b"WEBPVP8X" + bytes(8) + sides


def test_a_webp_that_claims_too_much_is_refused_before_it_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("Pillow would make room for the canvas")

    monkeypatch.setattr(Image, "open", never)
    with pytest.raises(CorruptSampleError, match="claims 16000 x 16000 pixels"):
        decode(vp8x(16_000, 16_000), 3)


def deep_png(rows: int) -> bytes:
    """Write a 16-bit colour PNG whose header claims 2 x 2 but which has `rows` rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(rows * (1 + 2 * 6)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def test_a_png_that_inflates_beyond_its_picture_is_refused() -> None:
    data = deep_png(rows=400)
    with pytest.raises(CorruptSampleError, match="inflates to more than"):
        decode(data, 3)
