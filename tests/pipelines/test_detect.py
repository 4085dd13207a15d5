"""What detect adds to a training process: boxes, holes, losses, and boxes back in the picture."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.model.detector import Detections
from pipelines.config.arms import ArmKind
from pipelines.config.downstream import DetectConfig
from pipelines.config.loading import load_config
from pipelines.detect import DetectTask
from pipelines.downstream.arms import Arm
from pipelines.downstream.task import Batch, EncodedSample, TaskInfo

ARM = Arm(ArmKind.FINETUNE, 1.0, 0, 10, 1, 0)


def make_task() -> DetectTask:
    config = load_config(DetectConfig, [], ["init_from=c", "data.train=t", "data.val=v"], {})
    model = ModelConfig(img_size=(16, 16), patch_size=4)
    return DetectTask(config, TaskInfo(model, ("cat", "dog"), "title", identifiers=(3, 7)))


def make_sample(height: int, width: int, *boxes: list[float]) -> EncodedSample:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    items = [{"bbox": box, "category_id": 7} for box in boxes]
    return EncodedSample(
        "s/a.tar", "k", 0, buffer.getvalue(), json.dumps({"annotations": items}).encode()
    )


def test_a_picture_is_fitted_and_its_boxes_stay_in_its_own_pixels() -> None:
    example = make_task().validation_example(make_sample(32, 64, [8, 4, 16, 8]))
    assert example.pixels.shape == (16, 16, 3)
    boxes, factor = example.target
    assert factor == 0.25
    assert boxes.xyxy.tolist() == [[8, 4, 24, 12]]
    assert boxes.labels.tolist() == [1]  # the second class has the category_id 7


class Finder(nn.Module):
    """Finds one box in each image, at the same place of the view."""

    def detect(self, images: Tensor) -> list[Detections]:
        box = Detections(
            torch.tensor([[2.0, 1.0, 6.0, 3.0]]), torch.tensor([0.5]), torch.tensor([1])
        )
        return [box] * len(images)


def test_a_box_that_is_found_in_the_view_is_mapped_back_to_the_picture() -> None:
    task = make_task()
    example = task.validation_example(make_sample(32, 64, [8, 4, 16, 8]))
    (prediction,) = task.predict(Finder(), torch.zeros(1, 3, 16, 16), [example])
    assert prediction.found.boxes.tolist() == [[8, 4, 24, 12]]
    scores = task.evaluate([prediction], ARM, lambda _: example, []).metrics
    assert scores["ap"] == pytest.approx(1.0)
    assert scores["ap/dog"] == pytest.approx(1.0)


class Losses(nn.Module):
    """Losses of 3 in all, whatever it is given, which it notes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.seen: list[tuple[int, list[int]]] = []

    def forward(self, images: Tensor, boxes: list[Any]) -> dict[str, Tensor]:
        self.seen.append((len(images), [len(each.labels) for each in boxes]))
        return {"box": self.weight, "score": 2 * self.weight}


def make_batch(task: DetectTask, there: list[bool]) -> Batch:
    example = task.training_example(make_sample(16, 16, [0, 0, 16, 16]), ARM)
    targets = [example.target if is_there else None for is_there in there]
    weights = torch.tensor([float(is_there) for is_there in there])
    images = torch.zeros(len(there), 3, 16, 16)
    return Batch(images, targets, weights, np.random.default_rng(0))


def test_an_image_weighs_the_same_whatever_holes_lie_beside_it() -> None:
    task, model = make_task(), Losses()
    found = task.loss(model, make_batch(task, [True, False, False, True]), ARM)
    assert [count for count, _ in model.seen] == [2]
    # The detector's losses are means over the images that came: two of a nominal four.
    assert found.loss.item() == pytest.approx(1.5)
    assert found.num_samples.item() == 2


def test_a_batch_of_holes_takes_part_and_counts_nothing() -> None:
    task, model = make_task(), Losses()
    found = task.loss(model, make_batch(task, [False, False]), ARM)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert model.seen == [(1, [0])]
    assert (found.loss.item(), found.num_samples.item()) == (0, 0)
    assert model.weight.grad is not None
    assert float(model.weight.grad) == 0
