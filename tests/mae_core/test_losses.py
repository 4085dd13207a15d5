import numpy as np
import pytest
import torch

from mae_core.losses import (
    LossTerms,
    PixelKind,
    denormalize_patches,
    flat_patch_share,
    fourier_loss_per_image,
    loss_terms_per_image,
    normalize_patches,
    pixel_loss_per_image,
    ssim_loss_per_image,
)
from mae_core.patching import patchify


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


@pytest.mark.parametrize(
    ("kind", "expected"), [("mse", 4.125), ("l1", 1.25), ("smooth_l1", 0.9375)]
)
def test_each_kind_of_pixel_error_by_hand(kind: PixelKind, expected: float) -> None:
    pred = torch.tensor([[[4.0, 0.5, -0.5, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    found = pixel_loss_per_image(pred, torch.zeros(2, 1, 4), kind)
    assert found.tolist() == pytest.approx([expected, 0.0])


def make_patches(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return patchify(torch.randn(2, 3, 16, 24, generator=generator), 8)


def test_the_fourier_term_is_zero_for_equal_patches_and_sees_all_frequencies() -> None:
    patches = make_patches(0)
    assert fourier_loss_per_image(patches, patches, 3).max() < 1e-5
    # A constant lies in one of 64 frequencies, whose size is 8 times the constant.
    shifted = fourier_loss_per_image(patches + 1, patches, 3)
    assert shifted.tolist() == pytest.approx([8 / 64] * 2, abs=1e-4)
    # A single pixel of one channel lies in all of them, alike: 1 / 8 in a third of the channels.
    spike = patches.clone()
    spike[0, :, 0] += 1
    found = fourier_loss_per_image(spike, patches, 3).tolist()
    assert found == pytest.approx([1 / 24, 0.0], abs=1e-4)


def test_the_fourier_term_has_a_gradient_where_nothing_differs() -> None:
    pred = make_patches(0).requires_grad_()
    fourier_loss_per_image(pred, make_patches(0), 3).sum().backward()
    assert pred.grad is not None
    assert torch.isfinite(pred.grad).all()


def test_the_ssim_term_goes_from_equal_to_opposite_patches() -> None:
    patches = normalize_patches(make_patches(0), floor=1e-6)
    same, none, opposite = (
        ssim_loss_per_image(other, patches, 3)
        for other in (patches, torch.zeros_like(patches), -patches)
    )
    assert same.abs().max() < 1e-5
    assert 0.9 < none.min() < none.max() < 1.0
    assert opposite.min() > 1.8


def test_the_ssim_term_is_wangs_equation_for_one_patch() -> None:
    pred, target = torch.tensor([[[0.0, 2.0, 1.0, 1.0]]]), torch.tensor([[[1.0, 3.0, 0.0, 0.0]]])
    # Variances 0.5 and 1.5 and covariance 0.5, by hand.
    expected = 1 - (1 + 0.0144) / (2 + 0.0144)
    assert ssim_loss_per_image(pred, target, 1).tolist() == pytest.approx([expected], abs=1e-6)


def test_terms_are_named_and_weighed_and_those_without_weight_are_left_out() -> None:
    pred, target = make_patches(0), make_patches(1)
    assert list(loss_terms_per_image(pred, target, LossTerms("l1"), 3)) == ["l1"]
    found = loss_terms_per_image(pred, target, LossTerms("smooth_l1", 0.5, 2.0), 3)
    assert list(found) == ["smooth_l1", "fourier", "ssim"]
    torch.testing.assert_close(found["fourier"], 0.5 * fourier_loss_per_image(pred, target, 3))
    torch.testing.assert_close(found["ssim"], 2 * ssim_loss_per_image(pred, target, 3))
