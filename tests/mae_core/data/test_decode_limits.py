"""Files that claim or inflate to too much are refused at once, in every format."""

import io
import struct
import threading
import zlib
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from mae_core.data import decode, decode_limits
from mae_core.data.decode import decode_image
from mae_core.data.decode_limits import hold_memory, memory_in_flight
from mae_core.data.pixels import CorruptSampleError
from mae_core.data.views import ViewSpec, training_view

INFLATED_BYTES = 2**26  # of 64 KiB


def deflated(num_bytes: int = INFLATED_BYTES) -> bytes:
    return zlib.compress(bytes(num_bytes), 9)


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def make_png(
    extra: bytes = b"", data: bytes | None = None, *, side: int = 8, bits: int = 8
) -> bytes:
    """Write a black PNG in colour, with chunks before its pixels."""
    header = struct.pack(">IIBBBBB", side, side, bits, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(8 * (1 + 8 * 3 * bits // 8))) if data is None else data
    magic = b"\x89PNG\r\n\x1a\n"
    return magic + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def make_tiff(pixels: npt.NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="minisblack", planarconfig="contig", **options)
    return buffer.getvalue()


def with_tag(data: bytes, code: int, value: int) -> bytes:
    """Change the value of a TIFF's tag."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        at = tiff.pages.first.tags[code].offset
    return data[: at + 2] + struct.pack("<HII", 4, 1, value) + data[at + 12 :]


def with_strip(data: bytes, strip: bytes) -> bytes:
    """Write a TIFF with one strip that has these bytes."""
    moved = with_tag(with_tag(data, 273, len(data)), 279, len(strip))
    return moved + strip


def tags_that_overlap(num_tags: int = 2000) -> bytes:
    """Write a TIFF directory whose tags all point to the same 64 KiB."""
    at = 8 + 2 + 12 * num_tags + 4
    entries = [struct.pack("<HHII", 1000 + i, 7, 2**16, at) for i in range(num_tags)]
    head = b"II*\0" + struct.pack("<IH", 8, num_tags)
    return head + b"".join(entries) + bytes(4) + bytes(2**16)


def make_jpeg(mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (16, 16)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_scans(data: bytes, count: int) -> bytes:
    """Repeat a JPEG's last scan many times."""
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * count + data[-2:]


FIVE = np.zeros((64, 64, 5), np.uint8)
STRIP = make_tiff(FIVE, compression="zlib", rowsperstrip=64)
BMP_ROWS = struct.pack("<IiiHHIIiiII", 40, 30_000, 30_000, 1, 8, 1, 0, 0, 0, 0, 0)
BOMBS = {
    "TIFF strip, deflate": (with_strip(STRIP, deflated()), 5),
    "TIFF strip, zstd": (
        with_strip(
            make_tiff(FIVE, compression="zstd", rowsperstrip=64),
            imagecodecs.zstd_encode(bytes(INFLATED_BYTES)),
        ),
        5,
    ),
    "TIFF strip, PackBits": (
        with_strip(make_tiff(FIVE, compression="packbits", rowsperstrip=64), b"\x81\0" * 10**6),
        5,
    ),
    "TIFF tile": (
        with_tag(with_tag(make_tiff(FIVE, tile=(64, 64)), 322, 60_000), 323, 60_000),
        5,
    ),
    "TIFF width": (with_tag(make_tiff(FIVE), 256, 2**29), 5),
    "TIFF tags": (tags_that_overlap(), 3),
    "PNG EXIF": (make_png(chunk(b"eXIf", tags_that_overlap())), 3),
    "PNG colour profile": (make_png(chunk(b"iCCP", b"x\0\0" + deflated())), 3),
    "PNG text": (make_png(chunk(b"zTXt", b"x\0\0" + deflated())), 3),
    "PNG international text": (make_png(chunk(b"iTXt", b"x\0\1\0\0\0" + deflated())), 3),
    "PNG width": (make_png(side=14_000), 3),
    "PNG of 16 bits, pixels": (make_png(data=deflated(), bits=16), 3),
    "PNG of 16 bits, width": (make_png(side=14_000, bits=16), 3),
    "WebP canvas": (
        b"RIFF"
        + struct.pack("<I", 100)
        + b"WEBPVP8X\x0a\0\0\0"
        + bytes(4)
        + b"\xff\x3f\0" * 2
        + bytes(80),
        3,
    ),
    "JPEG scans": (with_scans(make_jpeg(progressive=True), 300), 3),
    "JPEG scans, CMYK": (with_scans(make_jpeg("CMYK", progressive=True), 300), 3),
    "JPEG segments": (make_jpeg()[:2] + b"\xff\xfe\0\2" * 3000 + make_jpeg()[2:], 3),
    "BMP size": (b"BM" + struct.pack("<IHHI", 0, 0, 0, 54) + BMP_ROWS + bytes(64), 3),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name: str) -> None:
    data, in_chans = BOMBS[name]
    with pytest.raises(CorruptSampleError) as error:
        decode_image(data, in_chans)
    assert error.value.kind == "bomb", error.value


def test_pixels_that_inflate_further_do_not_fill_memory() -> None:
    assert decode_image(make_png(data=deflated()), 3).shape == (8, 8, 3)
    lzw = make_tiff(FIVE, compression="lzw", rowsperstrip=64)
    strip = imagecodecs.lzw_encode(bytes(INFLATED_BYTES))
    assert decode_image(with_strip(lzw, strip), 5).shape == (64, 64, 5)


def test_a_file_that_is_slow_to_read_is_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_limits, "MAX_CPU_S", -1.0)
    for data in (make_png(chunk(b"abCd", b"") * 100), b"P3 9 9 200 " + b"1 " * 9000):
        with pytest.raises(CorruptSampleError, match="to decode") as error:
            decode_image(data, 3)
        assert error.value.kind == "bomb"


def test_too_little_memory_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    spec = ViewSpec(0, 3, (8, 8), (0.5, 1.0), False)
    monkeypatch.setattr("mae_core.data.views.cut_view", fail)
    with pytest.raises(CorruptSampleError) as error:
        training_view(make_jpeg(), 0, "a", spec)
    assert error.value.kind == "memory"
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", fail)
    with pytest.raises(CorruptSampleError) as error:
        decode_image(make_jpeg(), 3)
    assert error.value.kind == "memory"


def test_threads_hold_no_more_than_the_budget_together() -> None:
    share = decode_limits.IN_FLIGHT_BYTES // 2
    held, most = [0], [0]
    lock = threading.Lock()

    def decode_large(num_bytes: int) -> None:
        with memory_in_flight(), memory_in_flight():
            hold_memory(num_bytes // 2)
            hold_memory(num_bytes)  # a decoder learns more of the file
            with lock:
                held[0] += num_bytes
                most[0] = max(most[0], held[0])
            with lock:
                held[0] -= num_bytes

    sizes = [share, share, share, 4 * share, share, share]
    threads = [threading.Thread(target=decode_large, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert held == [0]
    assert most[0] in (share, 2 * share, 4 * share)  # the largest one was alone
    with memory_in_flight():
        hold_memory(decode_limits.IN_FLIGHT_BYTES)  # all was given back
