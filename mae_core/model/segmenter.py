"""Predict a class for each pixel from any encoder's feature map.

Logits are (B, K, H, W) for K classes; targets are class indices, or `IGNORE` for pixels to skip.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mae_core.data.label_maps import IGNORE
from mae_core.model.dense import PLAIN_MAP, DenseModel, MapOptions
from mae_core.model.feature_pyramid import MapEncoder, build_pyramid

Head = Literal["linear", "fpn", "upernet"]

_FINEST_STRIDE = 4  # of a pyramid's maps, as in Kirillov et al. and UPerNet
_NUM_LEVELS = 4
_POOLING_BINS = (1, 2, 3, 6)  # Zhao et al. 2017 (PSPNet), https://arxiv.org/abs/1612.01105


class Segmenter(DenseModel):
    """Return logits for each pixel."""

    def __init__(
        self,
        encoder: MapEncoder,
        head: "LinearHead | PyramidHead",
        options: MapOptions = PLAIN_MAP,
    ) -> None:
        """Put the head on the encoder's conditioned map; see `DenseModel`."""
        super().__init__(encoder, options)
        self.head = head

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K H W"]:
        """Return logits for each pixel of images of any size that the patches tile."""
        logits = self.head(self.feature_map(images))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


class LinearHead(nn.Conv2d):
    """A linear layer at each place of the map, at the encoder's stride.

    The 1x1 convolution and bilinear upsampling are those of DINOv2, Oquab et al. 2023,
    https://arxiv.org/abs/2304.07193, section 7.4. Differs: there is no batch norm before it,
    because its statistics would depend on the micro batch; `Conditioning` takes its place.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes, 1)

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:
        """Return logits at each place of the map, or of the last one of several."""
        return super().forward(features[-1] if isinstance(features, list) else features)


class PyramidHead(nn.Module):
    """Compute maps at several strides from the encoder's map and join them at the finest.

    Without pooling this is semantic FPN: Kirillov et al. 2019, https://arxiv.org/abs/1901.02446.
    Differs: one convolution per level instead of one per doubling. With pooling it is UPerNet:
    Xiao et al. 2018, https://arxiv.org/abs/1807.10221, which pools the coarsest level over the
    whole picture and concatenates the levels instead of adding them. All norms are group norms.
    """

    def __init__(
        self,
        encoder: MapEncoder,
        num_classes: int,
        *,
        channels: int,
        pooling: bool,
        finest_stride: int | None = None,
    ) -> None:
        """Build the levels.

        Args:
            encoder: Says what maps it gives; it is not kept.
            num_classes: Number of classes in the logits.
            channels: Channels of each level.
            pooling: True builds UPerNet, False semantic FPN.
            finest_stride: See `pyramid_strides`.
        """
        super().__init__()
        stride = encoder.patch_size
        strides = pyramid_strides(stride, finest_stride)
        # The last map is padded to a multiple of this, so that every level has whole places.
        self.multiple = max(1, strides[-1] // stride)
        self.stride = stride
        self.output_stride = strides[0]
        self.pyramid = build_pyramid(encoder, strides=strides, channels=channels, top_down=False)
        self.pooling = _PyramidPooling(channels) if pooling else None
        self.smooth = nn.ModuleList(_conv(channels, channels, 3) for _ in strides)
        self.fuse = _conv(channels * len(strides) if pooling else channels, channels, 3)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(
        self, features: Float[Tensor, "B D h w"] | list[Float[Tensor, "B _ _ _"]]
    ) -> Float[Tensor, "B K _ _"]:
        """Return logits at the finest stride, from the encoder's map or the maps of its stages."""
        last = features[-1] if isinstance(features, list) else features
        rows, columns = last.shape[-2:]
        if isinstance(features, list):
            levels = self.pyramid([self._padded(x, x.shape[2] // rows) for x in features])
        else:
            levels = self.pyramid(self._padded(features, 1))
        if self.pooling is not None:
            levels[-1] = self.pooling(levels[-1])
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + _resized(levels[i], levels[i - 1])
        smooth = [conv(level) for conv, level in zip(self.smooth, levels, strict=True)]
        smooth = [_resized(level, levels[0]) for level in smooth]
        joined = sum(smooth[1:], smooth[0]) if self.pooling is None else torch.cat(smooth, dim=1)
        logits = self.classify(self.fuse(joined))
        scale = self.stride // self.output_stride
        return logits[..., : rows * scale, : columns * scale]

    def _padded(self, features: Tensor, factor: int) -> Tensor:
        """Enlarge a map that is `factor` times as fine as the last to a multiple of `multiple`."""
        side = self.multiple * factor
        beyond = (0, -features.shape[3] % side, 0, -features.shape[2] % side)
        return F.pad(features, beyond, mode="replicate")


class _PyramidPooling(nn.Module):
    """The map concatenated with its means over coarse grids: Zhao et al. 2017, section 3.2."""

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
        # Up to 32 groups of at least four channels: one channel at one place would become 0.
        nn.GroupNorm(math.gcd(32, max(1, out_channels // 4)), out_channels),
        nn.GELU(),
    )


def _resized(level: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(level, size=like.shape[-2:], mode="bilinear", align_corners=False)


def pyramid_strides(patch_size: int, finest: int | None = None) -> tuple[int, ...]:
    """Return four strides, each twice the one before.

    Args:
        patch_size: Stride of the encoder's map.
        finest: The first of them: `patch_size` divided by a power of two. By default it is 4, or
            the nearest stride above it that divides `patch_size` by a power of two; for patches of
            4 pixels or less it is half of `patch_size`. So 16 gives (4, 8, 16, 32), 14 gives (7,
            14, 28, 56) and 4 gives (2, 4, 8, 16).
    """
    if finest is None:
        finest = patch_size
        while finest % 2 == 0 and (finest > _FINEST_STRIDE or finest == patch_size):
            finest //= 2
    allowed = [patch_size >> k for k in range(patch_size.bit_length()) if patch_size % 2**k == 0]
    if finest not in allowed:
        raise ValueError(
            f"stride={finest} of the head's output: for patches of {patch_size} pixels it must be "
            f"one of {', '.join(map(str, allowed))}"
        )
    return tuple(finest * 2**level for level in range(_NUM_LEVELS))


def output_stride(head: Head, patch_size: int, finest: int | None = None) -> int:
    """Return pixels per place of a head's output.

    Args:
        head: linear has the stride of the encoder's map.
        patch_size: Stride of the encoder's map.
        finest: See `pyramid_strides`.

    Raises:
        ValueError: The head can't have the stride `finest`.
    """
    if head != "linear":
        return pyramid_strides(patch_size, finest)[0]
    if finest not in (None, patch_size):
        raise ValueError(f"stride={finest}: head=linear has the encoder's, {patch_size}; use fpn")
    return patch_size


def build_segmenter(
    encoder: MapEncoder,
    *,
    num_classes: int,
    head: Head,
    stride: int | None = None,
    channels: int = 128,
    options: MapOptions = PLAIN_MAP,
) -> Segmenter:
    """Put a new head on an encoder, which is used as it is and not copied.

    Args:
        encoder: An `nn.Module` with `embed_dim`, `patch_size` and `feature_map`.
        num_classes: K.
        head: linear, fpn or upernet, from fastest to slowest.
        stride: Pixels per place of the head's output; see `pyramid_strides`. linear has the
            encoder's.
        channels: Channels of each level of a pyramid; linear has no levels.
        options: How the encoder's map is made.
    """
    module: LinearHead | PyramidHead
    if head == "linear":
        module = LinearHead(encoder.embed_dim, num_classes)
    else:
        module = PyramidHead(
            encoder,
            num_classes,
            channels=channels,
            pooling=head == "upernet",
            finest_stride=stride,
        )
    return Segmenter(encoder, module, options)


def segmentation_loss(
    logits: Float[Tensor, "B K H W"],
    targets: Int[Tensor, "B H W"],
    weights: Float[Tensor, " B"],
    class_weights: Float[Tensor, " K"] | None = None,
) -> Float[Tensor, ""]:
    """Return the cross-entropy: the mean over an image's counted pixels, then a weighted mean.

    The denominator of the weighted mean is B, whatever the weights are: a batch entry without an
    image has weight 0 and adds nothing, and neither does an image whose pixels are all `IGNORE`.

    `class_weights` multiply the loss of each class's pixels; without them, classes with few pixels
    hardly count.
    """
    # fp32: a bf16 sum over H * W pixels loses the small values.
    losses = F.cross_entropy(
        logits.float(), targets, class_weights, ignore_index=IGNORE, reduction="none"
    )
    num_pixels = (targets != IGNORE).sum(dim=(1, 2)).clamp(min=1)
    per_image = losses.sum(dim=(1, 2)) / num_pixels  # (B,); ignored pixels are already 0
    return (per_image * weights).sum() / len(weights)


def sliding_window_logits(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    *,
    crop: tuple[int, int],
    stride: tuple[int, int],
) -> Float[Tensor, "B K H W"]:
    """Compute logits of images of any size, averaged where windows overlap.

    The last window ends at the edge. Images smaller than a window are padded by reflection and
    cropped again. Runs without gradients in eval mode, and restores the model's mode.

    Args:
        model: Maps (B, C, *crop) to (B, K, *crop).
        images: Normalised as in training.
        crop: Height and width of a window.
        stride: Pixels from one window to the next, down and across.
    """
    if not all(1 <= step <= side for step, side in zip(stride, crop, strict=True)):
        raise ValueError(f"stride={stride} is not in 1..crop={crop}: pixels would be skipped")
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


def central_window(images: Float[Tensor, "B C H W"], crop: tuple[int, int]) -> Tensor:
    """Cut a window from the middle of images; smaller ones are padded by reflection."""
    height, width = (max(own, side) for own, side in zip(images.shape[-2:], crop, strict=True))
    rows = _mirrored(images.shape[-2], height, images.device)[(height - crop[0]) // 2 :][: crop[0]]
    columns = _mirrored(images.shape[-1], width, images.device)[(width - crop[1]) // 2 :][: crop[1]]
    return images[:, :, rows][..., columns]


def _window_starts(side: int, crop: int, stride: int) -> list[int]:
    num_windows = math.ceil((side - crop) / stride) + 1
    return [min(number * stride, side - crop) for number in range(num_windows)]


def _mirrored(side: int, wanted: int, device: torch.device) -> Tensor:
    """Return indices 0..side-1, back down, and so on: a picture of any size fills a window."""
    places = torch.arange(wanted, device=device) % (2 * side)
    return torch.minimum(places, 2 * side - 1 - places)
