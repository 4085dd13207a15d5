"""The encoder as one function from raw pixels to features, in operations that ONNX has.

It computes what `MaskedEncoder` does. Positions are resampled by matrices instead of torch's
interpolation, so that the exported graph takes images of any size that the patches tile.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mae_core.model.encoder import MaskedEncoder

_CUBIC = -0.5  # the kernel's parameter where torch resamples with antialiasing


class RawPixelEncoder(nn.Module):
    """Normalize pixels of 0 to 255, encode all patches, and return tokens and their mean."""

    mean: Tensor  # (1, C, 1, 1)
    std: Tensor  # (1, C, 1, 1)

    def __init__(
        self, encoder: MaskedEncoder, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(
        self, pixels: UInt8[Tensor, "B C H W"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D"]]:
        """Return all tokens, the class token first, and the mean of the patches' tokens."""
        encoder = self.encoder
        patches = encoder.patch_embed.proj((pixels.float() / 255 - self.mean) / self.std)
        # Counted by sums, because the sizes of the exported graph are not known yet.
        ones = torch.ones_like(patches[0, 0])  # (h, w)
        across_rows = cubic_matrix(ones[:, 0].cumsum(0), encoder.grid_size[0])
        across_columns = cubic_matrix(ones[0].cumsum(0), encoder.grid_size[1])
        table = encoder.positions.view(*encoder.grid_size, -1)  # (rows, columns, D)
        table = torch.einsum("hr,rcd->hcd", across_rows, table)
        table = torch.einsum("wc,hcd->hwd", across_columns, table)
        tokens = patches.flatten(2).transpose(1, 2) + table.flatten(0, 1)  # (B, h * w, D)
        class_token = encoder.cls_token.expand(tokens.shape[0], -1, -1)
        tokens = encoder.norm(encoder.blocks(torch.cat([class_token, tokens], dim=1)))
        return tokens, tokens[:, self.encoder.num_prefix_tokens :].mean(dim=1)


def cubic_matrix(numbers: Float[Tensor, " new"], old: int) -> Float[Tensor, "new old"]:
    """Return the matrix that resamples `old` values as torch's antialiased bicubic does.

    Args:
        numbers: 1, 2, ... up to the number of values wanted.
        old: Number of values that there are.
    """
    scale = old / numbers[-1]
    centre = (numbers - 0.5) * scale
    places = torch.arange(old, dtype=torch.float32, device=numbers.device) + 0.5
    x = ((places[None] - centre[:, None]) / scale.clamp(min=1.0)).abs()
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = ((_CUBIC * x - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)
