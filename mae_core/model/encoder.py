"""A vision transformer that can encode a subset of an image's patches.

Uses timm's blocks under timm's names, so weights transfer between the two unchanged.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers.norm import LayerNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_core.model.positions import resample_positions, sincos_positions, trained_table
from mae_core.patching import take_patches

_GLOBAL_BLOCKS = 4


class MaskedEncoder(nn.Module):
    """Encode the kept patches of an image, or all of them without `ids_keep`.

    Accepts images of any size that its patches tile. At a size other than `img_size` the
    positions are interpolated (see `resample_positions`), not recomputed.
    """

    positions: Tensor  # (L, D); in the state dict only if it is trained: else the sizes give it

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        drop_path_rate: float = 0.0,
        class_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.channels, self.strides = (embed_dim,), (patch_size,)  # of `maps`
        # img_size=None: timm then accepts any size, and `forward` checks it.
        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim)
        self.num_prefix_tokens = class_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, class_tokens, embed_dim))
        positions = sincos_positions(self.grid_size, embed_dim)
        self.register_buffer("positions", positions, persistent=False)
        # Stochastic depth, rising from 0 at the first block: Huang et al. 2016,
        # https://arxiv.org/abs/1603.09382.
        rates = [drop_path_rate * number / max(depth - 1, 1) for number in range(depth)]
        self.blocks = nn.Sequential(
            *[Block(embed_dim, num_heads, qkv_bias=True, drop_path=rate) for rate in rates]
        )
        self.norm = LayerNorm(embed_dim)
        self._initialize()

    def use_positions(self, positions: Float[Tensor, "N D"], grid_size: tuple[int, int]) -> None:
        """Replace the fixed positions by trained ones, which are then part of the state dict.

        Args:
            positions: The trained embeddings; they are copied, and not trained further.
            grid_size: Rows and columns that they were trained for. They are resampled if this
                encoder has another grid.
        """
        table = trained_table(positions, grid_size, (self.grid_size, self.embed_dim))
        self.register_buffer("positions", table.to(self.positions.device), persistent=True)

    def _initialize(self) -> None:
        """Draw weights as the authors do, from the global generator like torch's own layers."""
        self.apply(_initialize_linear)
        # Initialized as a linear layer over a patch's values; the bias keeps its default.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(
        self, images: Float[Tensor, "B C H W"], ids_keep: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return T = 1 + K tokens, the class token first (1 + L without `ids_keep`).

        With several class tokens, there are so many in the place of one.
        """
        return self.norm(self.tokens(images, ids_keep))

    def tokens(
        self, images: Float[Tensor, "B C H W"], ids_keep: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return the tokens of `forward` before the last norm."""
        patches = self._embed(images, ids_keep)  # (B, L, D) or (B, K, D)
        # The class token's position is zero, as in the reference.
        class_token = self.cls_token.expand(patches.shape[0], -1, -1)
        return self.blocks(torch.cat([class_token, patches], dim=1))  # (B, 1 + K, D)

    def maps(
        self, images: Float[Tensor, "B C H W"], ids_keep: Int[Tensor, "B K"]
    ) -> list[Float[Tensor, "B D h w"]]:
        """Return the kept patches' tokens as one map, which is zero where a patch is not kept."""
        tokens = self(images, ids_keep)[:, self.num_prefix_tokens :]  # (B, K, D)
        rows, columns = self._grid(images)
        places = ids_keep[:, :, None].expand(-1, -1, tokens.shape[2])
        flat = tokens.new_zeros(len(tokens), rows * columns, tokens.shape[2])
        return [flat.scatter(1, places, tokens).transpose(1, 2).unflatten(2, (rows, columns))]

    def feature_map(
        self, images: Float[Tensor, "B C H W"], *, window: int = 0
    ) -> Float[Tensor, "B D h w"]:
        """Return the patch tokens after the last norm as a map, one place for each patch.

        Args:
            images: Of any size that the patches tile.
            window: 0 lets each patch attend to all patches. Otherwise a patch attends to those in
                its window of `window` x `window`, and to all patches in four evenly spread blocks,
                without a class token: ViTDet, Li et al. 2022, https://arxiv.org/abs/2203.16527,
                section 3. Use it for large images, because the cost of attention grows with the
                square of the number of patches.
        """
        rows, columns = self._grid(images)
        if window == 0:
            tokens = self.norm(self.tokens(images))[:, self.num_prefix_tokens :]
            return tokens.transpose(1, 2).unflatten(2, (rows, columns))
        tokens = self._embed(images)
        depth = len(self.blocks)
        spread = {-(-depth * i // _GLOBAL_BLOCKS) for i in range(1, _GLOBAL_BLOCKS + 1)}
        for number, block in enumerate(self.blocks, start=1):
            if number in spread:
                tokens = block(tokens)
            else:
                windows = _to_windows(tokens, window, (rows, columns))
                tokens = _from_windows(block(windows), window, (rows, columns))
        return self.norm(tokens).transpose(1, 2).unflatten(2, (rows, columns))

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image {height}x{width} is not a multiple of patch_size={self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def _embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed the kept patches alone, by a matrix product, or all, by timm's convolution."""
        positions = resample_positions(self.positions, self.grid_size, self._grid(images))
        if ids_keep is None:
            return self.patch_embed(images) + positions
        patches = take_patches(images, self.patch_size, ids_keep)  # (B, K, P)
        projection = self.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P), in `patchify`'s order
        return F.linear(patches, weight, projection.bias) + positions[ids_keep]


def _to_windows(tokens: Tensor, window: int, grid_size: tuple[int, int]) -> Tensor:
    """Split (B, h * w, D) into (B * windows, window * window, D), with zeros beyond the edges."""
    rows, columns = grid_size
    batch, _, dim = tokens.shape
    down, across = -(-rows // window), -(-columns // window)
    padding = (0, 0, 0, across * window - columns, 0, down * window - rows)
    tokens = F.pad(tokens.view(batch, rows, columns, dim), padding)
    tokens = tokens.view(batch, down, window, across, window, dim).transpose(2, 3)
    return tokens.reshape(-1, window * window, dim)


def _from_windows(windows: Tensor, window: int, grid_size: tuple[int, int]) -> Tensor:
    """Undo `_to_windows`: (B, h * w, D)."""
    rows, columns = grid_size
    down, across, dim = -(-rows // window), -(-columns // window), windows.shape[2]
    tokens = windows.view(-1, down, across, window, window, dim).transpose(2, 3)
    tokens = tokens.reshape(-1, down * window, across * window, dim)
    return tokens[:, :rows, :columns].flatten(1, 2)


def _initialize_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        # Xavier treats the fused query, key and value as one matrix.
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
