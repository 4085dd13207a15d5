"""Compute maps at several strides from an encoder's map or maps, as dense heads need them."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
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


@runtime_checkable
class StagedEncoder(Protocol):
    """An encoder that gives a map at several strides, as convolutional ones do."""

    channels: tuple[int, ...]  # of each map, finest first
    strides: tuple[int, ...]  # of each map, which rise and may be equal

    def stages(self, images: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _ _ _"]]: ...


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


class StagePyramid(nn.Module):
    """A feature pyramid from the maps of an encoder's stages, each level from the one it needs.

    Source: Lin et al. 2017, https://arxiv.org/abs/1612.03144. Differs: group norms, and the
    convolution of a level comes before the coarser level is added.
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, int]],
        *,
        strides: Sequence[int],
        channels: int,
        top_down: bool = True,
    ) -> None:
        """Build the levels.

        Args:
            stages: Channels and stride of each map, finest first.
            strides: Strides of the levels, finest first. A level that no map has is pooled from the
                last map, or deconvolved from the first.
            channels: Channels of each level.
            top_down: Add each coarser level to the next finer one, which then knows what it knows.
        """
        super().__init__()
        self.strides = tuple(strides)
        self.channels = channels
        self.top_down = top_down
        # The deepest map that is at least as fine as the level.
        self.sources = tuple(
            max((i for i, (_, own) in enumerate(stages) if own <= wanted), default=0)
            for wanted in strides
        )
        self.levels = nn.ModuleList(
            _level(*stages[source], wanted, channels)
            for source, wanted in zip(self.sources, strides, strict=True)
        )

    def forward(self, features: list[Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B E _ _"]]:
        """Return one map per stride, in the order of `strides`."""
        levels = [
            level(features[source]) for source, level in zip(self.sources, self.levels, strict=True)
        ]
        if self.top_down:
            for i in range(len(levels) - 1, 0, -1):
                levels[i - 1] = levels[i - 1] + F.interpolate(
                    levels[i], size=levels[i - 1].shape[-2:], mode="nearest"
                )
        return levels


def build_pyramid(
    encoder: MapEncoder, *, strides: Sequence[int], channels: int, top_down: bool = True
) -> FeaturePyramid | StagePyramid:
    """Build the pyramid that fits what the encoder gives; see both for the arguments."""
    if isinstance(encoder, StagedEncoder):
        stages = list(zip(encoder.channels, encoder.strides, strict=True))
        return StagePyramid(stages, strides=strides, channels=channels, top_down=top_down)
    return FeaturePyramid(encoder.embed_dim, encoder.patch_size, strides=strides, channels=channels)


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
