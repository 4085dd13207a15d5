"""A convolutional encoder of timm that can encode a subset of an image's patches.

A patch is a place of its last map, so the encoder's stride is the patch size. timm's strides are
32. For small images the first layers keep the resolution, as is usual for CIFAR.

Source: SparK, Tian et al. 2023, https://arxiv.org/abs/2301.03580. Differs: dense convolutions, and
no norm after the last stage.
"""

from functools import partial
from typing import Any, cast

from jaxtyping import Float, Int
from timm.models import create_model, group_parameters
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from torch import Tensor, nn

from mae_core.config import CONV_ENCODERS, CONV_STRIDES
from mae_core.model.visible import MaskedBatchNorm2d, Visible, enlarged, keep_mask

_NUM_STAGES = 4


class ConvEncoder(nn.Module):
    """Encode the kept patches of an image, or all of them without `ids_keep`.

    Accepts images of any size that its patches tile. The weights are named as in timm, below `net`.
    """

    num_prefix_tokens = 0

    def __init__(
        self, name: str, *, patch_size: int, in_chans: int, drop_path_rate: float = 0.0
    ) -> None:
        """Build the encoder; its weights come from torch's global generator.

        Args:
            name: timm's name, one of `CONV_ENCODERS`.
            patch_size: Its stride, one of `CONV_STRIDES`.
            in_chans: Channels of an image.
            drop_path_rate: Stochastic depth of the last block, rising from 0 at the first.
        """
        super().__init__()
        self.patch_size = patch_size
        self.channels = CONV_ENCODERS[name]
        self.embed_dim = self.channels[-1]
        self.visible = Visible()
        self.net = _build_net(name, self.visible, in_chans, drop_path_rate)
        halvings = _NUM_STAGES - 1
        if patch_size != CONV_STRIDES[0]:
            halvings = _lower_stride(self.net, patch_size)
        strides = [patch_size // 2 ** min(left, halvings) for left in range(_NUM_STAGES)]
        self.strides = tuple(reversed(strides))
        self.visible.watch(self.net)

    def forward(
        self, images: Float[Tensor, "B C H W"], ids_keep: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B K D"]:
        """Return the places of the last map as tokens: the kept ones in the order of `ids_keep`."""
        tokens = self.maps(images, ids_keep)[-1].flatten(2).transpose(1, 2)  # (B, L, D)
        if ids_keep is None:
            return tokens
        return tokens.gather(1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]))

    def maps(
        self, images: Float[Tensor, "B C H W"], ids_keep: Int[Tensor, "B K"] | None = None
    ) -> list[Float[Tensor, "B _ _ _"]]:
        """Return the maps of the stages, finest first; zero where a patch is not kept."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image {height}x{width} is not a multiple of patch_size={self.patch_size}"
            )
        if ids_keep is None:
            return self._run(images)
        mask = keep_mask(ids_keep, (height // self.patch_size, width // self.patch_size))
        with self.visible.only(mask):
            # Filled and not multiplied, so that not even a NaN of a removed patch is seen.
            return self._run(images.masked_fill(~enlarged(mask, self.patch_size), 0.0))

    def stages(self, images: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Return the maps of whole images, finest first; dense heads read them."""
        return self.maps(images)

    def feature_map(
        self, images: Float[Tensor, "B C H W"], *, window: int = 0
    ) -> Float[Tensor, "B D h w"]:
        """Return the last map, one place for each patch.

        Args:
            images: Of any size that the patches tile.
            window: Must be 0: convolutions have no attention to limit.
        """
        if window:
            raise ValueError(f"window={window} limits attention, which this encoder has not: set 0")
        return self.maps(images)[-1]

    def layers(self) -> dict[str, int]:
        """Say which layer each parameter is in, as timm does: 0 is the stem, blocks follow."""
        net: Any = self.net
        numbers = group_parameters(net, net.group_matcher(), reverse=True)
        return {f"net.{name}": number for name, number in numbers.items()}

    def _run(self, images: Tensor) -> list[Tensor]:
        maps = cast(Any, self.net).forward_intermediates(
            images, indices=_NUM_STAGES, intermediates_only=True
        )
        return cast(list[Tensor], maps)


def _build_net(name: str, visible: Visible, in_chans: int, drop_path_rate: float) -> nn.Module:
    options: dict[str, Any] = {}
    if name.startswith("resnet"):
        options["norm_layer"] = partial(MaskedBatchNorm2d, visible=visible)
    net: Any = create_model(
        name, in_chans=in_chans, num_classes=0, drop_path_rate=drop_path_rate, **options
    )
    # Of no use to a map; DDP rejects a parameter, such as of the norm in it, without a gradient.
    net.reset_classifier(0, "")
    is_convnext = isinstance(net, ConvNeXt)
    if is_convnext:
        net.head = nn.Identity()
    return cast(nn.Module, net)


def _lower_stride(net: Any, patch_size: int) -> int:
    """Change the first layers for a stride below 32; return how often the stages halve the map."""
    stem_stride = max(1, patch_size // 8)
    is_lowest = patch_size == CONV_STRIDES[-1]
    is_resnet = isinstance(net, ResNet)
    if is_resnet:
        net.maxpool = nn.Identity()
        if stem_stride == 1:
            # 3x3 as for CIFAR in He et al. 2015, https://arxiv.org/abs/1512.03385, section 4.2.
            net.conv1 = _like(net.conv1, kernel=3, stride=1)
        if is_lowest:
            for layer in net.layer2.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.stride = (1, 1)
    else:
        net.stem[0] = _like(net.stem[0], kernel=3 if stem_stride == 1 else 2, stride=stem_stride)
        if is_lowest:
            net.stages[1].downsample[1] = _like(net.stages[1].downsample[1], kernel=1, stride=1)
    return _NUM_STAGES - 2 if is_lowest else _NUM_STAGES - 1


def _like(old: nn.Conv2d, *, kernel: int, stride: int) -> nn.Conv2d:
    """Return a new convolution between the same channels, with weights of the same deviation."""
    new = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        kernel,
        stride,
        padding=kernel // 2 if stride == 1 else 0,
        bias=old.bias is not None,
    )
    nn.init.trunc_normal_(new.weight, std=float(old.weight.detach().std()))
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new
