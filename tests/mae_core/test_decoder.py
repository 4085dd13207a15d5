import pytest
import torch
from torch import nn

from mae_core.masking import mask_from_noise
from mae_core.model.decoder import PixelDecoder


def make_decoder(dim: int = 16) -> PixelDecoder:
    torch.manual_seed(0)
    return PixelDecoder(
        encoder_dim=32, grid_size=(2, 6), dim=dim, depth=2, num_heads=2, values_per_patch=48
    )


def ids(kept: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of the kept and of the removed patches of one image."""
    removed = [i for i in range(12) if i not in kept]
    return torch.tensor([kept]), torch.tensor([removed])


def test_predicts_every_removed_patch() -> None:
    ids_keep, ids_removed, _ = mask_from_noise(torch.rand(3, 12), 0.75)
    assert make_decoder()(torch.randn(3, 4, 32), ids_keep, ids_removed).shape == (3, 9, 48)


def test_predictions_are_those_of_whole_blocks() -> None:
    """Leaving out what nobody reads changes nothing: not the values, not the gradients."""
    decoder, latent = make_decoder(), torch.randn(2, 4, 32)
    ids_keep, ids_removed, _ = mask_from_noise(torch.rand(2, 12), 0.75)
    pred = decoder(latent, ids_keep, ids_removed)
    pred.square().sum().backward()
    gradients = [p.grad for p in decoder.parameters()]
    decoder.zero_grad()

    tokens = decoder.mask_token.repeat(2, 12, 1)
    kept = decoder.embed(latent)
    tokens = tokens.scatter(1, ids_keep[:, :, None].expand(-1, -1, 16), kept[:, 1:])
    tokens = torch.cat([kept[:, :1], tokens + decoder.positions], dim=1)
    whole = decoder.pred(decoder.norm(decoder.blocks(tokens))[:, 1:])
    expected = whole.gather(1, ids_removed[:, :, None].expand(-1, -1, 48))
    expected.square().sum().backward()
    assert torch.allclose(pred, expected, atol=1e-5)
    for gradient, parameter in zip(gradients, decoder.parameters(), strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


def test_order_of_the_kept_tokens_does_not_matter() -> None:
    decoder = make_decoder()
    latent = torch.randn(1, 4, 32)  # class token, then patches 9, 2, 5
    first = decoder(latent, *ids([9, 2, 5]))
    assert torch.allclose(first, decoder(latent[:, [0, 2, 3, 1]], *ids([2, 5, 9])), atol=1e-6)


def test_a_kept_token_lies_at_its_own_place() -> None:
    decoder = make_decoder()
    latent = torch.randn(1, 4, 32)
    first = decoder(latent, *ids([9, 2, 5]))
    assert (first - decoder(latent, *ids([2, 9, 5]))).abs().max() > 1e-3


def test_removed_patches_differ_by_their_place_alone() -> None:
    decoder = make_decoder()
    latent = torch.randn(1, 4, 32)
    pred = decoder(latent, *ids([0, 1, 2]))[0]
    assert (pred[7] - pred[8]).any()
    decoder.positions.zero_()
    pred = decoder(latent, *ids([0, 1, 2]))[0]
    assert torch.allclose(pred, pred[:1].expand(9, -1), atol=1e-6)


def test_class_token_is_heard() -> None:
    decoder = make_decoder()
    latent = torch.randn(1, 4, 32)
    moved = latent.clone()
    moved[:, 0] += torch.randn(32)
    pred, other = decoder(latent, *ids([0, 1, 2])), decoder(moved, *ids([0, 1, 2]))
    assert (pred - other).abs().max() > 1e-3


def test_initial_weights_follow_the_authors() -> None:
    decoder = make_decoder(dim=128)
    for weight, bound in [
        (decoder.embed.weight, 0.193649),  # sqrt(6 / (32 + 128))
        (decoder.blocks[0].attn.qkv.weight, 0.108253),  # sqrt(6 / (128 + 3 * 128))
        (decoder.pred.weight, 0.184637),  # sqrt(6 / (128 + 48))
    ]:
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.abs().max().item() <= bound + 1e-6
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    biases = [m.bias for m in decoder.modules() if isinstance(m, nn.Linear)]
    assert len(biases) == 10
    assert all(not bias.any() for bias in biases)


def test_norms_have_the_authors_epsilon() -> None:
    norms = [m for m in make_decoder().modules() if isinstance(m, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-6] * 5
