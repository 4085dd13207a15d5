import pytest
import torch
from torch import nn

from mae_core.config import DecoderConfig, ModelConfig
from mae_core.masking import mask_from_noise
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.family import build_encoder


def make_encoder(
    img_size: tuple[int, int] = (32, 32), in_chans: int = 3, embed_dim: int = 32
) -> MaskedEncoder:
    torch.manual_seed(0)
    return MaskedEncoder(
        img_size=img_size,
        patch_size=8,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=2,
        num_heads=2,
    )


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize("in_chans", [1, 3, 4, 13])
def test_takes_any_shape_and_number_of_channels(in_chans: int, size: tuple[int, int]) -> None:
    encoder = make_encoder(size, in_chans)
    images = torch.randn(2, in_chans, *size)
    num_patches = size[0] * size[1] // 64
    assert encoder(images).shape == (2, 1 + num_patches, 32)
    assert encoder(images, torch.tensor([[5, 0, 3], [1, 2, 4]])).shape == (2, 4, 32)


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_encoder_never_sees_a_removed_patch(size: tuple[int, int]) -> None:
    encoder = make_encoder(size).eval()
    rows, columns = size[0] // 8, size[1] // 8
    images = torch.randn(2, 3, *size)
    ids_keep, _, mask = mask_from_noise(torch.rand(2, rows * columns), 0.75)
    removed = mask.reshape(2, rows, columns).repeat_interleave(8, 1).repeat_interleave(8, 2)
    scrambled = torch.where(removed[:, None], torch.randn_like(images) * 100, images)
    assert not torch.equal(scrambled, images)
    assert torch.equal(encoder(scrambled, ids_keep), encoder(images, ids_keep))


def test_all_patches_in_order_are_the_default() -> None:
    encoder = make_encoder()
    images = torch.randn(2, 3, 32, 32)
    everything = torch.arange(16).expand(2, 16)
    # Kept patches are embedded by another kernel, so rounding may differ.
    assert torch.allclose(encoder(images), encoder(images, everything), atol=1e-5)


def test_tokens_follow_the_order_of_ids_keep() -> None:
    encoder = make_encoder()
    images = torch.randn(1, 3, 32, 32)
    forward = encoder(images, torch.tensor([[3, 7, 11]]))
    backward = encoder(images, torch.tensor([[11, 7, 3]]))
    assert torch.allclose(forward[:, [0, 3, 2, 1]], backward, atol=1e-6)


def test_a_patch_knows_its_place() -> None:
    encoder = make_encoder()
    images = torch.zeros(1, 3, 32, 32)
    first, second = encoder(images, torch.tensor([[0, 5]]))[0, 1:]
    assert (first - second).abs().max() > 0.1


def test_other_sizes_stretch_the_positions() -> None:
    encoder = make_encoder().eval()
    assert encoder(torch.randn(2, 3, 48, 24)).shape == (2, 1 + 6 * 3, 32)
    assert encoder(torch.randn(2, 3, 64, 64), torch.tensor([[63], [0]])).shape == (2, 2, 32)
    assert encoder.positions.shape == (16, 32)


def test_rejects_an_image_that_patches_do_not_tile() -> None:
    with pytest.raises(ValueError, match="36x32 is not a multiple of patch_size=8"):
        make_encoder()(torch.zeros(1, 3, 36, 32))


def test_build_encoder_reads_the_config() -> None:
    config = ModelConfig(
        encoder="vit_tiny", img_size=(16, 48), patch_size=8, in_chans=4, decoder=DecoderConfig()
    )
    encoder = build_encoder(config)
    assert encoder.embed_dim == 192
    assert len(encoder.blocks) == 12
    assert encoder.blocks[0].attn.num_heads == 3
    assert encoder.grid_size == (2, 6)
    assert encoder.patch_embed.proj.weight.shape == (192, 4, 8, 8)


def test_initial_weights_follow_the_authors() -> None:
    encoder = make_encoder(embed_dim=128)
    block = encoder.blocks[1]
    # Xavier: uniform within sqrt(6 / (inputs + outputs)).
    for weight, bound in [
        (block.attn.qkv.weight, 0.108253),  # sqrt(6 / (128 + 3 * 128)): one matrix
        (block.attn.proj.weight, 0.153093),  # sqrt(6 / (128 + 128))
        (block.mlp.fc1.weight, 0.096825),  # sqrt(6 / (128 + 512))
        (block.mlp.fc2.weight, 0.096825),
        (encoder.patch_embed.proj.weight, 0.136931),  # sqrt(6 / (3 * 8 * 8 + 128))
    ]:
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.abs().max().item() <= bound + 1e-6
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    biases = [m.bias for m in encoder.modules() if isinstance(m, nn.Linear)]
    assert len(biases) == 8
    assert all(not bias.any() for bias in biases)
    assert encoder.patch_embed.proj.bias.any()  # the convolution's default


def test_norms_have_the_authors_epsilon() -> None:
    norms = [m for m in make_encoder().modules() if isinstance(m, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-6] * 5


def test_last_norm_is_applied() -> None:
    tokens = make_encoder()(torch.randn(2, 3, 32, 32))
    assert tokens.mean(dim=-1).abs().max() < 1e-5
    assert tokens.var(dim=-1, correction=0).sub(1).abs().max() < 1e-3


def test_positions_are_neither_trained_nor_saved() -> None:
    encoder = make_encoder()
    assert "positions" not in dict(encoder.named_parameters())
    assert "positions" not in encoder.state_dict()


def test_exports_with_a_dynamic_batch() -> None:
    encoder = make_encoder().eval()
    exported = torch.export.export(
        encoder,
        (torch.randn(2, 3, 32, 32),),
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    for batch_size in (1, 5):
        images = torch.randn(batch_size, 3, 32, 32)
        assert torch.allclose(exported.module()(images), encoder(images), atol=1e-6)


def test_several_class_tokens_come_first_and_all_of_them_are_trained() -> None:
    torch.manual_seed(0)
    model = ModelConfig(encoder="vit_nano", img_size=(16, 16), patch_size=8, class_tokens=3)
    encoder = build_encoder(model)
    images = torch.randn(2, 3, 16, 16)
    tokens = encoder(images, torch.tensor([[3, 0], [1, 2]]))
    assert tokens.shape == (2, 5, 96)
    everything = encoder(images)
    expected = everything[:, 3:].transpose(1, 2).unflatten(2, (2, 2))
    assert torch.equal(encoder.feature_map(images), expected)
    (kept,) = encoder.maps(images, torch.tensor([[3, 0], [1, 2]]))
    assert torch.equal(kept[0, :, 1, 1], tokens[0, 3])
    assert kept[0, :, 0, 1].abs().max().item() == 0
    tokens.sum().backward()
    assert encoder.cls_token.grad is not None
    assert (encoder.cls_token.grad.abs().amax(dim=(0, 2)) > 0).tolist() == [True] * 3
