import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from mae_core.data import augment
from mae_core.data.augment import rand_augment, random_erase

TIMM_NAMES = {
    "rotate": "Rotate",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
}


def make_pixels(
    channels: int = 3, dtype: npt.DTypeLike = np.uint8, size: tuple[int, int] = (20, 28)
) -> npt.NDArray[np.unsignedinteger]:
    """Draw a smooth picture with noise, as pure noise looks the same after most operations."""
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[: size[0], : size[1]]
    waves = [np.sin(rows / (3 + c)) + np.cos(columns / (4 + c)) for c in range(channels)]
    picture = 0.5 + 0.15 * np.stack(waves, axis=-1) + 0.03 * rng.normal(size=(*size, channels))
    return (picture.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)


def test_the_operations_are_those_of_timms_increasing_set() -> None:
    names = {**augment._MOVES, **augment._TONES}
    assert {TIMM_NAMES[name] for name in names} == set(auto_augment._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("name", TIMM_NAMES)
@pytest.mark.parametrize("magnitude", [0.0, 3.0, 8.7, 9.4])
@pytest.mark.parametrize("is_negative", [False, True])
def test_an_operation_does_what_timms_does(
    monkeypatch: pytest.MonkeyPatch, name: str, magnitude: float, is_negative: bool
) -> None:
    image = Image.fromarray(make_pixels())
    hparams = {"interpolation": Image.Resampling.BICUBIC, "img_mean": (124, 116, 104)}
    op = auto_augment.AugmentOp(TIMM_NAMES[name], prob=1.0, magnitude=magnitude, hparams=hparams)
    monkeypatch.setattr(auto_augment.random, "random", lambda: 0.9 if is_negative else 0.1)
    expected = op(image)
    signed = magnitude / 10 * (-1 if is_negative else 1)
    if name in augment._MOVES:
        ours = augment._MOVES[name](image, signed, (124, 116, 104))
    else:
        ours = augment._TONES[name](image, signed)
    assert np.array_equal(np.asarray(ours), np.asarray(expected))


def test_posterizing_leaves_something_to_see() -> None:
    image = Image.fromarray(make_pixels())
    assert len(np.unique(np.asarray(augment._TONES["posterize"](image, 1.0)))) == 2


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_same_generator_makes_the_same_bytes(channels: int, dtype: npt.DTypeLike) -> None:
    pixels = make_pixels(channels, dtype)
    before = pixels.copy()
    num_changed = 0
    for seed in range(40):
        first, second = (rand_augment(pixels, np.random.default_rng(seed)) for _ in range(2))
        assert first.dtype == pixels.dtype
        assert first.shape == pixels.shape
        assert first.tobytes() == second.tobytes()
        num_changed += not np.array_equal(first, pixels)
    assert np.array_equal(pixels, before)
    assert 20 < num_changed < 38  # a quarter gets no operation


def test_threads_and_the_global_generators_change_nothing() -> None:
    pixels = make_pixels()
    alone = [rand_augment(pixels, np.random.default_rng(seed)).tobytes() for seed in range(32)]
    before = np.random.get_state()[1].copy()
    barrier = threading.Barrier(4)

    def augmented(seed: int) -> bytes:
        if seed < 4:
            barrier.wait()
        return rand_augment(pixels, np.random.default_rng(seed)).tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(augmented, range(32))) == alone
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(
    ("channels", "dtype", "expected"),
    [
        (3, np.uint8, set(TIMM_NAMES)),
        (1, np.uint8, set(TIMM_NAMES) - {"color"}),
        (2, np.uint8, set(augment._MOVES)),
        (4, np.uint8, set(augment._MOVES)),
        (1, np.uint16, set(augment._MOVES)),
        (3, np.uint16, set(augment._MOVES)),
    ],
)
def test_each_kind_of_image_gets_the_operations_that_suit_it(
    monkeypatch: pytest.MonkeyPatch, channels: int, dtype: npt.DTypeLike, expected: set[str]
) -> None:
    used: list[str] = []
    for table in (augment._MOVES, augment._TONES):
        for name, op in list(table.items()):

            def recorded(*args: object, name: str = name, op: object = op) -> Image.Image:
                used.append(name)
                return op(*args)

            monkeypatch.setitem(table, name, recorded)
    generator = np.random.default_rng(0)
    for _ in range(300):
        rand_augment(make_pixels(channels, dtype, (6, 6)), generator)
    assert set(used) == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_channels_move_together(dtype: npt.DTypeLike) -> None:
    one = make_pixels(1, dtype)
    for seed in range(20):
        moved = rand_augment(one.repeat(5, axis=2), np.random.default_rng(seed))
        assert (moved == moved[..., :1]).all()


def test_16_bits_move_as_8_bits_do() -> None:
    pixels = make_pixels(2)
    for seed in range(20):
        narrow = rand_augment(pixels, np.random.default_rng(seed))
        wide = rand_augment(
            pixels * np.uint16(257), np.random.default_rng(seed), fill=(128 * 257, 128 * 257)
        )
        # Each of two steps rounds 8 bits, and a bicubic one sharpens what the first rounded.
        assert np.abs(wide / 257 - narrow).max() < 2.5


def test_what_comes_in_from_outside_is_the_fill() -> None:
    for channels, fill in ((3, (10, 20, 30)), (1, (40,)), (2, (50, 60))):
        pixels = np.full((12, 12, channels), 200, np.uint8)
        image = np.zeros(())
        for seed in range(200):
            image = rand_augment(pixels, np.random.default_rng(seed), num_ops=1, fill=fill)
            if (image == fill).all(axis=-1).any():
                break
        assert (image == fill).all(axis=-1).any(), channels


def test_a_fill_for_other_channels_is_an_error() -> None:
    with pytest.raises(ValueError, match="has 3 values for 1 channels"):
        rand_augment(make_pixels(1), np.random.default_rng(0), fill=(1, 2, 3))


def test_no_operations_leave_the_image_as_it_is() -> None:
    for channels in (1, 2, 3):
        pixels = make_pixels(channels)
        same = rand_augment(pixels, np.random.default_rng(0), num_ops=0)
        assert np.array_equal(same, pixels)


def test_a_rectangle_is_erased_as_often_as_asked_and_of_the_size_asked() -> None:
    image = np.zeros((3, 32, 32), np.float32)
    shares, num_erased, values = [], 0, []
    for seed in range(1000):
        erased = random_erase(image, np.random.default_rng(seed))
        is_erased = (erased != 0).any(axis=0)
        if not is_erased.any():
            continue
        num_erased += 1
        rows, columns = is_erased.any(axis=1), is_erased.any(axis=0)
        assert np.array_equal(is_erased, rows[:, None] & columns)
        shares.append(is_erased.mean())
        values.append(erased[:, is_erased].ravel())
        assert 0.2 < rows.sum() / columns.sum() < 5
    assert num_erased == pytest.approx(250, abs=45)
    assert 0.01 < min(shares) < 0.04
    assert 0.3 < max(shares) < 0.36
    noise = np.concatenate(values)
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)


def test_arrays_and_tensors_are_erased_alike_and_stay_as_they_were() -> None:
    image = np.random.default_rng(0).normal(size=(3, 16, 24)).astype(np.float32)
    tensor = torch.from_numpy(image.copy())
    for seed in range(20):
        array_erased = random_erase(image, np.random.default_rng(seed), probability=1.0)
        tensor_erased = random_erase(tensor, np.random.default_rng(seed), probability=1.0)
        assert array_erased.dtype == np.float32
        assert np.array_equal(array_erased, tensor_erased.numpy())
        assert not np.array_equal(array_erased, image)
        assert np.array_equal(tensor.numpy(), image)
    assert random_erase(image, np.random.default_rng(0), probability=0.0) is image
    half = random_erase(tensor.half(), np.random.default_rng(0), probability=1.0)
    assert half.dtype == torch.float16


def test_an_image_too_small_for_a_rectangle_stays() -> None:
    image = np.ones((1, 1, 1), np.float32)
    assert random_erase(image, np.random.default_rng(0), probability=1.0) is image
