"""A vision transformer that can be shown only some of its patches.

timm's blocks under timm's names, so that weights go from one to the other unchanged.
"""

import torch
from jaxtyping import Float, Int
from timm.layers.norm import LayerNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.masking import keep_patches
from mae_core.model.positions import resample_positions, sincos_positions


class MaskedEncoder(nn.Module):
    """Encode the kept patches of an image; without `ids_keep`, all of them.

    Takes images of any size that its patches tile. At a size other than `img_size` the
    positions are interpolated (see `resample_positions`), not computed anew.
    """

    positions: Tensor  # (L, D); a buffer outside the state dict, for it follows from the sizes

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        # img_size=None: timm then takes any size; `forward` checks it.
        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = sincos_positions(self.grid_size, embed_dim)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(
            *[Block(embed_dim, num_heads, qkv_bias=True) for _ in range(depth)]
        )
        self.norm = LayerNorm(embed_dim)
        self._initialize()

    def _initialize(self) -> None:
        """As the authors do, on the global random generator, like torch's own layers."""
        self.apply(_initialize_linear)
        # As a linear layer over a patch's values; the bias keeps the convolution's default.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(
        self, images: Float[Tensor, "B C H W"], ids_keep: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return T = 1 + K tokens, the class token first (1 + L without `ids_keep`)."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image {height}x{width} is not a multiple of patch_size={self.patch_size}"
            )
        grid_size = (height // self.patch_size, width // self.patch_size)
        positions = resample_positions(self.positions, self.grid_size, grid_size)
        patches = self.patch_embed(images) + positions  # (B, L, D)
        if ids_keep is not None:
            patches = keep_patches(patches, ids_keep)  # (B, K, D)
        # The class token's position is zero, in the reference too.
        class_token = self.cls_token.expand(patches.shape[0], -1, -1)
        tokens = torch.cat([class_token, patches], dim=1)  # (B, 1 + K, D)
        return self.norm(self.blocks(tokens))


def _initialize_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        # Fused query, key and value count as one matrix.
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def build_encoder(config: ModelConfig) -> MaskedEncoder:
    shape = config.encoder_shape
    return MaskedEncoder(
        img_size=config.img_size,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
    )
