"""The light transformer that turns kept tokens back into pixels."""

import torch
from jaxtyping import Float, Int
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_core.masking import restore_order
from mae_core.model.positions import sincos_positions, trained_table


class PixelDecoder(nn.Module):
    """Predict every patch's pixels from the tokens of the kept patches.

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
        self.apply(_initialize_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, latent: Float[Tensor, "B T D"], ids_restore: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B L P"]:
        """Decode T = 1 + K encoder tokens, the class token first."""
        tokens = self.embed(latent)
        class_token, kept = tokens[:, :1], tokens[:, 1:]
        patches = restore_order(kept, self.mask_token[0, 0], ids_restore) + self.positions
        tokens = torch.cat([class_token, patches], dim=1)  # (B, 1 + L, D)
        return self.pred(self.norm(self.blocks(tokens))[:, 1:])


def _initialize_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        # Xavier treats the fused query, key and value as one matrix.
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
