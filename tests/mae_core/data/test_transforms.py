"""Crops, flips and sizes follow the reference's distribution and stay inside the picture."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from mae_core.data.pixels import Pixels
from mae_core.data.randomness import sample_generator
from mae_core.data.transforms import (
    Crop,
    center_crop,
    cut_view,
    largest_shrink,
    random_crop,
    resize_crop,
    shrink_to_short_side,
    stack_pixels,
)


def make_pixels(height: int, width: int, channels: int = 3) -> Pixels:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, size=(height, width, channels), dtype=np.uint8)


def augment(
    pixels: Pixels,
    generator: np.random.Generator,
    *,
    size: tuple[int, int],
    crop_scale: tuple[float, float],
    flip: bool,
) -> Pixels:
    crop = random_crop(generator, *pixels.shape[:2], scale=crop_scale)
    return cut_view(pixels, crop, generator, size=size, flip=flip)


@settings(max_examples=300)
@given(
    st.integers(0, 10_000),
    st.integers(1, 300),
    st.integers(1, 300),
    st.floats(0.01, 1.0),
    st.floats(0.05, 5.0),
    st.floats(1.0, 20.0),
)
def test_crop_lies_inside_the_picture(
    seed: int, height: int, width: int, low: float, narrow: float, spread: float
) -> None:
    generator = np.random.default_rng(seed)
    ratio = (narrow, narrow * spread)
    crop = random_crop(generator, height, width, scale=(low, 1.0), ratio=ratio)
    assert crop.height >= 1
    assert crop.width >= 1
    assert 0 <= crop.top <= height - crop.height
    assert 0 <= crop.left <= width - crop.width


@pytest.mark.parametrize(("height", "width"), [(100, 100), (240, 320)])
def test_crop_follows_torchvision_s_law(height: int, width: int) -> None:
    """Compare means and spreads of area, aspect and place with RandomResizedCrop."""
    num_draws = 3000
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    ours = np.asarray(
        [
            random_crop(sample_generator(0, 0, str(i)), height, width, scale=scale)
            for i in range(num_draws)
        ]
    )
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = np.asarray(
        [RandomResizedCrop.get_params(picture, scale, ratio) for _ in range(num_draws)]
    )

    def describe(crops: np.ndarray) -> np.ndarray:
        top, left, h, w = crops.T
        return np.stack([h * w / (height * width), np.log(w / h), top / height, left / width])

    one, other = describe(ours), describe(theirs)
    # Standard deviations of the difference of two means, of num_draws each.
    error = np.sqrt((one.var(axis=1) + other.var(axis=1)) / num_draws)
    assert (abs(one.mean(axis=1) - other.mean(axis=1)) < 4.5 * error).all()
    assert (abs(one.std(axis=1) / other.std(axis=1) - 1) < 0.08).all()
    assert one[0].min() > 0.19  # rounding to whole pixels moves the area a little
    assert abs(one[1]).max() < math.log(4 / 3) + 0.05


@pytest.mark.parametrize(
    ("height", "width", "crop"),
    [
        (10, 100, Crop(0, 43, 10, 13)),  # 13 = round(10 * 4/3), in the middle
        (100, 10, Crop(43, 0, 13, 10)),  # 13 = round(10 / (3/4))
        (1, 500, Crop(0, 249, 1, 1)),
        (1, 1, Crop(0, 0, 1, 1)),
    ],
)
def test_picture_that_no_crop_fits_gives_its_middle(height: int, width: int, crop: Crop) -> None:
    # The whole area at an allowed aspect is in none of these, but in 1x1.
    assert random_crop(np.random.default_rng(0), height, width, scale=(1.0, 1.0)) == crop


@pytest.mark.parametrize("ratio", [(0.1, 0.2), (5.0, 10.0)])
def test_picture_of_one_pixel_gives_that_pixel(ratio: tuple[float, float]) -> None:
    crop = random_crop(np.random.default_rng(0), 1, 1, scale=(1.0, 1.0), ratio=ratio)
    assert crop == Crop(0, 0, 1, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_pillow_s_bicubic(channels: int) -> None:
    pixels = make_pixels(50, 70, channels)
    crop = Crop(5, 10, 31, 47)
    region = pixels[5:36, 10:57] if channels == 3 else pixels[5:36, 10:57, 0]
    expected = Image.fromarray(region).resize((24, 16), Image.Resampling.BICUBIC)
    out = resize_crop(pixels, crop, (16, 24))
    assert out.shape == (16, 24, channels)
    difference = out.astype(int) - np.asarray(expected).reshape(16, 24, channels)
    assert abs(difference).max() <= 1


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_other_numbers_of_channels_are_resized_one_by_one(channels: int) -> None:
    pixels = make_pixels(20, 30, channels)
    out = resize_crop(pixels, Crop(0, 0, 20, 30), (8, 12))
    assert out.shape == (8, 12, channels)
    for c in range(channels):
        single = resize_crop(pixels[..., c : c + 1], Crop(0, 0, 20, 30), (8, 12))
        np.testing.assert_array_equal(out[..., c : c + 1], single)


def test_crop_of_the_right_size_is_not_touched() -> None:
    pixels = make_pixels(20, 30)
    out = resize_crop(pixels, Crop(3, 4, 8, 12), (8, 12))
    np.testing.assert_array_equal(out, pixels[3:11, 4:16])
    assert out.flags["C_CONTIGUOUS"]


def test_flat_picture_stays_flat() -> None:
    pixels = np.full((37, 53, 3), 201, np.uint8)
    for size in [(8, 8), (64, 100), (1, 1)]:
        assert (resize_crop(pixels, Crop(1, 2, 30, 40), size) == 201).all()


def test_full_scale_and_no_flip_give_the_picture_itself() -> None:
    pixels = make_pixels(32, 32)
    out = augment(
        pixels, np.random.default_rng(0), size=(32, 32), crop_scale=(1.0, 1.0), flip=False
    )
    np.testing.assert_array_equal(out, pixels)


def test_half_of_the_pictures_are_mirrored() -> None:
    pixels = make_pixels(16, 16)
    mirrored = 0
    for i in range(600):
        out = augment(
            pixels, sample_generator(0, 0, str(i)), size=(16, 16), crop_scale=(1.0, 1.0), flip=True
        )
        if np.array_equal(out, pixels[:, ::-1]):
            mirrored += 1
        else:
            np.testing.assert_array_equal(out, pixels)
        assert out.flags["C_CONTIGUOUS"]
    assert abs(mirrored - 300) < 60  # standard deviation 12


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (7, 200), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_augment_always_gives_the_size(height: int, width: int, channels: int) -> None:
    pixels = make_pixels(height, width, channels)
    for i in range(5):
        out = augment(
            pixels, np.random.default_rng(i), size=(24, 16), crop_scale=(0.2, 1.0), flip=True
        )
        assert out.shape == (24, 16, channels)
        assert out.dtype == np.uint8


def test_augment_is_a_function_of_seed_epoch_and_key() -> None:
    pixels = make_pixels(40, 60)

    def view(seed: int, epoch: int, key: str) -> bytes:
        generator = sample_generator(seed, epoch, key)
        return augment(pixels, generator, size=(16, 16), crop_scale=(0.2, 1.0), flip=True).tobytes()

    assert view(0, 0, "a") == view(0, 0, "a")
    assert len({view(0, 0, "a"), view(1, 0, "a"), view(0, 1, "a"), view(0, 0, "b")}) == 4


def test_input_is_not_written_to() -> None:
    pixels = make_pixels(20, 20)
    pixels.flags.writeable = False
    augment(pixels, np.random.default_rng(0), size=(20, 20), crop_scale=(1.0, 1.0), flip=True)
    center_crop(pixels, (20, 20))


@pytest.mark.parametrize(
    ("height", "width", "size", "rows", "columns"),
    [
        (40, 60, (40, 40), (0, 40), (10, 50)),
        (60, 40, (40, 40), (10, 50), (0, 40)),
        (41, 60, (41, 41), (0, 41), (9, 50)),  # an odd rest: one more on the right
        (48, 48, (48, 24), (0, 48), (12, 36)),
        (30, 20, (30, 20), (0, 30), (0, 20)),
    ],
)
def test_center_crop_takes_the_middle(
    height: int,
    width: int,
    size: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> None:
    pixels = make_pixels(height, width)
    expected = pixels[rows[0] : rows[1], columns[0] : columns[1]]
    np.testing.assert_array_equal(center_crop(pixels, size), expected)


def test_center_crop_shrinks_after_cutting() -> None:
    pixels = make_pixels(40, 60)
    middle = Image.fromarray(pixels[:, 10:50]).resize((10, 10), Image.Resampling.BICUBIC)
    assert abs(center_crop(pixels, (10, 10)).astype(int) - np.asarray(middle)).max() <= 1
    assert center_crop(make_pixels(1, 300), (16, 16)).shape == (16, 16, 3)


def test_sixteen_bits_are_resized_as_eight() -> None:
    # Smooth: nothing overshoots the range of 8 bits between the two passes.
    pixels = np.asarray(Image.fromarray(make_pixels(5, 6)).resize((60, 40))) // 2 + 60
    crop = Crop(3, 4, 30, 50)
    for channels in (1, 3):
        eight = resize_crop(pixels[..., :channels], crop, (16, 24))
        sixteen = resize_crop(pixels[..., :channels] * np.uint16(257), crop, (16, 24))
        assert sixteen.dtype == np.uint16
        assert abs(sixteen / 257 - eight).max() <= 1.5


def test_a_crop_scales_with_the_picture() -> None:
    """Cut from half the picture, the crop shows what it shows in the whole."""
    rows, columns = np.mgrid[0:200, 0:300]
    whole = np.stack([rows, columns * 0.8, rows * 0.5 + columns * 0.3], -1).astype(np.uint8)
    half = shrink_to_short_side(whole, 100)
    assert half.shape == (100, 150, 3)
    crop = Crop(31, 47, 101, 133)
    a, b = resize_crop(whole, crop, (50, 50)), resize_crop(half, crop.scaled(0.5), (50, 50))
    assert abs(a.astype(int) - b).max() <= 2


def test_a_crop_at_the_edge_does_not_reach_beyond_the_picture() -> None:
    third = Crop(0, 0, 7, 7).scaled(1 / 3)
    assert resize_crop(make_pixels(2, 2), third, (4, 4)).shape == (4, 4, 3)


def test_the_largest_shrink_keeps_every_crop_larger_than_the_target() -> None:
    assert largest_shrink([Crop(0, 0, 447, 900)], (224, 224)) == 1
    assert largest_shrink([Crop(0, 0, 448, 900)], (224, 224)) == 2
    assert largest_shrink([Crop(0, 0, 2000, 2000), Crop(0, 0, 900, 950)], (224, 224)) == 4
    assert largest_shrink([Crop(0, 0, 9000, 9000)], (224, 224)) == 8


def test_pictures_that_are_small_are_not_made_larger() -> None:
    pixels = make_pixels(40, 60)
    assert shrink_to_short_side(pixels, 40) is pixels
    assert shrink_to_short_side(pixels, 20).shape == (20, 30, 3)


def test_a_stack_of_eight_and_sixteen_bits_has_sixteen() -> None:
    eight = np.full((2, 2, 1), 255, np.uint8)
    sixteen = np.full((2, 2, 1), 1000, np.uint16)
    assert stack_pixels([eight, eight]).dtype == np.uint8
    stacked = stack_pixels([eight, sixteen])
    assert stacked.dtype == np.uint16
    assert [int(p.flat[0]) for p in stacked] == [65_535, 1000]


def test_a_share_of_the_central_crop_is_what_resizing_to_256_and_cutting_224_gives() -> None:
    pixels = np.zeros((256, 320, 3), np.uint8)
    pixels[16:240, 48:272] = 200  # the central 224 x 224
    cropped = center_crop(pixels, (224, 224), 0.875)
    assert cropped.shape == (224, 224, 3)
    assert (cropped == 200).all()
    assert not (center_crop(pixels, (224, 224)) == 200).all()
