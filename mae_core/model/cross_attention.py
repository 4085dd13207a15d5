"""The decoder whose mask tokens look at the kept patches, and not at each other.

Its cost grows with the number of patches that it predicts, so predicting a part of them saves that
part of it. Source: CrossMAE, Fu et al. 2024, https://arxiv.org/abs/2401.14391, section 3. Differs:
all blocks read the encoder's last tokens, and not a learned mix of its layers; these tokens get the
decoder's positions, because those of a convolutional encoder have none.
"""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from mae_core.model.decoder import initialize_linear, to_heads
from mae_core.model.positions import sincos_positions


class CrossAttentionDecoder(nn.Module):
    """Predict the removed patches' pixels from the tokens of the kept patches.

    Works for one grid of patches only: nothing in its input distinguishes rows from columns.
    """

    positions: Tensor  # (L, D)

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
        self.embed_norm = LayerNorm(dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(grid_size, dim), persistent=False)
        self.blocks = nn.ModuleList(_Block(dim, num_heads) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, values_per_patch)
        self.apply(initialize_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        latent: Float[Tensor, "B T D"],
        ids_keep: Int[Tensor, "B K"],
        ids_removed: Int[Tensor, "B R"],
    ) -> Float[Tensor, "B R P"]:
        """Decode the encoder's K tokens of patches, behind its class token if it has one."""
        num_kept = ids_keep.shape[1]
        prefix, kept = self.embed(latent).split([latent.shape[1] - num_kept, num_kept], dim=1)
        visible = self.embed_norm(torch.cat([prefix, kept + self.positions[ids_keep]], dim=1))
        tokens = self.mask_token + self.positions[ids_removed]
        for block in self.blocks:
            tokens = block(tokens, visible)  # (B, R, D)
        return self.pred(self.norm(tokens))


class _Block(nn.Module):
    """Cross-attention to the visible tokens and an MLP, both behind a norm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        heads = self.num_heads
        query = self.query(self.norm1(tokens))
        key, value = self.key_value(visible).chunk(2, dim=2)
        attended = F.scaled_dot_product_attention(
            to_heads(query, heads), to_heads(key, heads), to_heads(value, heads)
        )
        tokens = tokens + self.proj(attended.transpose(1, 2).flatten(2))
        return cast(Tensor, tokens + self.mlp(self.norm2(tokens)))
