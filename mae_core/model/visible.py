"""What of a picture is visible while a convolutional encoder runs.

A sparse convolution computes nothing where its input is removed. A dense one gives the same result
if what is removed is zero in the input of every convolution, so that it looks to its neighbours
like the padding beyond the picture's edge, and if norms count the visible places alone.

Source: SparK, Tian et al. 2023, https://arxiv.org/abs/2301.03580, section 3; ConvNeXt V2, Woo et
al. 2023, https://arxiv.org/abs/2301.00808, section 3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from torch import Tensor, nn

# What may give something else than zero where its input is zero, and whose output a convolution
# reads. Within a block of ConvNeXt all that follows its convolution is computed place by place. The
# norms between its stages are read by the downsampling, whose output is zeroed in `watch`.
_LEAKING = (nn.MaxPool2d, ConvNeXtBlock)


def keep_mask(ids_keep: Int[Tensor, "B K"], grid_size: tuple[int, int]) -> Bool[Tensor, "B 1 h w"]:
    """Return which patches are kept, as a map of the patches."""
    rows, columns = grid_size
    mask = torch.zeros(
        len(ids_keep), rows * columns, dtype=torch.bool, device=ids_keep.device
    ).scatter(1, ids_keep, value=True)
    return mask.view(-1, 1, rows, columns)


def enlarged(mask: Bool[Tensor, "B 1 h w"], factor: int) -> Bool[Tensor, "B 1 H W"]:
    """Repeat each place of a map `factor` times along both sides."""
    return mask.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


class Visible:
    """Removes from the maps of the layers that it watches what is not visible, while it is active.

    Shared by all layers of an encoder, because timm's layers pass on nothing but the map.
    """

    def __init__(self) -> None:
        self._masks: dict[int, Tensor] = {}  # by the number of rows of the map; empty: all is

    @contextmanager
    def only(self, mask: Bool[Tensor, "B 1 h w"]) -> Iterator[None]:
        """Let only the places of a map be visible where `mask` is True."""
        self._masks = {mask.shape[2]: mask}
        try:
            yield
        finally:
            self._masks = {}

    @property
    def is_active(self) -> bool:
        return bool(self._masks)

    def mask(self, features: Float[Tensor, "B C H W"]) -> Bool[Tensor, "B 1 H W"]:
        """Return what is visible of a map whose sides are multiples of those of the first mask."""
        rows = features.shape[2]
        if rows not in self._masks:
            first = next(iter(self._masks.values()))
            self._masks[rows] = enlarged(first, rows // first.shape[2])
        return self._masks[rows]

    def zeroed(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return a map with zeros where it is not visible."""
        return features * self.mask(features)

    def watch(self, net: nn.Module) -> None:
        """Let the layers of `net` remove what is not visible; batch norms do so by themselves."""
        for module in net.modules():
            if isinstance(module, _LEAKING):
                module.register_forward_hook(self._after)
            if isinstance(module, ConvNeXtStage):  # also behind the stem, where it changes nothing
                cast(nn.Module, module.downsample).register_forward_hook(self._after)
            if isinstance(module, GlobalResponseNorm):
                module.register_forward_pre_hook(self._before)

    def _after(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self.zeroed(output) if self.is_active else output

    def _before(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Zero the input of a global response norm, which sums squares over all places."""
        if not self.is_active:
            return inputs
        features = inputs[0]
        if module.channel_dim == 1:
            return (self.zeroed(features),)
        return (self.zeroed(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),)


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose statistics are those of the visible places of the batch."""

    def __init__(self, num_features: int, *, visible: Visible, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.visible = visible

    def forward(self, features: Tensor) -> Tensor:
        if not self.visible.is_active:
            return super().forward(features)
        if not self.training:
            return self.visible.zeroed(super().forward(features))
        # fp32: a bf16 sum over all places loses the small values.
        values, mask = features.float(), self.visible.mask(features)
        count = mask.sum()
        mean = (values * mask).sum(dim=(0, 2, 3), keepdim=True) / count
        centred = (values - mean) * mask
        variance = centred.square().sum(dim=(0, 2, 3), keepdim=True) / count
        self._remember(mean.detach().flatten(), variance.detach().flatten(), count)
        scale = self.weight.view(1, -1, 1, 1) * (variance + self.eps).rsqrt()
        return (centred * scale + self.bias.view(1, -1, 1, 1) * mask).to(features.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics as torch does, with the unbiased variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        self.num_batches_tracked.add_(1)
