import io
import os
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from mae_core.config import DecoderConfig, LossConfig, MaskingConfig, ModelConfig
from mae_core.evaluation.reconstruction import (
    reconstruct,
    reconstruction_picture,
)
from mae_core.losses import normalize_patches
from mae_core.model.mae import build_mae
from mae_core.patching import patchify

MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 0.2)
# Of a picture of 32-pixel images: enlarged 4 times, header of 25, gutters of 4.
TILE, HEADER, GUTTER = 128, 25, 4

Pixels = npt.NDArray[np.uint8]


def make_images(num_images: int = 2, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Pixels:
    """Random (B, H, W, C) pixels."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (num_images, *size, channels), dtype=np.uint8)


def normalized(pixels: Pixels) -> Tensor:
    channels = pixels.shape[-1]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor((MEAN * 2)[:channels])[:, None, None]
    std = torch.tensor((STD * 2)[:channels])[:, None, None]
    return (images - mean) / std


def draw(
    images: Tensor, pred: Tensor, mask: Tensor, *, floor: float | None = None, title: str = ""
) -> Pixels:
    channels = images.shape[1]
    return reconstruction_picture(
        images,
        pred,
        mask,
        patch_size=8,
        norm_pix_floor=floor,
        channel_mean=(MEAN * 2)[:channels],
        channel_std=(STD * 2)[:channels],
        title=title,
    )


def tile(picture: Pixels, row: int, column: int) -> Pixels:
    """One tile of 32-pixel images, at its original size."""
    top = HEADER + row * (TILE + GUTTER)
    left = GUTTER + column * (TILE + GUTTER)
    return picture[top : top + TILE : 4, left : left + TILE : 4]


def half_removed(images: Tensor) -> Tensor:
    mask = torch.zeros(len(images), images[0, 0].numel() // 64, dtype=torch.bool)
    mask[:, ::2] = True
    return mask


def largest_difference(a: Pixels, b: Pixels) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("floor", [1e-6, 0.5, None])
def test_a_perfect_prediction_shows_the_original(floor: float | None) -> None:
    pixels = make_images()
    images = normalized(pixels)
    target = patchify(images, 8)
    pred = target if floor is None else normalize_patches(target, floor=floor)
    picture = draw(images, pred, half_removed(images), floor=floor)
    for row in range(2):
        for column in (0, 2):  # original, reconstruction
            assert largest_difference(tile(picture, row, column), pixels[row]) <= 1


def test_normalised_output_taken_for_pixels_does_not_show_the_original() -> None:
    pixels = make_images()
    images = normalized(pixels)
    pred = normalize_patches(patchify(images, 8), floor=1e-3)
    picture = draw(images, pred, half_removed(images), floor=None)
    assert largest_difference(tile(picture, 0, 2), pixels[0]) > 20


def test_the_masked_column_shows_exactly_the_visible_patches() -> None:
    pixels = make_images()
    images = normalized(pixels)
    mask = half_removed(images)
    picture = draw(images, torch.zeros(2, 16, 192), mask)
    removed = np.zeros((32, 32), dtype=bool)
    for index in range(0, 16, 2):
        row, column = divmod(index, 4)
        removed[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = True
    masked = tile(picture, 1, 1)
    assert (masked[removed] == 128).all()
    assert largest_difference(masked[~removed], pixels[1][~removed]) == 0


def test_the_reconstruction_takes_only_removed_patches_from_the_prediction() -> None:
    pixels = make_images()
    images = normalized(pixels)
    mask = half_removed(images)
    for level, shown in ((-100.0, 0), (100.0, 255)):  # far below black, far above white
        picture = draw(images, torch.full((2, 16, 192), level), mask)
        pasted = tile(picture, 0, 2)
        assert (pasted[:8, :8] == shown).all()  # patch 0: removed
        assert largest_difference(pasted[:8, 8:16], pixels[0][:8, 8:16]) == 0  # patch 1: visible


def test_a_title_is_written_above_the_columns_and_makes_room_for_itself() -> None:
    images = normalized(make_images(1))
    pred, mask = patchify(images, 8), half_removed(images)
    plain, titled = draw(images, pred, mask), draw(images, pred, mask, title="step 7, " * 20)
    assert titled.shape[0] == plain.shape[0] + HEADER
    assert titled.shape[1] > 800
    assert titled[:HEADER].min() == 0
    assert np.array_equal(titled[HEADER:, : plain.shape[1]], plain)


@pytest.mark.parametrize(
    ("size", "num_images", "expected"),
    [
        ((32, 32), 2, (25 + 2 * 132, 4 + 3 * 132, 3)),  # enlarged 4 times
        ((96, 96), 1, (25 + 100, 4 + 3 * 100, 3)),
        ((224, 224), 1, (25 + 228, 4 + 3 * 228, 3)),
        ((32, 64), 1, (25 + 68, 4 + 3 * 132, 3)),  # enlarged twice
        ((32, 32), 9, (25 + 8 * 132, 4 + 3 * 132, 3)),  # eight rows at most
    ],
)
def test_the_picture_has_a_row_for_each_image(
    size: tuple[int, int], num_images: int, expected: tuple[int, int, int]
) -> None:
    images = normalized(make_images(num_images, size=size))
    mask = half_removed(images)
    picture = draw(images, patchify(images, 8), mask)
    assert picture.shape == expected
    assert picture.dtype == np.uint8
    assert picture.flags.writeable


def test_titles_and_gutters_are_on_white() -> None:
    images = normalized(make_images())
    picture = draw(images, patchify(images, 8), half_removed(images))
    assert (picture[:, :4] == 255).all()
    assert (picture[HEADER + TILE : HEADER + TILE + GUTTER] == 255).all()
    for column in range(3):
        title = picture[:HEADER, 4 + column * 132 : 4 + column * 132 + 128]
        assert title.min() == 0


def test_a_tall_narrow_image_leaves_room_for_its_titles() -> None:
    images = normalized(make_images(1, size=(256, 8)))
    picture = draw(images, patchify(images, 8), half_removed(images))
    assert picture.shape[0] == 25 + 260
    assert picture.shape[1] > 3 * 80  # "reconstruction" is about 90 wide
    assert (picture[:, :4] == 255).all()


def test_one_channel_is_shown_in_grey() -> None:
    pixels = make_images(channels=1)
    images = normalized(pixels)
    picture = draw(images, patchify(images, 8), half_removed(images))
    assert largest_difference(tile(picture, 0, 0), pixels[0].repeat(3, axis=-1)) == 0


@pytest.mark.parametrize("channels", [4, 6])
def test_of_many_channels_the_first_three_are_shown(channels: int) -> None:
    pixels = make_images(channels=channels)
    images = normalized(pixels)
    picture = draw(images, patchify(images, 8), half_removed(images))
    assert largest_difference(tile(picture, 0, 0), pixels[0][:, :, :3]) == 0


def test_wrong_shapes_are_refused_in_words() -> None:
    images = normalized(make_images())
    pred, mask = patchify(images, 8), half_removed(images)
    with pytest.raises(ValueError, match=r"pred is \(2, 16, 191\), but images \(2, 3, 32, 32\)"):
        draw(images, pred[..., 1:], mask)
    with pytest.raises(ValueError, match=r"mask is torch\.float32 \(2, 16\), not torch\.bool"):
        draw(images, pred, mask.float())
    with pytest.raises(ValueError, match="no image to show"):
        draw(images[:0], pred[:0], mask[:0])
    with pytest.raises(ValueError, match="1 channel_mean and 3 channel_std for 3 channels"):
        reconstruction_picture(
            images,
            pred,
            mask,
            patch_size=8,
            norm_pix_floor=None,
            channel_mean=(0.5,),
            channel_std=STD,
        )


def test_reconstruct_is_what_the_model_says_and_leaves_its_mode() -> None:
    model = ModelConfig(
        encoder="vit_micro",
        img_size=(16, 32),
        patch_size=8,
        decoder=DecoderConfig(dim=32, depth=1, num_heads=2),
    )
    torch.manual_seed(0)
    mae = build_mae(model, MaskingConfig(), LossConfig()).train()
    images, noise = torch.randn(2, 3, 16, 32), torch.rand(2, 8)
    loss, pred, mask = reconstruct(mae, images, noise)
    expected = mae(images, noise)
    assert mae.training
    assert not pred.requires_grad
    assert torch.equal(pred[torch.arange(2)[:, None], expected.ids_removed], expected.pred)
    assert not pred[~mask].any()
    assert loss == expected.loss.item()
    assert mask.tolist() == expected.mask.tolist()
    assert mask.sum().item() == 12


@pytest.mark.realdata
def test_a_photograph_comes_out_as_it_went_in() -> None:
    folder = Path(os.environ.get("REAL_DATA", "../shared/data")) / "imagenet_sample"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    with tarfile.open(folder / "bench-000000.tar") as tar:
        member = next(m for m in tar if m.name.lower().endswith((".jpg", ".jpeg")))
        content = tar.extractfile(member)
        assert content is not None
        photograph = Image.open(io.BytesIO(content.read())).convert("RGB").resize((32, 32))
    pixels = np.array(photograph)[None]
    images = normalized(pixels)
    pred = normalize_patches(patchify(images, 8), floor=1e-3)
    picture = draw(images, pred, half_removed(images), floor=1e-3)
    assert largest_difference(tile(picture, 0, 2), pixels[0]) <= 1


@pytest.mark.parametrize(("mean", "std", "level"), [(0.01, 0.01, 64), (0.45, 0.25, 115)])
def test_a_dark_set_is_brightened_and_a_usual_one_is_not(
    mean: float, std: float, level: int
) -> None:
    """An image at the mean: a quarter of mean + 3 deviations, or 0.45 of 255."""
    images = torch.zeros(1, 1, 8, 8)
    picture = reconstruction_picture(
        images,
        torch.zeros(1, 4, 16),
        torch.zeros(1, 4, dtype=torch.bool),
        patch_size=4,
        norm_pix_floor=None,
        channel_mean=[mean],
        channel_std=[std],
    )
    levels, counts = np.unique(picture[40:-8], return_counts=True)
    others = counts[levels != 255]
    assert levels[levels != 255][others.argmax()] == level
