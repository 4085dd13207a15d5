"""A class for each pixel, from any encoder's feature map.

Logits are (B, K, H, W), K classes; targets are class indices, with `IGNORE` where no class counts.
"""

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_core.data.label_maps import IGNORE
from mae_core.model.feature_pyramid import FeaturePyramid, MapEncoder

Head = Literal["linear", "fpn", "upernet"]

_FINEST_STRIDE = 4  # of the maps of a pyramid, as Kirillov et al. and UPerNet have it
_NUM_LEVELS = 4
_POOLING_BINS = (1, 2, 3, 6)  # Zhao et al. 2017 (PSPNet), https://arxiv.org/abs/1612.01105


class Segmenter(nn.Module):
    def __init__(
        self, encoder: MapEncoder, head: nn.Module, *, window: int = 0, frozen: bool = False
    ) -> None:
        """Put the head on the encoder.

        Args:
            encoder: an `nn.Module`.
            head: (B, D, h, w) features to (B, K, ., .) logits, at any one stride.
            window: as the encoder's `feature_map` takes it.
            frozen: the encoder gets no gradient and stays in eval mode.
        """
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.window = window
        self.frozen = frozen
        module = cast(nn.Module, encoder)
        if frozen:
            module.requires_grad_(False)
            module.eval()
        elif window and isinstance(class_token := getattr(encoder, "cls_token", None), Tensor):
            # Windows see no class token, and DDP waits for the gradient of each parameter.
            class_token.requires_grad_(False)

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self.frozen:
            cast(nn.Module, self.encoder).eval()
        return self

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K H W"]:
        """Logits for each pixel of images of any size that the patches tile."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.encoder.feature_map(images, window=self.window)  # (B, D, h, w)
        logits = self.head(features)
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


class LinearHead(nn.Sequential):
    """A linear layer on normalised features, at the encoder's stride.

    Batch norm without scale and offset as in the linear probe of MAE, He et al. 2021,
    https://arxiv.org/abs/2111.06377, section A.1; a 1x1 convolution and bilinear upsampling as
    in DINOv2, Oquab et al. 2023, https://arxiv.org/abs/2304.07193, section 7.4.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(nn.BatchNorm2d(dim, affine=False), nn.Conv2d(dim, num_classes, 1))


class PyramidHead(nn.Module):
    """Several strides of the encoder's map, joined at the finest.

    Without pooling, semantic FPN: Kirillov et al. 2019, https://arxiv.org/abs/1901.02446. Differs:
    a convolution a level, not one for each doubling. With it, UPerNet: Xiao et al. 2018,
    https://arxiv.org/abs/1807.10221, which pools the coarsest level over the whole picture and
    joins levels side by side rather than by their sum. Group norm throughout.
    """

    def __init__(
        self, dim: int, stride: int, num_classes: int, *, channels: int, pooling: bool
    ) -> None:
        """Build the levels.

        Args:
            dim: channels of the encoder's map.
            stride: pixels to a place of it.
            num_classes: of the logits.
            channels: of each level.
            pooling: whether it is UPerNet.
        """
        super().__init__()
        strides = pyramid_strides(stride)
        # The map is padded to this many places, so that every level is a whole one.
        self.multiple = max(1, strides[-1] // stride)
        self.stride = stride
        self.finest_stride = strides[0]
        self.pyramid = FeaturePyramid(dim, stride, strides=strides, channels=channels)
        self.pooling = _PyramidPooling(channels) if pooling else None
        self.smooth = nn.ModuleList(_conv(channels, channels, 3) for _ in strides)
        self.fuse = _conv(channels * len(strides) if pooling else channels, channels, 3)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "B K _ _"]:
        """Logits at the finest stride."""
        rows, columns = features.shape[-2:]
        beyond = (0, -columns % self.multiple, 0, -rows % self.multiple)
        levels = self.pyramid(F.pad(features, beyond, mode="replicate"))
        if self.pooling is not None:
            levels[-1] = self.pooling(levels[-1])
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + _resized(levels[i], levels[i - 1])
        smooth = [conv(level) for conv, level in zip(self.smooth, levels, strict=True)]
        smooth = [_resized(level, levels[0]) for level in smooth]
        joined = sum(smooth[1:], smooth[0]) if self.pooling is None else torch.cat(smooth, dim=1)
        logits = self.classify(self.fuse(joined))
        scale = self.stride // self.finest_stride
        return logits[..., : rows * scale, : columns * scale]


class _PyramidPooling(nn.Module):
    """The map beside its means over a few coarse grids: Zhao et al. 2017, section 3.2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(_conv(channels, channels, 1) for _ in _POOLING_BINS)
        self.fuse = _conv(channels * (1 + len(_POOLING_BINS)), channels, 3)

    def forward(self, level: Tensor) -> Tensor:
        pooled = [
            _resized(reduce(F.adaptive_avg_pool2d(level, bins)), level)
            for reduce, bins in zip(self.reduce, _POOLING_BINS, strict=True)
        ]
        return self.fuse(torch.cat([level, *pooled], dim=1))


def _conv(channels: int, out_channels: int, side: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, side, padding=side // 2, bias=False),
        # 32 groups of at least four channels: one that is alone at one place is normalised to 0.
        nn.GroupNorm(math.gcd(32, max(1, out_channels // 4)), out_channels),
        nn.GELU(),
    )


def _resized(level: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(level, size=like.shape[-2:], mode="bilinear", align_corners=False)


def pyramid_strides(patch_size: int) -> tuple[int, ...]:
    """Four strides, each twice the one before.

    The finest is 4, or the nearest above it that divides `patch_size` by a power of two; where
    patches are 4 pixels or less, half of them. So 16 gives (4, 8, 16, 32), 14 (7, 14, 28, 56) and
    4 (2, 4, 8, 16).
    """
    finest = patch_size
    while finest % 2 == 0 and (finest > _FINEST_STRIDE or finest == patch_size):
        finest //= 2
    return tuple(finest * 2**level for level in range(_NUM_LEVELS))


def build_segmenter(
    encoder: MapEncoder,
    *,
    num_classes: int,
    head: Head,
    channels: int = 128,
    window: int = 0,
    frozen: bool = False,
) -> Segmenter:
    """Put a new head on an encoder, which is kept and not copied.

    Args:
        encoder: an `nn.Module` with `embed_dim`, `patch_size` and `feature_map`.
        num_classes: K.
        head: the larger the slower: linear, fpn, upernet.
        channels: of each level of a pyramid; linear has none.
        window: 0 lets each patch see all; see `MaskedEncoder.feature_map`.
        frozen: only the head is trained.
    """
    module: nn.Module
    if head == "linear":
        module = LinearHead(encoder.embed_dim, num_classes)
    else:
        module = PyramidHead(
            encoder.embed_dim,
            encoder.patch_size,
            num_classes,
            channels=channels,
            pooling=head == "upernet",
        )
    return Segmenter(encoder, module, window=window, frozen=frozen)


def segmentation_loss(
    logits: Float[Tensor, "B K H W"],
    targets: Int[Tensor, "B H W"],
    weights: Float[Tensor, " B"],
    class_weights: Float[Tensor, " K"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy: the mean over an image's pixels that count, then the weighted mean over B.

    The denominator is B, whatever the weights: a place that a batch holds for no image has weight
    0 and adds nothing, and so does an image whose pixels are all `IGNORE`.

    `class_weights` multiply the loss of each class's pixels: thin classes drown otherwise.
    """
    # fp32: a bf16 sum over H * W pixels loses the small ones.
    losses = F.cross_entropy(
        logits.float(), targets, class_weights, ignore_index=IGNORE, reduction="none"
    )
    num_pixels = (targets != IGNORE).sum(dim=(1, 2)).clamp(min=1)
    per_image = losses.sum(dim=(1, 2)) / num_pixels  # (B,); ignored pixels are 0 already
    return (per_image * weights).sum() / len(weights)


def sliding_window_logits(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    *,
    crop: tuple[int, int],
    stride: tuple[int, int],
) -> Float[Tensor, "B K H W"]:
    """Logits of images of any size, averaged where windows overlap.

    The last window ends at the edge. Images smaller than a window are mirrored beyond their edges
    and cut back. Without gradients and in eval mode; the model's mode is put back.

    Args:
        model: (B, C, *crop) to (B, K, *crop).
        images: normalised as in training.
        crop: height and width of a window.
        stride: pixels from one window to the next, down and across.
    """
    if not all(1 <= step <= side for step, side in zip(stride, crop, strict=True)):
        raise ValueError(f"stride={stride} is not in 1..crop={crop}: pixels would be left out")
    height, width = images.shape[-2:]
    rows = _mirrored(height, max(height, crop[0]), images.device)
    columns = _mirrored(width, max(width, crop[1]), images.device)
    padded = images[:, :, rows][..., columns]
    corners = [
        (top, left)
        for top in _window_starts(len(rows), crop[0], stride[0])
        for left in _window_starts(len(columns), crop[1], stride[1])
    ]
    was_training = model.training
    model.eval()
    total, count = images.new_zeros(()), images.new_zeros(padded.shape[-2:])
    try:
        with torch.no_grad():
            for top, left in corners:
                window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
                logits = model(padded[window]).float()
                if not total.ndim:
                    total = logits.new_zeros(*logits.shape[:2], *padded.shape[-2:])
                total[window] += logits
                count[window] += 1
    finally:
        model.train(was_training)
    return (total / count)[..., :height, :width]


def _window_starts(side: int, crop: int, stride: int) -> list[int]:
    num_windows = math.ceil((side - crop) / stride) + 1
    return [min(number * stride, side - crop) for number in range(num_windows)]


def _mirrored(side: int, wanted: int, device: torch.device) -> Tensor:
    """Indices 0..side-1, back again, and so on: any picture fills any window."""
    places = torch.arange(wanted, device=device) % (2 * side)
    return torch.minimum(places, 2 * side - 1 - places)
