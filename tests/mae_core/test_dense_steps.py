"""A detector's and a segmenter's step is the same for any split of the global batch."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.data.label_maps import IGNORE
from mae_core.model.detector import BoxTargets, build_detector
from mae_core.model.family import build_encoder
from mae_core.model.segmenter import build_segmenter, segmentation_loss
from mae_core.train_step import BatchLoss, StepMetrics, optimizer_step

SIZE = 32
BOXES = [  # of three images that have 3, 2 and 1, and of one without any
    [(2.0, 2.0, 12.0, 12.0), (0.0, 8.0, 30.0, 30.0), (20.0, 1.0, 31.0, 9.0)],
    [(4.0, 4.0, 28.0, 20.0), (1.0, 20.0, 9.0, 31.0)],
    [(8.0, 8.0, 24.0, 24.0)],
    [],
]


class Labelled(NamedTuple):
    """Some images of a global batch of four."""

    images: Tensor
    boxes: list[BoxTargets]
    classes: Tensor


def make_images(first: int, last: int) -> Labelled:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, SIZE, SIZE, generator=generator)
    classes = torch.randint(0, 3, (4, SIZE, SIZE), generator=generator)
    classes[0, 8:] = IGNORE
    classes[2, :, 4:] = IGNORE
    boxes = [
        BoxTargets(
            torch.tensor(own).reshape(-1, 4),
            torch.zeros(len(own), dtype=torch.int64),
            torch.zeros(len(own), dtype=torch.bool),
            seed=i,
        )
        for i, own in enumerate(BOXES)
    ]
    return Labelled(images[first:last], boxes[first:last], classes[first:last])


def detection_loss(model: nn.Module, batch: Labelled) -> BatchLoss:
    sums, divisor = model(batch.images, batch.boxes)
    return BatchLoss(
        torch.stack(list(sums.values())).sum(), torch.tensor(len(batch.images)), divisor
    )


def weighted_loss(model: nn.Module, batch: Labelled) -> BatchLoss:
    ones, class_weights = torch.ones(len(batch.images)), torch.tensor([1.0, 1.0, 4.0])
    loss = segmentation_loss(model(batch.images), batch.classes, ones, class_weights)
    return BatchLoss(loss, ones.sum())


Made = tuple[nn.Module, Callable[[nn.Module, Labelled], BatchLoss]]


def make_model(name: str) -> Made:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(encoder="vit_micro", img_size=(SIZE, SIZE), patch_size=8))
    if name in ("fcos", "faster_rcnn"):
        size = (SIZE, SIZE)
        detector = build_detector(
            encoder, num_classes=2, head=name, img_size=size, strides=(8, 16), channels=32
        )
        return detector, detection_loss
    return build_segmenter(encoder, num_classes=3, head=name, channels=16), weighted_loss


def take_step(name: str, parts: list[tuple[int, int]]) -> tuple[StepMetrics, dict[str, Tensor]]:
    """Take one step of plain gradient descent at rate 1: the update is minus the gradient."""
    model, loss_of = make_model(name)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = optimizer_step(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        [make_images(*part) for part in parts],
        loss_of,
        grad_accum_steps=len(parts),
        learning_rate=1.0,
        autocast_dtype=None,
    )
    return metrics, {name: before[name] - p.detach() for name, p in model.named_parameters()}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    ours, theirs = (torch.cat([g.flatten() for g in x.values()]) for x in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", ["fcos", "faster_rcnn", "linear", "fpn", "upernet"])
def test_any_split_into_micro_batches_gives_the_same_update(name: str) -> None:
    expected_metrics, expected = take_step(name, [(0, 4)])
    for parts in ([(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]):
        metrics, gradients = take_step(name, parts)
        assert relative_error(gradients, expected) < 1e-3
        assert metrics.loss.item() == pytest.approx(expected_metrics.loss.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["fcos", "faster_rcnn"])
def test_any_split_over_workers_gives_the_same_update(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_metrics, expected = take_step(name, [(0, 4)])
    model, loss_of = make_model(name)
    divisors = [loss_of(model.train(), make_images(*part)).divisor for part in [(0, 2), (2, 4)]]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    workers = []
    for rank, parts in enumerate([[(0, 1), (1, 2)], [(2, 3), (3, 4)]]):
        other = divisors[1 - rank]
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda mine, x=other: mine.add_(x))
        workers.append(take_step(name, parts))
    gradients = {name: (workers[0][1][name] + workers[1][1][name]) / 2 for name in expected}
    assert relative_error(gradients, expected) < 1e-3  # the mean, as DDP takes it
    mean_loss = sum(metrics.loss.item() for metrics, _ in workers) / 2
    assert mean_loss == pytest.approx(expected_metrics.loss.item(), rel=1e-4)


def test_images_without_any_box_are_divided_by_one() -> None:
    metrics, gradients = take_step("fcos", [(3, 4)])
    model, loss_of = make_model("fcos")
    sums = loss_of(model.train(), make_images(3, 4))
    assert sums.divisor is not None
    assert sums.divisor.item() == 0
    assert metrics.loss.item() == pytest.approx(sums.loss.item(), rel=1e-5)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
