"""Segmentation heads work on any encoder and image size, and they learn."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.data.label_maps import IGNORE
from mae_core.model.conv_encoder import ConvEncoder as StagedEncoder
from mae_core.model.dense import MapOptions
from mae_core.model.family import build_encoder
from mae_core.model.segmenter import (
    Head,
    Segmenter,
    build_segmenter,
    central_window,
    output_stride,
    pyramid_strides,
    segmentation_loss,
    sliding_window_logits,
)

HEADS: list[Head] = ["linear", "fpn", "upernet"]


class ConvEncoder(nn.Module):
    """An encoder that is not a transformer, with a norm whose statistics change in train mode."""

    def __init__(self, patch_size: int = 4, embed_dim: int = 16) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.conv = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.BatchNorm2d(embed_dim)
        self.windows_seen: list[int] = []

    def feature_map(self, images: Tensor, *, window: int = 0) -> Tensor:
        self.windows_seen.append(window)
        return self.norm(self.conv(images))


class PointwiseModel(nn.Module):
    """Returns logits that depend on their own pixel alone, and records where each call looked."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.was_training: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        self.was_training.append(self.training)
        return torch.cat([images[:, :1], 3 * images[:, :1]], dim=1)


def make_vit(img_size: int = 32, patch_size: int = 8) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(encoder="vit_micro", img_size=(img_size, img_size), patch_size=patch_size)
    return build_encoder(config)


def make_segmenter(head: Head, encoder: nn.Module | None = None, **options: object) -> Segmenter:
    torch.manual_seed(0)
    how = MapOptions(**{name: options.pop(name) for name in MapOptions._fields if name in options})
    given = {"num_classes": 3, "channels": 16, **options}
    return build_segmenter(encoder or ConvEncoder(), head=head, options=how, **given)


def make_images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def make_scenes() -> tuple[Tensor, Tensor]:
    """Draw four images of noise with a bright and a striped square, and their classes."""
    targets = torch.zeros(4, 32, 32, dtype=torch.int64)
    for i, (top, left) in enumerate([(2, 3), (5, 17), (18, 4), (16, 19)]):
        targets[i, top : top + 11, left : left + 10] = 1
        targets[i, 31 - top - 9 : 31 - top, 31 - left - 11 : 31 - left] = 2
    images = 0.3 * make_images(4, 3, 32, 32)
    stripes = torch.tensor([1.0, -1.0]).repeat(16)[:, None].expand(32, 32)
    images += 1.5 * (targets == 1)[:, None] + 1.5 * ((targets == 2) * stripes)[:, None]
    return images, targets


def mean_iou(prediction: Tensor, truth: Tensor, num_classes: int) -> float:
    ious = []
    for c in range(num_classes):
        both = ((prediction == c) & (truth == c)).sum()
        ious.append(float(both / ((prediction == c) | (truth == c)).sum()))
    return sum(ious) / num_classes


def test_tiny_segmenter_learns_four_images() -> None:
    segmenter = make_segmenter("fpn", make_vit(), channels=64)
    images, targets = make_scenes()
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=1e-3)
    for _ in range(100):
        loss = segmentation_loss(segmenter(images), targets, torch.ones(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        prediction = segmenter.eval()(images).argmax(dim=1)
    assert mean_iou(prediction, targets, 3) > 0.9


@pytest.mark.parametrize("head", HEADS)
def test_each_pixel_gets_logits_at_sizes_that_no_level_divides(head: Head) -> None:
    segmenter = make_segmenter(head, make_vit())
    assert segmenter(make_images(2, 3, 24, 56)).shape == (2, 3, 24, 56)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("patch_size", [1, 2, 4, 6, 14, 32])
def test_any_patch_size_will_do(head: Head, patch_size: int) -> None:
    segmenter = make_segmenter(head, ConvEncoder(patch_size), num_classes=5)
    shape = (3 * patch_size, 5 * patch_size)
    assert segmenter(make_images(2, 3, *shape)).shape == (2, 5, *shape)


@pytest.mark.parametrize(
    ("patch_size", "expected"),
    [
        (1, (1, 2, 4, 8)),
        (2, (1, 2, 4, 8)),
        (4, (2, 4, 8, 16)),
        (6, (3, 6, 12, 24)),
        (8, (4, 8, 16, 32)),
        (14, (7, 14, 28, 56)),
        (16, (4, 8, 16, 32)),
        (32, (4, 8, 16, 32)),
    ],
)
def test_finest_stride_is_at_most_half_a_patch(patch_size: int, expected: tuple[int, ...]) -> None:
    assert pyramid_strides(patch_size) == expected


@pytest.mark.parametrize("head", ["fpn", "upernet"])
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_a_pyramid_predicts_at_the_stride_that_is_asked_for(head: Head, stride: int) -> None:
    segmenter = make_segmenter(head, make_vit(), stride=stride)
    images = make_images(1, 3, 24, 40)
    assert segmenter.head(segmenter.feature_map(images)).shape[-2:] == (24 // stride, 40 // stride)
    assert segmenter(images).shape == (1, 3, 24, 40)
    assert output_stride(head, 8, stride) == stride


def test_a_stride_that_a_head_can_not_have_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"stride=3 .*patches of 8 pixels .*one of 8, 4, 2, 1"):
        make_segmenter("fpn", make_vit(), stride=3)
    with pytest.raises(ValueError, match="stride=4: head=linear has the encoder's, 8; use fpn"):
        output_stride("linear", 8, 4)
    assert output_stride("linear", 8) == 8
    assert output_stride("fpn", 16) == 4


@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_padding_of_the_map_moves_no_pixel(head: Head) -> None:
    """A picture of one colour and its mirror image: the logits of each mirror the other's."""
    segmenter = make_segmenter(head).eval()
    images = make_images(1, 3, 32, 32).round()
    whole = segmenter(F.pad(images, (0, 16, 0, 16), mode="replicate"))
    assert whole.shape == (1, 3, 48, 48)
    features = segmenter.encoder.feature_map(images)
    padded = F.pad(features, (0, 3, 0, 1), mode="replicate")
    # 11 columns and 9 rows become 12 each: whatever is cut, the rest is what the larger map gives.
    larger = segmenter.head(F.pad(padded, (0, 1, 0, 3), mode="replicate"))
    assert torch.equal(segmenter.head(padded), larger[..., :18, :22])


@pytest.mark.parametrize("head", HEADS)
def test_gradient_reaches_every_parameter(head: Head) -> None:
    segmenter = make_segmenter(head)
    targets = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    segmentation_loss(segmenter(make_images(2, 3, 32, 32)), targets, torch.ones(2)).backward()
    idle = [
        name
        for name, parameter in segmenter.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    # Before a batch norm, a bias changes nothing; what is left is rounding.
    assert [name for name in idle if name != "encoder.conv.bias"] == []


@pytest.mark.parametrize("head", ["linear", "fpn"])
@pytest.mark.parametrize("window", [0, 2])
def test_no_parameter_of_a_vit_waits_for_a_gradient_in_vain(head: Head, window: int) -> None:
    segmenter = make_segmenter(head, make_vit(), window=window)
    segmenter(make_images(2, 3, 32, 32)).square().mean().backward()
    waiting = [n for n, p in segmenter.named_parameters() if p.requires_grad and p.grad is None]
    assert waiting == []
    assert segmenter.encoder.cls_token.requires_grad == (window == 0)


@pytest.mark.parametrize("head", HEADS)
def test_frozen_encoder_does_not_change(head: Head) -> None:
    encoder = ConvEncoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    segmenter = make_segmenter(head, encoder, frozen=True).train()
    assert segmenter.head.training
    assert not encoder.training
    trained = [p for p in segmenter.parameters() if p.requires_grad]
    head_before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(segmenter.parameters(), lr=1.0, weight_decay=0.1)
    logits = segmenter(make_images(2, 3, 32, 32))
    segmentation_loss(logits, torch.zeros(2, 32, 32).long(), torch.ones(2)).backward()
    optimizer.step()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(map(torch.equal, trained, head_before))
    assert segmenter.eval().train(False).encoder.training is False


def test_frozen_encoder_builds_no_graph() -> None:
    encoder = ConvEncoder()
    seen: list[bool] = []
    encoder.norm.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    images = make_images(2, 3, 16, 16).requires_grad_()
    assert make_segmenter("fpn", encoder, frozen=True)(images).requires_grad
    assert make_segmenter("fpn", encoder)(images).requires_grad
    with torch.no_grad():
        assert not make_segmenter("fpn", encoder)(images).requires_grad
    assert seen == [False, True, False]


def test_window_reaches_the_encoder() -> None:
    encoder = ConvEncoder()
    make_segmenter("linear", encoder, window=7)(make_images(2, 3, 16, 16))
    assert encoder.windows_seen == [7]


def test_linear_head_is_a_linear_layer_on_the_conditioned_map_alone() -> None:
    segmenter = make_segmenter("linear", num_classes=5, conditioning="standardize")
    sizes = {name: tuple(p.shape) for name, p in segmenter.head.named_parameters()}
    assert sizes == {"weight": (5, 16, 1, 1), "bias": (5,)}
    images = make_images(2, 3, 16, 16)
    features = segmenter.encoder.feature_map(images)
    places = features.movedim(1, -1).flatten(0, 2).detach()
    segmenter.conditioning.fit(places)
    normalised = (features - places.mean(dim=0)[:, None, None]) / places.std(dim=0)[:, None, None]
    weight, bias = segmenter.head.weight[:, :, 0, 0], segmenter.head.bias
    coarse = torch.einsum("bdhw,kd->bkhw", normalised, weight) + bias[:, None, None]
    expected = F.interpolate(coarse, scale_factor=4, mode="bilinear")
    torch.testing.assert_close(segmenter(images), expected, atol=0.05, rtol=0)


def test_a_central_window_is_cut_from_larger_images_and_mirrors_smaller_ones() -> None:
    images = torch.arange(30.0).reshape(1, 1, 5, 6)
    assert central_window(images, (3, 2)).tolist() == [[[[8, 9], [14, 15], [20, 21]]]]
    assert central_window(images, (1, 8))[0, 0, 0].tolist() == [12, 13, 14, 15, 16, 17, 17, 16]


def test_only_pooling_lets_a_corner_see_the_other() -> None:
    """The encoder sees a patch; convolutions reach some patches on; the mean reaches all."""

    def change_in_the_far_corner(head: Head) -> float:
        segmenter = make_segmenter(head, ConvEncoder(4)).eval()
        # Group norm sees all of a picture: without it, only the pooling does.
        for module in segmenter.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.Identity())
        images = make_images(1, 3, 512, 512)
        changed = images.clone()
        changed[..., :64, :64] += 5
        with torch.no_grad():
            return float((segmenter(images) - segmenter(changed))[..., -8:, -8:].abs().max())

    assert change_in_the_far_corner("fpn") == 0
    assert change_in_the_far_corner("upernet") > 0


@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_coarse_levels_reach_the_finest(head: Head) -> None:
    segmenter = make_segmenter(head)
    for conv in segmenter.head.smooth[1:]:  # all ways but the one through the finest
        conv.register_forward_hook(lambda _module, _inputs, output: 0 * output)
    segmenter(make_images(2, 3, 64, 64)).square().mean().backward()
    for level in segmenter.head.pyramid.levels:
        assert level[-2].weight.grad.any()


def test_loss_is_the_mean_over_pixels_then_images() -> None:
    # ln 2 where two classes are equally likely; 0 where one is certain.
    logits = torch.zeros(2, 2, 1, 4)
    logits[1, 0] = 100.0
    targets = torch.tensor([[[0, 1, IGNORE, IGNORE]], [[0, 0, 0, 0]]])
    loss = segmentation_loss(logits, targets, torch.ones(2))
    assert float(loss) == pytest.approx(0.693147 / 2, abs=1e-6)
    # The first image counts three times, and the denominator stays.
    assert float(segmentation_loss(logits, targets, torch.tensor([3.0, 1.0]))) == pytest.approx(
        3 * 0.693147 / 2, abs=1e-6
    )


def test_hole_adds_nothing_but_stays_in_the_denominator() -> None:
    logits = make_images(4, 3, 8, 8).requires_grad_()
    targets = torch.randint(0, 3, (4, 8, 8), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0])
    loss = segmentation_loss(logits, targets, weights)
    whole = F.cross_entropy(logits[:2], targets[:2])
    torch.testing.assert_close(loss, whole / 2)
    loss.backward()
    assert not logits.grad[2:].any()
    assert logits.grad[:2].any()


def test_image_without_a_class_adds_zero_and_no_nan() -> None:
    logits = make_images(2, 3, 4, 4).requires_grad_()
    targets = torch.full((2, 4, 4), IGNORE)
    loss = segmentation_loss(logits, targets, torch.ones(2))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_loss_of_half_precision_logits_is_taken_in_full() -> None:
    logits = torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16)
    loss = segmentation_loss(logits, torch.zeros(1, 64, 64).long(), torch.ones(1))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(0.693147, abs=1e-6)


def test_one_window_is_the_plain_forward() -> None:
    segmenter = make_segmenter("fpn", make_vit()).eval()
    images = make_images(2, 3, 32, 32)
    with torch.no_grad():
        expected = segmenter(images)
    logits = sliding_window_logits(segmenter, images, crop=(32, 32), stride=(16, 16))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((32, 32), (16, 16), (8, 8)),
        ((33, 47), (16, 8), (11, 5)),
        ((33, 16), (16, 16), (16, 16)),
        ((5, 50), (16, 16), (7, 7)),
        ((3, 2), (16, 12), (8, 8)),
        ((1, 1), (4, 4), (1, 1)),
    ],
)
def test_windows_cover_every_pixel_once_averaged(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> None:
    model = PointwiseModel()
    images = make_images(2, 1, *size)
    logits = sliding_window_logits(model, images, crop=crop, stride=stride)
    torch.testing.assert_close(logits, torch.cat([images, 3 * images], dim=1))
    assert set(model.shapes) == {(2, 1, *crop)}


def test_overlap_is_the_mean_of_its_windows() -> None:
    class Ramp(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.arange(4.0).expand(images.shape[0], 1, 1, 4)

    # Windows at 0, 3 and, since the last one ends at the edge, 5.
    logits = sliding_window_logits(Ramp(), torch.zeros(1, 1, 1, 9), crop=(1, 4), stride=(1, 3))
    assert logits.flatten().tolist() == [0.0, 1.0, 2.0, 1.5, 1.0, 1.0, 2.0, 2.0, 3.0]


def test_small_image_is_mirrored_beyond_its_edge() -> None:
    seen: list[Tensor] = []

    class Looking(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images

    images = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    logits = sliding_window_logits(Looking(), images, crop=(2, 8), stride=(1, 1))
    assert seen[0][0, 0].tolist() == [[1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 1.0, 2.0]] * 2
    assert torch.equal(logits, images)


def test_sliding_runs_in_eval_mode_without_gradients_and_puts_the_mode_back() -> None:
    model = PointwiseModel().train()
    images = make_images(1, 1, 8, 8).requires_grad_()
    logits = sliding_window_logits(model, images, crop=(4, 4), stride=(4, 4))
    assert model.was_training == [False] * 4
    assert model.training
    assert not logits.requires_grad


@pytest.mark.parametrize("stride", [(0, 4), (4, 5)])
def test_stride_that_leaves_pixels_out_is_an_error(stride: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"is not in 1\.\.crop=\(4, 4\)"):
        sliding_window_logits(PointwiseModel(), torch.zeros(1, 1, 8, 8), crop=(4, 4), stride=stride)


@pytest.mark.parametrize("make_encoder", [ConvEncoder, make_vit])
def test_image_that_patches_do_not_tile_is_seen_in_windows(
    make_encoder: Callable[[], nn.Module],
) -> None:
    segmenter = make_segmenter("linear", make_encoder()).eval()
    logits = sliding_window_logits(
        segmenter, make_images(1, 3, 37, 45), crop=(32, 32), stride=(24, 24)
    )
    assert logits.shape == (1, 3, 37, 45)
    assert logits.isfinite().all()


def test_class_weights_multiply_the_loss_of_their_pixels() -> None:
    logits = torch.zeros(1, 3, 1, 2)  # each class is as likely: a loss of log 3 a pixel
    targets, weights = torch.tensor([[[0, 2]]]), torch.ones(1)
    loss = segmentation_loss(logits, targets, weights, torch.tensor([1.0, 1.0, 4.0]))
    assert loss.item() == pytest.approx(2.5 * math.log(3))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_a_convolutional_encoder_serves_a_head_with_all_its_stages(name: str, head: Head) -> None:
    torch.manual_seed(0)
    encoder = StagedEncoder(name, patch_size=8, in_chans=3)
    segmenter = make_segmenter(head, encoder, num_classes=5, conditioning="whiten")
    images = make_images(2, 3, 24, 40)
    segmenter.conditioning.fit(torch.cat(segmenter.sampled_places(images, limit=99)).detach())
    logits = segmenter(images)
    assert logits.shape == (2, 5, 24, 40)
    logits.sum().backward()
    assert [name for name, p in segmenter.named_parameters() if p.grad is None] == []
