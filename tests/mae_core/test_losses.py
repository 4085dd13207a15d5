import numpy as np
import pytest
import torch

from mae_core.losses import masked_pixel_loss, masked_pixel_loss_per_image, normalize_patches


def test_visible_patches_do_not_count() -> None:
    target = torch.zeros(1, 4, 12)
    pred = target.clone()
    pred[0, 0] = 100.0  # visible, wrong, ignored
    pred[0, 3] = 2.0  # removed
    mask = torch.tensor([[False, False, False, True]])
    assert masked_pixel_loss(pred, target, mask).item() == 4.0
    assert masked_pixel_loss_per_image(pred, target, mask).tolist() == [4.0]


def test_right_removed_patches_dilute_a_wrong_one() -> None:
    target = torch.zeros(2, 4, 12)
    pred = target.clone()
    pred[1, 2] = 4.0
    mask = torch.tensor([[True, True, False, False], [False, False, True, True]])
    assert masked_pixel_loss_per_image(pred, target, mask).tolist() == [0.0, 8.0]
    assert masked_pixel_loss(pred, target, mask).item() == 4.0


def test_loss_of_a_batch_weights_removed_patches_not_images() -> None:
    target = torch.zeros(2, 4, 1)
    pred = torch.ones(2, 4, 1)
    pred[1] = 3.0
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert masked_pixel_loss_per_image(pred, target, mask).tolist() == [1.0, 9.0]
    assert masked_pixel_loss(pred, target, mask).item() == 3.0  # (1 + 1 + 1 + 9) / 4


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

    ours = masked_pixel_loss(
        torch.from_numpy(pred), normalize_patches(torch.from_numpy(patches)), torch.from_numpy(mask)
    )
    assert bool(abs(ours.item() - expected) < 1e-9) is agrees


def test_normalized_patch_by_hand() -> None:
    # Mean 2, unbiased variance ((1 + 1) / 1) = 2.
    normalized = normalize_patches(torch.tensor([[[1.0, 3.0]]]))
    assert normalized.flatten().tolist() == pytest.approx([-0.7071066, 0.7071066], abs=1e-6)


def test_flat_patch_is_normalized_to_zero() -> None:
    assert normalize_patches(torch.full((1, 2, 12), 0.7)).abs().max() < 1e-3
