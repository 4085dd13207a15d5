"""Find objects in images: an encoder, a pyramid of its feature map, and torchvision's dense heads.

Images come normalised, all of one size, and are neither resized nor padded here. Boxes are x0, y0,
x1, y1 in pixels of these images. Labels count from 0, without a background class.

Sources: FCOS, Tian et al. 2019, https://arxiv.org/abs/1904.01355; Faster R-CNN, Ren et al. 2015,
https://arxiv.org/abs/1506.01497; a plain ViT as the encoder, ViTDet, Li et al. 2022,
https://arxiv.org/abs/2203.16527.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from mae_core.data.boxes import Boxes
from mae_core.model.dense import PLAIN_MAP, DenseModel, MapOptions
from mae_core.model.feature_pyramid import (
    FeaturePyramid,
    MapEncoder,
    StagePyramid,
    build_pyramid,
)

HeadName = Literal["fcos", "faster_rcnn"]

_FCOS_GROUPS = 32  # in the group norm of torchvision's FCOS head
_ROI_SIDE = 7  # each proposal is pooled to this many places along each side
_NUM_PROPOSALS = 1000  # per level and image, before non-maximum suppression
_NUM_KEPT_PROPOSALS = 500  # after it; half of torchvision's, as our images are half as wide
_NUM_SAMPLED_ANCHORS = 256
_NUM_SAMPLED_PROPOSALS = 256


class BoxTargets(NamedTuple):
    """The `Boxes` of one image as tensors, and what else its losses depend on."""

    xyxy: Float[Tensor, "N 4"]
    labels: Int[Tensor, " N"]
    is_crowd: Bool[Tensor, " N"]
    picture: tuple[int, int] | None = None  # height and width without what lies beside the picture
    seed: int = 0  # of the draws that Faster R-CNN makes for this image


class DetectionLosses(NamedTuple):
    """Losses as sums: the loss of a global batch is the sum over its parts / that of the divisors.

    A part that divided by its own divisor would give its objects another weight than those of a
    part with more objects.
    """

    sums: dict[str, Float[Tensor, ""]]  # by name; their sum / divisor is to be minimised
    divisor: Float[Tensor, ""]  # number of matched places (FCOS) or images (Faster R-CNN)


class Detections(NamedTuple):
    """The objects found in one image, best first."""

    boxes: Float[Tensor, "K 4"]  # x0, y0, x1, y1 in pixels of the image
    scores: Float[Tensor, " K"]  # 0 to 1
    labels: Int[Tensor, " K"]  # from 0


class Detector(DenseModel):
    """Return losses in training (`forward`) and boxes otherwise (`detect`).

    The encoder and the pyramid run in the precision of the caller's autocast. The heads always run
    in float32, because a bf16 sum over all places loses most of them.
    """

    def __init__(
        self,
        encoder: MapEncoder,
        pyramid: FeaturePyramid | StagePyramid,
        heads: "FCOSHeads | RegionHeads",
        options: MapOptions = PLAIN_MAP,
    ) -> None:
        """Store the parts that `build_detector` made; see `DenseModel` for the encoder."""
        super().__init__(encoder, options)
        self.pyramid = pyramid
        self.heads = heads

    def forward(
        self, images: Float[Tensor, "B C H W"], boxes: Sequence[BoxTargets]
    ) -> DetectionLosses:
        """Return the losses. Needs train mode.

        Args:
            images: Normalised.
            boxes: The boxes of each image; may be empty. Crowd boxes are ignored.
        """
        if not self.training:
            raise RuntimeError("losses need train mode; call detect to find objects")
        if len(boxes) != len(images):
            raise ValueError(f"boxes of {len(boxes)} images for {len(images)} images")
        targets = [_without_crowds(target) for target in boxes]
        self._check_labels(targets)
        maps = self._maps(images)
        with torch.autocast(images.device.type, enabled=False):
            pictures = _image_list(images, [target.picture for target in targets])
            return self.heads.losses(maps, pictures, targets)

    def detect(
        self,
        images: Float[Tensor, "B C H W"],
        pictures: Sequence[tuple[int, int] | None] | None = None,
    ) -> list[Detections]:
        """Find the objects in each image, without gradients, in eval mode; restores the mode.

        Args:
            images: Normalised.
            pictures: Height and width of the picture in the upper left corner of each image. Boxes
                are clipped to it. By default it fills the image.
        """
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                maps = self._maps(images)
                with torch.autocast(images.device.type, enabled=False):
                    shown = _image_list(images, pictures or [None] * len(images))
                    return [_with_area(found) for found in self.heads.detections(maps, shown)]
        finally:
            self.train(was_training)

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the map of each stride, in float32."""
        height, width = images.shape[-2:]
        _check_size((height, width), self.pyramid.strides)
        maps = self.pyramid(self.feature_map(images))
        return {
            str(stride): level.float()
            for stride, level in zip(self.pyramid.strides, maps, strict=True)
        }

    def _check_labels(self, targets: Sequence[BoxTargets]) -> None:
        """Raise a ValueError for a label out of range, which would end the process on a GPU."""
        labels = torch.cat([target.labels for target in targets])
        limit = self.heads.num_classes
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < limit:
            raise ValueError(
                f"labels from {int(labels.min())} to {int(labels.max())} for num_classes={limit}"
            )


class FCOSHeads(nn.Module):
    """Predict for each place of each map whether an object is there and how far its sides are."""

    def __init__(
        self,
        *,
        num_classes: int,
        strides: Sequence[int],
        channels: int,
        num_convs: int,
        score_threshold: float,
        max_detections: int,
    ) -> None:
        super().__init__()
        if channels % _FCOS_GROUPS:
            raise ValueError(f"channels={channels} is not a multiple of {_FCOS_GROUPS}")
        self.num_classes = num_classes
        body = nn.Identity()  # the maps are computed outside
        body.out_channels = channels  # type: ignore[assignment]  # torchvision reads it
        anchors = _anchors([(stride,) for stride in strides], (1.0,), strides)
        self.fcos = FCOS(
            body,
            num_classes,
            anchor_generator=anchors,
            head=_CountingHead(channels, 1, num_classes, num_convs),
            score_thresh=score_threshold,
            detections_per_img=max_detections,
        )

    def losses(
        self, maps: dict[str, Tensor], images: ImageList, targets: Sequence[BoxTargets]
    ) -> DetectionLosses:
        """Compute the losses, to be divided by the number of places that are matched with a box."""
        levels = list(maps.values())
        outputs = self.fcos.head(levels)
        anchors = self.fcos.anchor_generator(images, levels)
        wanted = [{"boxes": target.xyxy, "labels": target.labels} for target in targets]
        losses = self.fcos.compute_loss(wanted, outputs, anchors, _num_places(levels))
        divisor = losses["num_matched"]
        # torchvision divides by the matches of these images, or by 1 if there are none.
        names = {"classification": "classification", "box": "bbox_regression"}
        names["centerness"] = "bbox_ctrness"
        sums = {name: losses[theirs] * divisor.clamp(min=1) for name, theirs in names.items()}
        return DetectionLosses(sums, divisor)

    def detections(self, maps: dict[str, Tensor], images: ImageList) -> list[Detections]:
        levels = list(maps.values())
        places = _num_places(levels)
        outputs = {
            name: list(output.split(places, dim=1))
            for name, output in self.fcos.head(levels).items()
        }
        anchors = [list(a.split(places)) for a in self.fcos.anchor_generator(images, levels)]
        found = self.fcos.postprocess_detections(outputs, anchors, images.image_sizes)
        return [Detections(f["boxes"], f["scores"], f["labels"]) for f in found]


class _CountingHead(FCOSHead):  # type: ignore[misc]  # torchvision has no types
    """torchvision's head, whose losses also say by how many matched places they were divided."""

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        return losses | {"num_matched": (torch.stack(matched_idxs) >= 0).sum().float()}


class RegionHeads(nn.Module):
    """Faster R-CNN: propose regions, then classify and refine each of them."""

    def __init__(
        self,
        *,
        num_classes: int,
        strides: Sequence[int],
        channels: int,
        num_convs: int,
        score_threshold: float,
        max_detections: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        sizes = [(4 * stride, 8 * stride) for stride in strides]
        anchors = _anchors(sizes, (0.5, 1.0, 2.0), strides)
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(channels, anchors.num_anchors_per_location()[0], num_convs),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=_NUM_SAMPLED_ANCHORS,
            positive_fraction=0.5,
            pre_nms_top_n={"training": _NUM_PROPOSALS, "testing": _NUM_PROPOSALS},
            post_nms_top_n={"training": _NUM_KEPT_PROPOSALS, "testing": _NUM_KEPT_PROPOSALS},
            nms_thresh=0.7,
        )
        self.rpn.fg_bg_sampler = _SeededSampler(_NUM_SAMPLED_ANCHORS, 0.5)
        width = 4 * channels  # torchvision's 1024 at its 256 channels
        self.regions = RoIHeads(
            _roi_align(strides),
            TwoMLPHead(channels * _ROI_SIDE**2, width),
            FastRCNNPredictor(width, num_classes + 1),  # 0 is the background
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=_NUM_SAMPLED_PROPOSALS,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_threshold,
            nms_thresh=0.5,
            detections_per_img=max_detections,
        )
        self.regions.fg_bg_sampler = _SeededSampler(_NUM_SAMPLED_PROPOSALS, 0.25)

    def losses(
        self, maps: dict[str, Tensor], images: ImageList, targets: Sequence[BoxTargets]
    ) -> DetectionLosses:
        """Compute the losses, to be divided by the number of images.

        Each image's seed draws its samples.
        """
        wanted = [{"boxes": target.xyxy, "labels": target.labels + 1} for target in targets]
        anchors, regions = self.rpn.fg_bg_sampler, self.regions.fg_bg_sampler
        anchors.seed([target.seed for target in targets])
        regions.seed([target.seed + 1 for target in targets])
        proposals, proposal_losses = self.rpn(images, maps, wanted)
        _, losses = self.regions(maps, proposals, images.image_sizes, wanted)
        # torchvision divides by all that were sampled: as a sum over images, an image's samples
        # have the same weight whatever the images beside it have.
        sums = {
            "classification": losses["loss_classifier"] * regions.num_images_sampled,
            "box": losses["loss_box_reg"] * regions.num_images_sampled,
            "objectness": proposal_losses["loss_objectness"] * anchors.num_images_sampled,
            "proposal_box": proposal_losses["loss_rpn_box_reg"] * anchors.num_images_sampled,
        }
        return DetectionLosses(sums, images.tensors.new_tensor(float(len(targets))))

    def detections(self, maps: dict[str, Tensor], images: ImageList) -> list[Detections]:
        proposals, _ = self.rpn(images, maps)
        found, _ = self.regions(maps, proposals, images.image_sizes)
        return [Detections(f["boxes"], f["scores"], f["labels"] - 1) for f in found]


class _SeededSampler:
    """torchvision's BalancedPositiveNegativeSampler with draws that belong to the image.

    The global generator's draws depend on the images before it, and so on the micro batch.
    """

    def __init__(self, num_per_image: int, positive_fraction: float) -> None:
        self.num_per_image = num_per_image
        self.num_positive = int(num_per_image * positive_fraction)
        self.num_images_sampled = 0.0  # samples of the last call / `num_per_image`
        self._seeds: Sequence[int] = ()

    def seed(self, seeds: Sequence[int]) -> None:
        """Give the seed of each image of the next call."""
        self._seeds = seeds

    def __call__(self, matches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Choose among each image's candidates: at least 1 is an object, 0 background.

        Returns:
            Two masks for each image: the chosen objects and the chosen background.
        """
        positives: list[Tensor] = []
        negatives: list[Tensor] = []
        for matched, seed in zip(matches, self._seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(matched), generator=generator).to(matched.device)
            positive = order[matched[order] >= 1][: self.num_positive]
            negative = order[matched[order] == 0][: self.num_per_image - len(positive)]
            for chosen, masks in ((positive, positives), (negative, negatives)):
                masks.append(
                    torch.zeros_like(matched, dtype=torch.bool).index_fill(0, chosen, True)
                )
        num_sampled = sum(int(mask.sum()) for mask in [*positives, *negatives])
        self.num_images_sampled = num_sampled / self.num_per_image
        return positives, negatives


def _roi_align(strides: Sequence[int]) -> MultiScaleRoIAlign:
    """Pool regions, with the scales of the levels given.

    torchvision would infer them from the pictures' sizes, which may be smaller than the images.
    """
    align = MultiScaleRoIAlign([str(stride) for stride in strides], _ROI_SIDE, sampling_ratio=2)
    align.scales = [1 / stride for stride in strides]
    levels = [round(math.log2(stride)) for stride in (strides[0], strides[-1])]
    align.map_levels = initLevelMapper(*levels)
    return align


def box_targets(
    boxes: Boxes,
    device: torch.device | str = "cpu",
    *,
    picture: tuple[int, int] | None = None,
    seed: int = 0,
) -> BoxTargets:
    """Convert the boxes of one image to tensors on `device`; see `BoxTargets` for the rest."""
    xyxy, labels, is_crowd = (torch.from_numpy(array).to(device) for array in boxes)
    return BoxTargets(xyxy, labels, is_crowd, picture, seed)


def build_detector(  # noqa: PLR0913  # each is a fact of its own
    encoder: MapEncoder,
    *,
    num_classes: int,
    head: HeadName,
    img_size: tuple[int, int],
    strides: Sequence[int] = (8, 16, 32),
    channels: int = 128,
    num_convs: int = 2,
    options: MapOptions = PLAIN_MAP,
    score_threshold: float = 0.05,
    max_detections: int = 100,
) -> Detector:
    """Build a detector on `encoder`, drawing its new parts from torch's global generator.

    Args:
        encoder: Used as it is, not copied.
        num_classes: Number of classes without a background class.
        head: fcos is faster on CPUs.
        img_size: Height and width of the input images, in pixels; the strides must tile it.
        strides: Strides of the pyramid's levels, finest first.
        channels: Channels of each level; a multiple of 32 for fcos.
        num_convs: Layers before the last one, in each branch of fcos or of the proposal head.
        options: How the encoder's map is made.
        score_threshold: Detections with a lower score are dropped.
        max_detections: Largest number of detections per image.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} is below 1")
    if list(strides) != sorted(set(strides)) or not strides:
        raise ValueError(f"strides={tuple(strides)} must rise")
    _check_size(img_size, strides)
    pyramid = build_pyramid(encoder, strides=strides, channels=channels)
    heads_type = FCOSHeads if head == "fcos" else RegionHeads
    heads = heads_type(
        num_classes=num_classes,
        strides=strides,
        channels=channels,
        num_convs=num_convs,
        score_threshold=score_threshold,
        max_detections=max_detections,
    )
    return Detector(encoder, pyramid, heads, options)


def _anchors(
    sizes: Sequence[tuple[int, ...]], ratios: tuple[float, ...], strides: Sequence[int]
) -> Any:
    """Build an AnchorGenerator whose boxes are centred on their places.

    Differs: torchvision's boxes are centred on the upper left corner of their places.
    """
    anchors = AnchorGenerator(tuple(sizes), (ratios,) * len(sizes))
    pairs = zip(anchors.cell_anchors, strides, strict=True)
    anchors.cell_anchors = [cell + stride / 2 for cell, stride in pairs]
    return anchors


def _check_size(size: tuple[int, int], strides: Sequence[int]) -> None:
    """Raise a ValueError if the stride that torchvision infers, image / map, is not exact."""
    for stride in strides:
        if size[0] % stride or size[1] % stride:
            raise ValueError(f"image {size[0]}x{size[1]} is not a multiple of stride {stride}")


def _image_list(images: Tensor, pictures: Sequence[tuple[int, int] | None]) -> ImageList:
    """Name the part of each image that boxes are clipped to."""
    height, width = images.shape[-2:]
    return ImageList(images, [picture or (height, width) for picture in pictures])


def _with_area(found: Detections) -> Detections:
    """Drop boxes that lay beside the picture, of which clipping left a line or a point."""
    kept = (found.boxes[:, 2:] > found.boxes[:, :2]).all(dim=1)
    return Detections(*(tensor[kept] for tensor in found))


def _num_places(levels: Sequence[Tensor]) -> list[int]:
    return [level.shape[2] * level.shape[3] for level in levels]


def _without_crowds(target: BoxTargets) -> BoxTargets:
    kept = ~target.is_crowd
    return target._replace(
        xyxy=target.xyxy[kept].float(),
        labels=target.labels[kept],
        is_crowd=target.is_crowd[kept],
    )
