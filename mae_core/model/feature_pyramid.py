"""Compute maps at several strides from an encoder's last map, as dense heads need them."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class MapEncoder(Protocol):
    """The interface that a head needs from an encoder, which need not be a transformer."""

    embed_dim: int
    patch_size: int  # pixels per place of the map

    def feature_map(
        self, images: Float[Tensor, "B C H W"], *, window: int = 0
    ) -> Float[Tensor, "B D h w"]: ...


class FeaturePyramid(nn.Module):
    """A simple feature pyramid: every level is the encoder's map, deconvolved or pooled.

    Source: ViTDet, Li et al. 2022, https://arxiv.org/abs/2203.16527, section 3. Differs: group
    norm in place of layer norm over channels.
    """

    def __init__(
        self, dim: int, stride: int, *, strides: Sequence[int] = (4, 8, 16, 32), channels: int = 256
    ) -> None:
        """Build the levels.

        Args:
            dim: Channels of the encoder's map.
            stride: Pixels per place of the encoder's map.
            strides: Strides of the levels; each is `stride` times or divided by a power of two.
            channels: Channels of each level.
        """
        super().__init__()
        self.strides = tuple(strides)
        self.channels = channels
        self.levels = nn.ModuleList(_level(dim, stride, wanted, channels) for wanted in strides)

    def forward(self, features: Float[Tensor, "B D h w"]) -> list[Float[Tensor, "B E _ _"]]:
        """Return one map per stride, in the order of `strides`."""
        return [level(features) for level in self.levels]


def _level(dim: int, stride: int, wanted: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    while stride > wanted and stride % 2 == 0:
        layers += [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), group_norm(dim // 2), nn.GELU()]
        dim, stride = dim // 2, stride // 2
    while stride < wanted and wanted % (2 * stride) == 0:
        layers.append(nn.MaxPool2d(2))
        stride *= 2
    if stride != wanted:
        raise ValueError(f"stride {wanted} is not the encoder's stride times a power of two")
    layers += [nn.Conv2d(dim, channels, 1), group_norm(channels)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1), group_norm(channels)]
    return nn.Sequential(*layers)


def group_norm(channels: int) -> nn.GroupNorm:
    """Use groups of at least four channels, as one channel alone at one place would become 0."""
    groups = (32, 16, 8, 4, 2, 1)
    return nn.GroupNorm(next(n for n in groups if channels % (4 * n) == 0 or n == 1), channels)
