import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from mae_core.data.pixels import CorruptSampleError, scale_to_full, to_unsigned, upright


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_pillow_turns_it(orientation: int) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif.tobytes())
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    np.testing.assert_array_equal(upright(pixels, orientation), wanted)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_pixels_of_8_and_16_bits_stay_as_they_are(kind: type[np.unsignedinteger]) -> None:
    pixels = np.zeros((2, 2, 1), kind)
    assert to_unsigned(pixels, "a TIFF") is pixels


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint32, np.int64])
def test_wider_whole_numbers_that_fit_become_16_bits(kind: type[np.integer]) -> None:
    found = to_unsigned(np.asarray([[[0], [300], [32_767]]], kind), "a TIFF")
    assert found.dtype == np.uint16
    assert found.ravel().tolist() == [0, 300, 32_767]


@pytest.mark.parametrize(
    "pixels",
    [
        np.asarray([[[-1]]]),
        np.asarray([[[65_536]]]),
        np.zeros((1, 1, 1), np.float32),
        np.zeros((0, 4, 1), np.int32),
    ],
)
def test_values_that_do_not_fit_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(CorruptSampleError, match="a TIFF: only whole numbers from 0 to 65535") as e:
        to_unsigned(pixels, "a TIFF")
    assert e.value.kind == "unsupported"


@pytest.mark.parametrize("bits", range(1, 17))
def test_values_of_fewer_bits_span_the_full_range_in_even_steps(bits: int) -> None:
    full = 255 if bits <= 8 else 65_535
    values = np.arange(2**bits, dtype=np.uint16 if bits > 8 else np.uint8)
    scaled = scale_to_full(values, bits)
    assert scaled.dtype == (np.uint8 if bits <= 8 else np.uint16)
    assert (int(scaled[0]), int(scaled[-1])) == (0, full)
    exact = np.arange(2**bits) * full / (2**bits - 1)
    assert np.abs(scaled - exact).max() <= 0.5


def test_values_beyond_the_declared_bits_count_as_the_largest() -> None:
    assert scale_to_full(np.asarray([3, 7, 200], np.uint8), 3).tolist() == [109, 255, 255]
