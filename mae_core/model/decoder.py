"""The light transformer that turns kept tokens back into pixels."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers.attention import Attention
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_core.model.positions import sincos_positions, trained_table


class PixelDecoder(nn.Module):
    """Predict the removed patches' pixels from the tokens of the kept patches.

    Works for one grid of patches only: nothing in its input distinguishes rows from columns.
    """

    positions: Tensor  # (L, D); in the state dict only if it is trained: else the sizes give it

    def __init__(
        self,
        *,
        encoder_dim: int,
        grid_size: tuple[int, int],
        dim: int,
        depth: int,
        num_heads: int,
        values_per_patch: int,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(grid_size, dim), persistent=False)
        self.blocks = nn.Sequential(*[Block(dim, num_heads, qkv_bias=True) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, values_per_patch)
        self._initialize()

    def use_positions(self, positions: Float[Tensor, "N D"], grid_size: tuple[int, int]) -> None:
        """Replace the fixed positions as `MaskedEncoder.use_positions` does."""
        table = trained_table(positions, grid_size, (self.grid_size, self.positions.shape[1]))
        self.register_buffer("positions", table.to(self.positions.device), persistent=True)

    def _initialize(self) -> None:
        """Draw weights as the authors do, from the global generator like torch's own layers."""
        self.apply(initialize_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        latent: Float[Tensor, "B T D"],
        ids_keep: Int[Tensor, "B K"],
        ids_removed: Int[Tensor, "B R"],
    ) -> Float[Tensor, "B R P"]:
        """Decode the encoder's K tokens of patches, behind its class token if it has one.

        The blocks do not know an order, so the tokens stay in that of the ids.
        """
        num_kept = ids_keep.shape[1]
        prefix, kept = self.embed(latent).split([latent.shape[1] - num_kept, num_kept], dim=1)
        removed = self.mask_token + self.positions[ids_removed]
        tokens = torch.cat([prefix, kept + self.positions[ids_keep], removed], dim=1)
        for block in self.blocks[:-1]:
            tokens = block(tokens)  # (B, 1 + L, D)
        tokens = _last_tokens(cast(Block, self.blocks[-1]), tokens, ids_removed.shape[1])
        return self.pred(self.norm(tokens))


def _last_tokens(block: Block, tokens: Tensor, count: int) -> Tensor:
    """Return the last `count` tokens of a block's output, without computing the others."""
    attention, dim = cast(Attention, block.attn), tokens.shape[2]
    inputs = block.norm1(tokens)
    qkv = attention.qkv
    query = F.linear(inputs[:, -count:], qkv.weight[:dim], qkv.bias[:dim])
    key, value = F.linear(inputs, qkv.weight[dim:], qkv.bias[dim:]).chunk(2, dim=2)
    heads = attention.num_heads
    attended = F.scaled_dot_product_attention(
        to_heads(query, heads), to_heads(key, heads), to_heads(value, heads)
    )
    tokens = tokens[:, -count:] + attention.proj(attended.transpose(1, 2).flatten(2))
    return cast(Tensor, tokens + block.mlp(block.norm2(tokens)))


def to_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Return (B, heads, T, D / heads) of (B, T, D)."""
    batch, length, dim = tokens.shape
    return tokens.view(batch, length, num_heads, dim // num_heads).transpose(1, 2)


def initialize_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        # Xavier treats the fused query, key and value as one matrix.
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
