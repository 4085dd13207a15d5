"""Detectors learn, leave a frozen encoder alone, and take boxes as they are."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from mae_core.config import ModelConfig
from mae_core.data.boxes import Boxes
from mae_core.evaluation.detection import evaluate_detections
from mae_core.model.conv_encoder import ConvEncoder
from mae_core.model.dense import MapOptions
from mae_core.model.detector import (
    BoxTargets,
    DetectionLosses,
    Detections,
    Detector,
    HeadName,
    box_targets,
    build_detector,
)
from mae_core.model.family import build_encoder

SIZE = 32
HEADS: list[HeadName] = ["fcos", "faster_rcnn"]


class TinyEncoder(nn.Module):
    """Not a transformer: a detector needs a `feature_map` only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.patch_size = 32, 8
        self.layer = nn.Conv2d(3, 32, 8, stride=8)
        self.dropout = nn.Dropout(0.5)
        self.saw_gradients: list[bool] = []

    def feature_map(self, images: Tensor, *, window: int = 0) -> Tensor:
        self.saw_gradients.append(torch.is_grad_enabled())
        return self.dropout(self.layer(images))


def make_detector(
    head: HeadName = "fcos", encoder: Any = None, num_classes: int = 2, **options: Any
) -> Detector:
    torch.manual_seed(0)
    how = {name: options.pop(name) for name in MapOptions._fields if name in options}
    settings = {"strides": (4, 8, 16), "channels": 32, "num_convs": 1} | options
    return build_detector(
        encoder or TinyEncoder(),
        num_classes=num_classes,
        head=head,
        img_size=(SIZE, SIZE),
        options=MapOptions(**how),
        **settings,
    )


def make_targets(*boxes: tuple[float, float, float, float], label: int = 0) -> BoxTargets:
    return BoxTargets(
        torch.tensor(boxes).reshape(-1, 4),
        torch.full((len(boxes),), label),
        torch.zeros(len(boxes), dtype=torch.bool),
    )


def make_squares() -> tuple[Tensor, list[Boxes]]:
    """Four noisy images with a square in channel 0 or 1 each: the class is the channel."""
    generator = np.random.default_rng(0)
    images, truths = [], []
    for label in (0, 1, 0, 1):
        image = generator.normal(0, 0.1, (3, SIZE, SIZE)).astype(np.float32)
        side = int(generator.integers(SIZE // 4, SIZE // 2))
        x, y = generator.integers(0, SIZE - side, size=2).tolist()
        image[label, y : y + side, x : x + side] += 2
        images.append(image)
        box = np.asarray([[x, y, x + side, y + side]], np.float32)
        truths.append(Boxes(box, np.asarray([label]), np.asarray([False])))
    return torch.from_numpy(np.stack(images)), truths


def mean_loss(losses: DetectionLosses) -> Tensor:
    return torch.stack([*losses.sums.values()]).sum() / losses.divisor.clamp(min=1)


def fit(detector: Detector, images: Tensor, truths: list[Boxes], num_steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=1e-3)
    targets = [box_targets(truth) for truth in truths]
    detector.train()
    totals = []
    for _ in range(num_steps):
        total = mean_loss(detector(images, targets))
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        totals.append(total.item())
    return totals


def make_micro(head: HeadName, **options: Any) -> Detector:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(encoder="vit_micro", img_size=(SIZE, SIZE), patch_size=8))
    return make_detector(head, encoder, **options)


def test_fcos_finds_the_squares_it_was_shown() -> None:
    images, truths = make_squares()
    detector = make_micro("fcos")
    fit(detector, images, truths, 60)
    scores = evaluate_detections(detector.detect(images), truths, ["red", "green"])
    assert scores.ap50 > 0.9
    assert scores.ap > 0.6


def test_the_loss_of_faster_rcnn_falls() -> None:
    images, truths = make_squares()
    detector = make_micro("faster_rcnn")
    totals = fit(detector, images, truths, 20)
    assert totals[0] > 1.2
    assert sum(totals[-3:]) / 3 < 0.5 * totals[0]


@pytest.mark.parametrize("head", HEADS)
def test_losses_are_finite_scalars_without_any_box(head: HeadName) -> None:
    detector = make_detector(head).train()
    losses, divisor = detector(torch.randn(2, 3, SIZE, SIZE), [make_targets(), make_targets()])
    assert {loss.shape for loss in losses.values()} == {torch.Size([])}
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert losses["box"].item() == 0
    assert divisor.item() == (0 if head == "fcos" else 2)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("boxes", [[(4.0, 4.0, 20.0, 20.0)], []])
def test_each_trained_parameter_gets_a_gradient(
    head: HeadName, window: int, boxes: list[tuple[float, float, float, float]]
) -> None:
    detector = make_micro(head, window=window).train()
    targets = [make_targets(*boxes), make_targets()]
    losses = detector(torch.randn(2, 3, SIZE, SIZE), targets)
    mean_loss(losses).backward()
    trained = {n: p.grad for n, p in detector.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if grad is None] == []
    assert ("encoder.cls_token" in trained) == (window == 0)


@pytest.mark.parametrize("head", HEADS)
def test_crowd_boxes_are_as_if_they_were_not_there(head: HeadName) -> None:
    detector = make_detector(head).eval()
    images = torch.randn(1, 3, SIZE, SIZE)
    alone = make_targets((2, 2, 12, 12))
    with_crowd = BoxTargets(
        torch.tensor([[2.0, 2, 12, 12], [0, 0, 32, 32]]),
        torch.tensor([0, 1]),
        torch.tensor([False, True]),
    )
    detector.encoder.dropout.p = 0.0
    results = [detector.train()(images, [target]) for target in (alone, with_crowd)]
    assert results[0] == results[1]


def make_crowded() -> tuple[Tensor, list[BoxTargets]]:
    """Four images with three, two, one and no boxes, of different sizes."""
    images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    boxes = [
        [(2.0, 2.0, 12.0, 12.0), (0.0, 8.0, 30.0, 30.0), (20.0, 1.0, 31.0, 9.0)],
        [(4.0, 4.0, 28.0, 20.0), (1.0, 20.0, 9.0, 31.0)],
        [(8.0, 8.0, 24.0, 24.0)],
        [],
    ]
    return images, [make_targets(*own)._replace(seed=i) for i, own in enumerate(boxes)]


@pytest.mark.parametrize("head", HEADS)
def test_parts_of_a_batch_sum_to_the_losses_of_the_whole(head: HeadName) -> None:
    detector = make_micro(head, frozen=True).train()
    images, targets = make_crowded()
    whole, divisor = detector(images, targets)
    for size in (1, 2):
        parts = [detector(images[i : i + size], targets[i : i + size]) for i in range(0, 4, size)]
        assert sum(part.divisor.item() for part in parts) == divisor.item()
        for name, loss in whole.items():
            parts_sum = sum(part.sums[name].item() for part in parts)
            assert parts_sum == pytest.approx(loss.item(), rel=1e-4), name


def test_fcos_counts_the_places_that_are_matched_with_a_box() -> None:
    detector = make_detector(strides=(8,)).train()
    # Of the places of 8 pixels, those whose middle lies in the box and near its middle.
    _, divisor = detector(torch.zeros(1, 3, SIZE, SIZE), [make_targets((8, 8, 24, 24))])
    assert divisor.item() == 4


def test_faster_rcnn_draws_what_the_seed_of_the_image_says() -> None:
    detector = make_micro("faster_rcnn", frozen=True).train()
    images, targets = make_crowded()

    def loss(seed: int) -> float:
        return detector(images[:1], [targets[0]._replace(seed=seed)]).sums["objectness"].item()

    torch.manual_seed(7)
    first = loss(1)
    assert loss(1) == first  # torch's global generator has moved on
    assert len({loss(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("head", HEADS)
def test_boxes_end_at_the_picture_and_not_at_the_image(head: HeadName) -> None:
    detector = make_detector(head, score_threshold=0.0)
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found = detector.detect(images, [(12, 32), None])
    assert found[0].boxes[:, 3].max().item() == pytest.approx(12, abs=0.01)
    assert found[0].boxes[:, 2].max() > 12
    assert found[1].boxes[:, 3].max() > 12
    for each in found:  # what lay beside the picture is not there any more
        assert (each.boxes[:, 2:] > each.boxes[:, :2]).all()
        assert len(each.boxes) == len(each.scores) == len(each.labels) > 0


def test_regions_are_pooled_at_the_scale_of_the_image_whatever_the_picture_covers() -> None:
    images = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    scales = []
    for picture in [(8, 8), (SIZE, SIZE)]:
        detector = make_detector("faster_rcnn")
        detector.detect(images, [picture])
        scales.append(detector.heads.regions.box_roi_pool.scales)
    assert scales == [[1 / 4, 1 / 8, 1 / 16]] * 2


def test_a_frozen_encoder_stays_in_eval_mode_without_gradients() -> None:
    encoder = TinyEncoder()
    detector = make_detector("fcos", encoder, frozen=True).train()
    assert detector.training
    assert detector.pyramid.training
    assert not encoder.training
    assert not encoder.dropout.training
    losses = detector(torch.randn(1, 3, SIZE, SIZE), [make_targets((2, 2, 12, 12))])
    mean_loss(losses).backward()
    assert encoder.saw_gradients == [False]
    assert [p.grad for p in encoder.parameters()] == [None, None]
    assert not any(p.requires_grad for p in encoder.parameters())
    assert all(p.grad is not None for p in detector.pyramid.parameters())


def test_an_encoder_that_is_not_frozen_trains() -> None:
    encoder = TinyEncoder()
    detector = make_detector("fcos", encoder).train()
    detector(torch.randn(1, 3, SIZE, SIZE), [make_targets()])
    assert encoder.training
    assert encoder.saw_gradients == [True]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("training", [True, False])
def test_detect_needs_no_gradients_and_puts_the_mode_back(head: HeadName, training: bool) -> None:
    encoder = TinyEncoder()
    detector = make_detector(head, encoder, score_threshold=0.0, max_detections=7).train(training)
    images = torch.randn(2, 3, SIZE, SIZE)
    first, second = detector.detect(images), detector.detect(images)
    assert detector.training is training
    assert encoder.training is training
    assert encoder.saw_gradients == [False, False]
    # Equal: dropout was off.
    assert torch.equal(first[1].boxes, second[1].boxes)
    for found in first:
        assert 0 < len(found.boxes) <= 7
        assert not found.scores.requires_grad
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        assert 0 <= found.labels.min() <= found.labels.max() <= 1
        assert 0 <= found.boxes.min() <= found.boxes.max() <= SIZE


@pytest.mark.parametrize("head", HEADS)
def test_images_reach_the_encoder_untouched_in_both_modes(head: HeadName) -> None:
    seen = []

    class Spy(TinyEncoder):
        def feature_map(self, images: Tensor, *, window: int = 0) -> Tensor:
            seen.append(images)
            return super().feature_map(images, window=window)

    detector = make_detector(head, Spy()).train()
    images = 9 * torch.randn(2, 3, 48, 80) - 4
    detector(images, [make_targets(), make_targets()])
    detector.detect(images)
    assert len(seen) == 2
    assert all(torch.equal(images, each) for each in seen)


def test_anchors_lie_around_the_middle_of_their_places() -> None:
    detector = make_detector("fcos")
    images = torch.zeros(1, 3, SIZE, SIZE)
    levels = [torch.zeros(1, 1, SIZE // stride, SIZE // stride) for stride in (4, 8, 16)]
    (anchors,) = detector.heads.fcos.anchor_generator(ImageList(images, [(SIZE, SIZE)]), levels)
    assert anchors[:2].tolist() == [[0, 0, 4, 4], [4, 0, 8, 4]]
    assert anchors[64:66].tolist() == [[0, 0, 8, 8], [8, 0, 16, 8]]
    assert anchors[-1].tolist() == [16, 16, 32, 32]


def test_the_anchors_of_faster_rcnn_are_four_and_eight_strides_wide() -> None:
    detector = make_detector("faster_rcnn")
    cells = detector.heads.rpn.anchor_generator.cell_anchors
    squares = [
        sorted({(x1 - x0) for x0, y0, x1, y1 in cell.tolist() if x1 - x0 == y1 - y0})
        for cell in cells
    ]
    assert squares == [[16, 32], [32, 64], [64, 128]]
    assert [len(cell) for cell in cells] == [6, 6, 6]


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_in_float32_under_autocast(head: HeadName) -> None:
    detector = make_detector(head).train()
    images, targets = torch.randn(1, 3, SIZE, SIZE), [make_targets((2, 2, 12, 12))]
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images, targets).sums
        (found,) = detector.detect(images)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert found.boxes.dtype == found.scores.dtype == torch.float32


@pytest.mark.parametrize("head", HEADS)
def test_images_of_many_channels_are_no_matter(head: HeadName) -> None:
    encoder = build_encoder(
        ModelConfig(encoder="vit_micro", img_size=(SIZE, SIZE), patch_size=8, in_chans=6)
    )
    detector = make_detector(head, encoder).train()
    losses = detector(torch.randn(1, 6, SIZE, SIZE), [make_targets((2, 2, 12, 12))]).sums
    assert all(bool(loss.isfinite()) for loss in losses.values())


def test_the_label_of_faster_rcnn_is_not_moved_by_its_background() -> None:
    images, _ = make_squares()
    detector = make_detector("faster_rcnn").train()
    with torch.no_grad():
        # Scores of background, class 0, class 1: sure of class 1 wherever it looks.
        predictor = detector.heads.regions.box_predictor
        predictor.cls_score.weight.zero_()
        predictor.cls_score.bias.copy_(torch.tensor([0.0, 0.0, 50.0]))
    assert {label for found in detector.detect(images) for label in found.labels.tolist()} == {1}
    box = (4.0, 4.0, 20.0, 20.0)
    right = detector(images, [make_targets(box, label=1)] * 4)
    wrong = detector(images, [make_targets(box, label=0)] * 4)
    # Each background and each class 0 costs 50, each class 1 nothing. Fewer than the 256 proposals
    # of an image exist, so that its mean is a share of 50.
    num_proposals = 256 * wrong.sums["classification"].item() / 50
    assert num_proposals == pytest.approx(round(num_proposals), abs=1e-2)
    assert right.sums["classification"].item() < 0.999 * wrong.sums["classification"].item()


def test_boxes_become_tensors() -> None:
    _, truths = make_squares()
    target = box_targets(truths[1])
    assert target.xyxy.dtype == torch.float32
    assert target.xyxy.tolist() == truths[1].xyxy.tolist()
    assert target.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes=0 is below 1"),
        ({"strides": (16, 8)}, r"strides=\(16, 8\) must rise"),
        ({"strides": (8, 64)}, "image 32x32 is not a multiple of stride 64"),
        ({"strides": (8, 24)}, "stride 24"),
        ({"channels": 48}, "channels=48 is not a multiple of 32"),
    ],
)
def test_what_can_not_be_built_is_refused_in_words(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_detector("fcos", **options)


def test_what_can_not_be_trained_on_is_refused_in_words() -> None:
    detector = make_detector("fcos")
    images = torch.randn(1, 3, SIZE, SIZE)
    with pytest.raises(RuntimeError, match="call detect"):
        detector.eval()(images, [make_targets()])
    with pytest.raises(ValueError, match="boxes of 2 images for 1"):
        detector.train()(images, [make_targets(), make_targets()])
    with pytest.raises(ValueError, match="labels from 2 to 2 for num_classes=2"):
        detector(images, [make_targets((1, 1, 9, 9), label=2)])
    with pytest.raises(ValueError, match="image 40x32 is not a multiple of stride 16"):
        detector.detect(torch.randn(1, 3, 40, 32))


def test_detections_of_nothing_have_their_shapes() -> None:
    (found,) = make_detector(score_threshold=0.99).detect(torch.zeros(1, 3, SIZE, SIZE))
    assert isinstance(found, Detections)
    assert [tensor.shape for tensor in found] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize("head", HEADS)
def test_a_convolutional_encoder_serves_a_head_with_its_stages(head: HeadName) -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder("convnextv2_atto", patch_size=8, in_chans=3)
    detector = make_detector(head, encoder, strides=(4, 8, 16))
    assert detector.pyramid.sources == (2, 3, 3)
    losses = detector(torch.randn(2, 3, SIZE, SIZE), [make_targets((2, 2, 12, 12)), make_targets()])
    torch.stack(list(losses.sums.values())).sum().backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []
