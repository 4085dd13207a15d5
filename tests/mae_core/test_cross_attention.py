import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_core.model.cross_attention import CrossAttentionDecoder


def make_decoder(depth: int = 2, num_heads: int = 2) -> CrossAttentionDecoder:
    torch.manual_seed(0)
    return CrossAttentionDecoder(
        encoder_dim=12,
        grid_size=(2, 4),
        dim=16,
        depth=depth,
        num_heads=num_heads,
        values_per_patch=6,
    )


IDS_KEEP = torch.tensor([[3, 0]])
IDS_REMOVED = torch.tensor([[1, 2, 4, 5, 6, 7]])


def latent(num_prefix: int = 1) -> Tensor:
    return torch.randn(1, num_prefix + 2, 12, generator=torch.Generator().manual_seed(1))


def test_a_prediction_does_not_depend_on_which_others_are_made() -> None:
    """So that predicting a part of the patches gives the same for these, and costs that part."""
    decoder = make_decoder()
    whole = decoder(latent(), IDS_KEEP, IDS_REMOVED)
    part = decoder(latent(), IDS_KEEP, IDS_REMOVED[:, [4, 1]])
    torch.testing.assert_close(part, whole[:, [4, 1]])
    assert whole.shape == (1, 6, 6)


def test_the_order_of_the_kept_patches_does_not_matter_and_their_places_do() -> None:
    decoder, tokens = make_decoder(), latent()
    expected = decoder(tokens, IDS_KEEP, IDS_REMOVED)
    turned = decoder(tokens[:, [0, 2, 1]], IDS_KEEP.flip(1), IDS_REMOVED)
    torch.testing.assert_close(turned, expected)
    elsewhere = decoder(tokens, IDS_KEEP.flip(1), IDS_REMOVED)
    assert not torch.allclose(elsewhere, expected, atol=1e-4)


def test_a_class_token_is_read_and_not_needed() -> None:
    decoder = make_decoder()
    changed = latent()
    changed[:, 0] += 1
    with_token = decoder(latent(), IDS_KEEP, IDS_REMOVED)
    assert not torch.allclose(decoder(changed, IDS_KEEP, IDS_REMOVED), with_token, atol=1e-4)
    assert decoder(latent(num_prefix=0), IDS_KEEP, IDS_REMOVED).shape == (1, 6, 6)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_a_block_is_attention_as_it_is_written(num_heads: int) -> None:
    """The same in matrix products, one head at a time."""
    decoder = make_decoder(depth=1, num_heads=num_heads)
    (block,) = decoder.blocks
    tokens, visible = torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    query, (key, value) = block.query(block.norm1(tokens)), block.key_value(visible).chunk(2, dim=2)
    width = 16 // num_heads
    heads = []
    for start in range(0, 16, width):
        part = slice(start, start + width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / width**0.5
        heads.append(scores.softmax(dim=2) @ value[..., part])
    joined = tokens + block.proj(torch.cat(heads, dim=2))
    hidden = F.gelu(block.mlp.fc1(block.norm2(joined)))
    torch.testing.assert_close(block(tokens, visible), joined + block.mlp.fc2(hidden))
