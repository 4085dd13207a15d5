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


def test_predicts_every_patch() -> None:
    ids_restore = mask_from_noise(torch.rand(3, 12), 0.75).ids_restore
    assert make_decoder()(torch.randn(3, 4, 32), ids_restore).shape == (3, 12, 48)


def test_order_of_the_kept_tokens_does_not_matter() -> None:
    decoder = make_decoder()
    latent = torch.randn(1, 4, 32)  # class token, then patches 9, 2, 5
    removed = [0, 1, 3, 4, 6, 7, 8, 10, 11]

    def decode(kept: list[int], tokens: torch.Tensor) -> torch.Tensor:
        return decoder(tokens, torch.tensor([kept + removed]).argsort(dim=1))

    assert torch.allclose(
        decode([9, 2, 5], latent), decode([2, 5, 9], latent[:, [0, 2, 3, 1]]), atol=1e-6
    )


def test_a_kept_token_lands_on_its_own_patch() -> None:
    decoder = make_decoder()
    decoder.blocks = nn.Sequential()  # so that no patch hears of another
    ids_restore = torch.tensor([[7, *range(7), *range(8, 12)]]).argsort(dim=1)
    latent = torch.randn(1, 2, 32)
    moved = latent.clone()
    moved[:, 1] += 1
    difference = (decoder(latent, ids_restore) - decoder(moved, ids_restore)).abs().amax(dim=-1)
    assert difference[0].nonzero().flatten().tolist() == [7]


def test_removed_patches_differ_by_their_place_alone() -> None:
    decoder = make_decoder()
    ids_restore = torch.arange(12)[None]
    latent = torch.randn(1, 4, 32)
    assert (decoder(latent, ids_restore)[0, 10] - decoder(latent, ids_restore)[0, 11]).any()
    decoder.positions.zero_()
    pred = decoder(latent, ids_restore)[0, 3:]
    assert torch.allclose(pred, pred[:1].expand(9, -1), atol=1e-6)


def test_class_token_is_heard() -> None:
    decoder = make_decoder()
    ids_restore = torch.arange(12)[None]
    latent = torch.randn(1, 4, 32)
    moved = latent.clone()
    moved[:, 0] += torch.randn(32)
    assert (decoder(latent, ids_restore) - decoder(moved, ids_restore)).abs().max() > 1e-3


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
