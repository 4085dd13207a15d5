"""The light convolutional decoder, from the encoder's maps to the pixels of the removed patches.

Source: SparK, Tian et al. 2023, https://arxiv.org/abs/2301.03580, section 3. Differs: group norms
in place of batch norms, a layer norm before each skip, and one transposed convolution from stride 4
to the pixels.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from mae_core.model.feature_pyramid import group_norm
from mae_core.model.visible import enlarged, keep_mask
from mae_core.patching import take_patches

_FINEST_STRIDE = 4  # the last transposed convolution predicts patches of this side at once
_LEAST_WIDTH = 16


class DeconvolutionDecoder(nn.Module):
    """Predict the removed patches' pixels from maps that are zero where patches are removed.

    Each scale starts with a map twice as fine as the one before. The encoder's map of that scale,
    where there is one, is added to it, with a mask token in the place of what is removed.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int],
        strides: Sequence[int],
        grid_size: tuple[int, int],
        dim: int,
        depth: int,
        in_chans: int,
    ) -> None:
        """Build the scales.

        Args:
            channels: Of each of the encoder's maps, finest first.
            strides: Of each of these maps; the last one is the patch size.
            grid_size: Rows and columns of patches.
            dim: Channels of the coarsest scale; each finer one has half of those before it.
            depth: 3x3 convolutions at each scale.
            in_chans: Channels of the predicted pixels.
        """
        super().__init__()
        self.grid_size = grid_size
        self.patch_size = strides[-1]
        scales = _scales(self.patch_size)
        self.strides = tuple(scales)
        widths = [max(_LEAST_WIDTH, dim // 2**level) for level in range(len(scales))]
        # Of several maps of one stride, the last is the deepest.
        places = {stride: place for place, stride in enumerate(strides)}
        self.sources = tuple(places.get(stride) for stride in scales)
        self.skips = nn.ModuleDict(
            {
                str(stride): _Skip(channels[place], width)
                for stride, place, width in zip(scales, self.sources, widths, strict=True)
                if place is not None
            }
        )
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 2, stride=2) for wide, narrow in pairwise(widths)
        )
        self.scales = nn.ModuleList(_convolutions(width, depth) for width in widths)
        self.pred = nn.ConvTranspose2d(widths[-1], in_chans, scales[-1], stride=scales[-1])

    def forward(
        self,
        maps: Sequence[Float[Tensor, "B _ _ _"]],
        ids_keep: Int[Tensor, "B K"],
        ids_removed: Int[Tensor, "B R"],
    ) -> Float[Tensor, "B R P"]:
        """Decode the maps of the encoder, finest first."""
        mask = keep_mask(ids_keep, self.grid_size)
        features: Tensor | None = None
        for level, (stride, place) in enumerate(zip(self.strides, self.sources, strict=True)):
            if features is not None:
                features = self.ups[level - 1](features)
            if place is not None:
                visible = enlarged(mask, self.patch_size // stride)
                skip = self.skips[str(stride)](maps[place], visible)
                features = skip if features is None else features + skip
            features = self.scales[level](features)
        assert features is not None
        return take_patches(self.pred(features), self.patch_size, ids_removed)


class _Skip(nn.Module):
    """A map of the encoder at the decoder's width, with a mask token where it is removed."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.project = nn.Conv2d(channels, width, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, features: Tensor, visible: Tensor) -> Tensor:
        projected: Tensor = self.project(self.norm(features))
        return torch.where(visible, projected, self.mask_token.to(projected.dtype))


def _scales(patch_size: int) -> list[int]:
    """Return the strides of the scales: halved until 4 is reached, or an odd number."""
    scales = [patch_size]
    while scales[-1] > _FINEST_STRIDE and scales[-1] % 2 == 0:
        scales.append(scales[-1] // 2)
    return scales


def _convolutions(width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), group_norm(width), nn.GELU()]
    return nn.Sequential(*layers)
