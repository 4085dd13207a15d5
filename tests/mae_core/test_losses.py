import numpy as np
import pytest
import torch

from mae_core.losses import (
    denormalize_patches,
    flat_patch_share,
    normalize_patches,
    pixel_loss_per_image,
)


def test_each_image_has_the_mean_over_its_own_patches_and_values() -> None:
    target = torch.zeros(2, 2, 12)
    pred = target.clone()
    pred[0, 1] = 2.0
    pred[1, :, :6] = 4.0
    assert pixel_loss_per_image(pred, target).tolist() == [2.0, 8.0]


# Parity P6.
@pytest.mark.parametrize(("ddof", "agrees"), [(1, True), (0, False)])
def test_loss_law_is_the_reference_with_the_unbiased_variance(ddof: int, agrees: bool) -> None:
    rng = np.random.default_rng(0)
    pred, patches = rng.normal(size=(2, 3, 9, 12)) * 2 + 1
    mask = np.zeros((3, 9), dtype=bool)
    mask[:, 2:] = True
    centred = patches - patches.mean(axis=-1, keepdims=True)
    target = centred / np.sqrt(patches.var(axis=-1, ddof=ddof, keepdims=True) + 1e-6)
    expected = (((pred - target) ** 2).mean(axis=-1) * mask).sum() / mask.sum()

    ours = pixel_loss_per_image(
        torch.from_numpy(pred[:, 2:]),
        normalize_patches(torch.from_numpy(patches[:, 2:]), floor=1e-6),
    ).mean()
    assert bool(abs(ours.item() - expected) < 1e-9) is agrees


def test_normalized_patch_by_hand() -> None:
    # Mean 2, unbiased variance ((1 + 1) / 1) = 2.
    normalized = normalize_patches(torch.tensor([[[1.0, 3.0]]]), floor=1e-6)
    assert normalized.flatten().tolist() == pytest.approx([-0.7071066, 0.7071066], abs=1e-6)


def test_flat_patch_is_normalized_to_zero() -> None:
    assert normalize_patches(torch.full((1, 2, 12), 0.7), floor=1e-6).abs().max() < 1e-3


def test_the_floor_keeps_the_noise_of_a_flat_patch_small() -> None:
    # Variance 0.0002, a fifth of the floor; and 2, next to which the floor is nothing.
    patches = torch.tensor([[[0.49, 0.51], [1.0, 3.0]]])
    noise, texture = normalize_patches(patches, floor=1e-3)[0].tolist()
    assert noise == pytest.approx([-0.288675, 0.288675], abs=1e-5)
    assert texture == pytest.approx([-0.706930, 0.706930], abs=1e-5)


def test_denormalised_patch_by_hand() -> None:
    # Mean 0.25; unbiased variance 0.25, so one unit is half a grey step.
    target = torch.tensor([[[0.0, 0.0, 0.0, 1.0]]])
    restored = denormalize_patches(torch.tensor([[[0.0, 1.0, -1.0, 2.0]]]), target, floor=0.0)
    assert restored.tolist() == [[[0.25, 0.75, -0.25, 1.25]]]


def test_flat_patches_are_those_whose_variance_is_below_the_floor() -> None:
    # Variances 0, 0.0002, 0.0018 and 2.
    patches = torch.tensor([[[0.5, 0.5], [0.49, 0.51], [0.47, 0.53], [1.0, 3.0]]])
    assert flat_patch_share(patches, floor=1e-3) == 0.5
    assert flat_patch_share(patches, floor=1e-6) == 0.25
