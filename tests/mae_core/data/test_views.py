"""A view shows the same crop whether a large photograph was decoded in full or smaller."""

import io

import numpy as np
import pytest
from PIL import Image

from mae_core.data.decode import decode_image
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.randomness import sample_generator
from mae_core.data.transforms import largest_shrink, random_crop, resize_crop
from mae_core.data.views import ViewSpec, training_view, training_views

SPEC = ViewSpec(seed=0, in_chans=3, size=(32, 32), crop_scale=(0.2, 0.5), flip=False)


def photograph(height: int, width: int) -> bytes:
    """Draw a smooth picture, in which a shift of a pixel shows but coarser decoding does not."""
    rough = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=95
    )
    return buffer.getvalue()


def in_full(data: bytes, key: str) -> tuple[Pixels, int]:
    """Return the view from the whole picture, and the factor by which it may be decoded smaller."""
    pixels = decode_image(data, 3)
    crop = random_crop(sample_generator(0, 0, key), *pixels.shape[:2], scale=SPEC.crop_scale)
    return resize_crop(pixels, crop, SPEC.size), largest_shrink([crop], SPEC.size)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (601, 803), (1201, 907)])
def test_a_view_shows_the_same_whatever_size_was_decoded(height: int, width: int) -> None:
    data = photograph(height, width)
    shrinks = set()
    for key in map(str, range(12)):
        expected, shrink = in_full(data, key)
        shrinks.add(shrink)
        difference = training_view(data, 0, key, SPEC).astype(int) - expected
        assert abs(difference).mean() < 2.0, (key, shrink)
    assert max(shrinks) >= 2


def test_views_of_one_decoding_are_crops_of_their_own() -> None:
    views = training_views(photograph(300, 400), 0, "a", SPEC, 3)
    assert len({view.tobytes() for view in views}) == 3
    assert (views[0] == training_view(photograph(300, 400), 0, "a", SPEC)).mean() > 0.5


def test_what_is_no_image_has_no_views() -> None:
    with pytest.raises(CorruptSampleError):
        training_views(b"nothing", 0, "a", SPEC, 2)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_view_of_a_turned_photograph_is_one_of_it_upright(orientation: int) -> None:
    with Image.open(io.BytesIO(photograph(90, 160))) as image:
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = io.BytesIO()
        image.save(turned, "JPEG", quality=95, exif=exif)
    upright = io.BytesIO()
    Image.fromarray(decode_image(turned.getvalue(), 3)).save(upright, "PNG")
    for key in "abcd":
        view = training_view(turned.getvalue(), 0, key, SPEC)
        np.testing.assert_array_equal(view, training_view(upright.getvalue(), 0, key, SPEC))
