import pytest
import torch
from torch import Tensor

from mae_core.config import DecoderConfig, LossConfig, MaskingConfig, ModelConfig
from mae_core.losses import normalize_patches
from mae_core.model.mae import MAEOutput, MaskedAutoencoder, build_mae
from mae_core.patching import patchify


def mean_over_removed_patches(output: MAEOutput, target: Tensor) -> Tensor:
    """Return the squared error per value of (B, L, P) targets, averaged over the whole batch."""
    removed = target[torch.arange(len(target))[:, None], output.ids_removed]
    return (output.pred.float() - removed).square().mean()


def make_mae(
    img_size: tuple[int, int] = (32, 32),
    in_chans: int = 3,
    norm_pix: bool = True,
    prediction_ratio: float = 1.0,
) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = ModelConfig(
        encoder="vit_micro",
        img_size=img_size,
        patch_size=8,
        in_chans=in_chans,
        decoder=DecoderConfig(dim=32, depth=1, num_heads=2, prediction_ratio=prediction_ratio),
    )
    return build_mae(model, MaskingConfig(), LossConfig(norm_pix=norm_pix, norm_pix_floor=1e-6))


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize("in_chans", [1, 3, 4, 13])
def test_output_has_the_shapes_of_its_letters(in_chans: int, size: tuple[int, int]) -> None:
    num_patches = size[0] * size[1] // 64
    output = make_mae(size, in_chans)(torch.randn(2, in_chans, *size), torch.rand(2, num_patches))
    assert output.loss.shape == ()
    assert output.loss_per_image.shape == (2,)
    num_removed = num_patches * 3 // 4
    assert output.pred.shape == (2, num_removed, 64 * in_chans)
    assert output.ids_removed.shape == (2, num_removed)
    assert output.mask.shape == (2, num_patches)
    assert output.mask.sum(dim=1).tolist() == [num_removed] * 2


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_is_the_error_on_removed_patches_of_the_batch(norm_pix: bool) -> None:
    images = torch.randn(3, 3, 32, 32) * 2 + 1
    output = make_mae(norm_pix=norm_pix)(images, torch.rand(3, 16))
    target = patchify(images, 8)
    if norm_pix:
        target = normalize_patches(target, floor=1e-6)
    expected = mean_over_removed_patches(output, target)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert output.loss.item() == pytest.approx(output.loss_per_image.mean().item(), rel=1e-6)


def test_a_share_of_the_removed_patches_is_predicted_in_training_and_all_otherwise() -> None:
    mae = make_mae(prediction_ratio=1 / 3)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    partial = mae.train()(images, noise)
    assert torch.equal(partial.ids_removed, noise.argsort(dim=1)[:, 4:8])
    target = normalize_patches(patchify(images, 8), floor=1e-6)
    assert partial.loss.item() == pytest.approx(mean_over_removed_patches(partial, target).item())
    assert partial.mask.sum(dim=1).tolist() == [12, 12]
    whole = mae.eval()(images, noise)
    assert whole.ids_removed.shape == (2, 12)


def test_at_least_one_patch_is_predicted() -> None:
    mae = make_mae(prediction_ratio=0.01).train()
    assert mae(torch.randn(2, 3, 32, 32), torch.rand(2, 16)).pred.shape == (2, 1, 192)


def test_noise_picks_the_mask() -> None:
    noise = torch.ones(1, 16)
    noise[0, [2, 3, 7, 12]] = 0
    mask = make_mae()(torch.randn(1, 3, 32, 32), noise).mask
    assert (~mask[0]).nonzero().flatten().tolist() == [2, 3, 7, 12]


def test_prediction_does_not_depend_on_removed_pixels() -> None:
    mae = make_mae()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    output = mae(images, noise)
    pred, mask = output.pred, output.mask
    removed = mask.reshape(2, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    scrambled = torch.where(removed[:, None], torch.randn_like(images), images)
    assert torch.equal(mae(scrambled, noise).pred, pred)


def test_forward_draws_no_random_numbers() -> None:
    mae = make_mae()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    state = torch.get_rng_state()
    first, second = mae(images, noise), mae(images, noise)
    assert torch.equal(first.pred, second.pred)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_does_not_depend_on_its_batch() -> None:
    mae = make_mae()
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    together = mae(images, noise).loss_per_image
    alone = torch.stack([mae(images[i : i + 1], noise[i : i + 1]).loss for i in range(3)])
    assert torch.allclose(together, alone, rtol=1e-5)


def test_loss_is_fp32_under_autocast() -> None:
    mae = make_mae()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = mae(images, noise)
    assert output.pred.dtype == torch.bfloat16
    assert output.loss.dtype == output.loss_per_image.dtype == torch.float32
    target = normalize_patches(patchify(images, 8), floor=1e-6)
    expected = mean_over_removed_patches(output, target)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_target_is_fp32_where_images_are_not() -> None:
    images, noise = torch.randn(2, 3, 32, 32).bfloat16(), torch.rand(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = make_mae()(images, noise)
    target = normalize_patches(patchify(images.float(), 8), floor=1e-6)
    expected = mean_over_removed_patches(output, target)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_reaches_every_parameter() -> None:
    mae = make_mae()
    mae(torch.randn(2, 3, 32, 32), torch.rand(2, 16)).loss.backward()
    missing = [n for n, p in mae.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_rejects_an_image_of_the_right_area_and_the_wrong_shape() -> None:
    mae = make_mae((16, 48))
    with pytest.raises(ValueError, match="image 48x16, but the decoder was built for 2x6 patches"):
        mae(torch.randn(1, 3, 48, 16), torch.rand(1, 12))


def test_rejects_noise_for_another_number_of_patches() -> None:
    with pytest.raises(ValueError, match="noise for 12 patches, but an image has 4x4"):
        make_mae()(torch.randn(1, 3, 32, 32), torch.rand(1, 12))


def test_build_refuses_a_mask_that_removes_nothing() -> None:
    model = ModelConfig(encoder="vit_micro", img_size=(16, 16), patch_size=16)
    with pytest.raises(ValueError, match=r"mask_ratio=0\.75 removes none of 1 patches"):
        build_mae(model, MaskingConfig(), LossConfig())


def test_same_seed_builds_the_same_weights() -> None:
    first, second = make_mae().state_dict(), make_mae().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.compile
def test_compiles_to_one_graph() -> None:
    mae = make_mae()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    compiled = torch.compile(mae, backend="aot_eager", fullgraph=True)
    assert compiled(images, noise).loss.item() == pytest.approx(mae(images, noise).loss.item())


def test_several_terms_make_the_loss_and_are_told_by_name() -> None:
    torch.manual_seed(0)
    model = ModelConfig(encoder="vit_nano", img_size=(32, 32), patch_size=8)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    plain = build_mae(model, MaskingConfig(), LossConfig(kind="l1"))
    assert plain(images, noise).terms == {}
    mae = build_mae(
        model, MaskingConfig(), LossConfig(kind="l1", fourier_weight=0.5, ssim_weight=1)
    )
    mae.load_state_dict(plain.state_dict())
    output = mae(images, noise)
    assert list(output.terms) == ["l1", "fourier", "ssim"]
    torch.testing.assert_close(output.terms["l1"], plain(images, noise).loss_per_image)
    torch.testing.assert_close(sum(output.terms.values()), output.loss_per_image)


def test_a_ratio_that_is_given_counts_for_one_call() -> None:
    mae, images, noise = make_mae(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    assert mae(images, noise, 0.5).mask.sum(dim=1).tolist() == [8, 8]
    assert mae(images, noise).mask.sum(dim=1).tolist() == [12, 12]
