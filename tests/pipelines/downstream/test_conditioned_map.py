"""Detect and segment fit the map's conditioning before an arm's first step, alike in every arm."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.data.label_budget import LabelBudget
from mae_core.model.dense import DenseModel, MapOptions
from pipelines.config.arms import ArmKind
from pipelines.config.downstream import DetectConfig, SegmentConfig
from pipelines.config.loading import load_config
from pipelines.detect import DetectTask
from pipelines.downstream.arms import Arm
from pipelines.downstream.run import adamw
from pipelines.downstream.task import Example, TaskInfo
from pipelines.segment import SegmentTask

INFO = TaskInfo(ModelConfig(img_size=(16, 16), patch_size=4), ("ground", "tree"), "title")
NEEDED = ["init_from=c", "data.train=t", "data.val=v"]
Task = DetectTask | SegmentTask


def make_detect(*words: str) -> DetectTask:
    return DetectTask(load_config(DetectConfig, [], [*NEEDED, *words], {}), INFO)


def make_segment(*words: str) -> SegmentTask:
    words = (*NEEDED, "segment.names=[ground,tree]", *words)
    return SegmentTask(load_config(SegmentConfig, [], words, {}), INFO)


def make_arm(kind: ArmKind) -> Arm:
    return Arm(kind, LabelBudget(1.0), 0, 10, 1, 0)


class Encoder(nn.Module):
    """Two channels: the mean of a patch and twice that, plus a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.patch_size = 2, 4
        self.scale = nn.Parameter(torch.tensor(2.0))

    def feature_map(self, images: Tensor, *, window: int = 0) -> Tensor:
        means = nn.functional.avg_pool2d(images[:, :1], 4)
        return torch.cat([means + 5, self.scale * means], dim=1)


class View:
    """A target whose picture fills the upper half of its view."""

    part = (8, 16)


def fitted(task: Task, images: Tensor, target: Any, kind: ArmKind) -> DenseModel:
    model = DenseModel(Encoder(), MapOptions(conditioning="whiten")).eval()
    start = task.start(make_arm(kind))
    assert start is not None
    assert not start.of_arm
    pixels = np.zeros((16, 16, 3), np.uint8)
    with torch.no_grad():
        inputs = start.inputs(model, images, [Example(pixels, target)] * len(images))
        start.fit(model, inputs)
    return model


@pytest.mark.parametrize("kind", [ArmKind.FINETUNE, ArmKind.SCRATCH, ArmKind.UNTRAINED])
def test_every_arm_of_detect_is_fitted_to_the_pictures_without_what_lies_beside_them(
    kind: ArmKind,
) -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[:, :, 8:] = 100
    model = fitted(make_detect(), images, View(), kind)
    expected = nn.functional.avg_pool2d(images[:, :1, :8], 4).mean()
    torch.testing.assert_close(model.conditioning.mean, torch.stack([expected + 5, 2 * expected]))
    assert model.feature_map(images)[..., :2, :].std() < 2


def test_segment_is_fitted_to_windows_of_the_size_that_it_trains_on() -> None:
    images = torch.full((2, 3, 48, 80), 100.0)
    images[..., 16:32, 32:48] = 1.0
    model = fitted(make_segment(), images, None, ArmKind.FROZEN)
    torch.testing.assert_close(model.conditioning.mean, torch.tensor([6.0, 2.0]))


@pytest.mark.parametrize(("make", "stage"), [(make_detect, "detect"), (make_segment, "segment")])
def test_without_conditioning_nothing_is_fitted(make: Callable[..., Task], stage: str) -> None:
    task = make(f"{stage}.conditioning=none")
    assert task.start(make_arm(ArmKind.SCRATCH)) is None


@pytest.mark.parametrize("kind", [ArmKind.FINETUNE, ArmKind.SCRATCH])
def test_the_head_learns_faster_than_the_encoder_in_every_arm(kind: ArmKind) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optim = make_detect("optim.head_lr_scale=8", "optim.layer_decay=1").config.optim
    groups = adamw(model, optim, make_arm(kind)).param_groups
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {scales[id(p)] for p in model["encoder"].parameters()} == {1.0}
    assert {scales[id(p)] for p in model["head"].parameters()} == {8.0}
