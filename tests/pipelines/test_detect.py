"""What detect adds to a training process: boxes, holes, losses, and boxes back in the picture."""

import io
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.data.label_budget import LabelBudget
from mae_core.model.detector import DetectionLosses, Detections, Detector
from pipelines.config.arms import ArmKind
from pipelines.config.downstream import DetectConfig
from pipelines.config.loading import load_config
from pipelines.detect import DetectTask
from pipelines.downstream.arms import Arm
from pipelines.downstream.task import Batch, EncodedSample, TaskInfo

ARM = Arm(ArmKind.FINETUNE, LabelBudget(1.0), 0, 10, 1, 0)


def make_task() -> DetectTask:
    config = load_config(DetectConfig, [], ["init_from=c", "data.train=t", "data.val=v"], {})
    model = ModelConfig(img_size=(16, 16), patch_size=4)
    info = TaskInfo(
        model, ("cat", "dog"), "title", identifiers=(3, 7), channel_mean=(0.2, 0.2, 0.2)
    )
    return DetectTask(config, info)


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
    boxes, part, scale = example.target
    assert (part, scale) == ((8, 16), (0.25, 0.25))
    assert (example.pixels[8:] == 51).all()  # beside the black picture lies the mean of the encoder
    assert boxes.xyxy.tolist() == [[8, 4, 24, 12]]
    assert boxes.labels.tolist() == [1]  # the second class has the category_id 7


class Finder(Detector):
    """Finds one box in each image, at the same place of the view; notes where pictures end."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # without an encoder and a head
        self.pictures: list[tuple[int, int]] = []

    def detect(
        self, images: Tensor, pictures: Sequence[tuple[int, int]] | None = None
    ) -> list[Detections]:
        self.pictures += pictures or []
        box = Detections(
            torch.tensor([[2.0, 1.0, 6.0, 3.0]]), torch.tensor([0.5]), torch.tensor([1])
        )
        return [box] * len(images)


def test_a_box_that_is_found_in_the_view_is_mapped_back_to_the_picture() -> None:
    task = make_task()
    example = task.validation_example(make_sample(32, 64, [8, 4, 16, 8]))
    finder = Finder()
    (prediction,) = task.predict(finder, torch.zeros(1, 3, 16, 16), [example])
    assert finder.pictures == [(8, 16)]
    assert prediction.found.boxes.tolist() == [[8, 4, 24, 12]]
    scores = task.evaluate([prediction], ARM, lambda _: example, []).metrics
    assert scores["ap"] == pytest.approx(1.0)
    assert scores["ap/dog"] == pytest.approx(1.0)


def test_x_and_y_are_mapped_back_by_a_factor_of_their_own() -> None:
    task = make_task()
    example = task.validation_example(make_sample(22, 64, [8, 4, 16, 8]))  # 5.5 rows become 6
    (prediction,) = task.predict(Finder(), torch.zeros(1, 3, 16, 16), [example])
    assert prediction.found.boxes.flatten().tolist() == pytest.approx([8, 22 / 6, 24, 11])


class Losses(nn.Module):
    """Losses of 3 for each image and a divisor of 5, whatever it is given, which it notes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.seen: list[tuple[int, list[int]]] = []

    def forward(self, images: Tensor, boxes: list[Any]) -> DetectionLosses:
        self.seen.append((len(images), [len(each.labels) for each in boxes]))
        total = len(images) * self.weight
        return DetectionLosses({"box": total, "score": 2 * total}, torch.tensor(5.0))


def make_batch(task: DetectTask, there: list[bool]) -> Batch:
    example = task.training_example(make_sample(16, 16, [0, 0, 16, 16]), ARM)
    targets = [example.target if is_there else None for is_there in there]
    weights = torch.tensor([float(is_there) for is_there in there])
    images = torch.zeros(len(there), 3, 16, 16)
    return Batch(images, targets, weights, 1, 0)


def test_holes_are_left_out_of_the_sum_and_of_the_divisor() -> None:
    task, model = make_task(), Losses()
    found = task.loss(model, make_batch(task, [True, False, False, True]), ARM)
    assert [count for count, _ in model.seen] == [2]
    assert found.divisor is not None
    assert (found.loss.item(), found.divisor.item()) == (6, 5)
    # What is logged is divided by the share of the images that came; this mean needs no correction.
    assert found.num_samples.item() == 4


def test_a_batch_of_holes_takes_part_and_counts_nothing() -> None:
    task, model = make_task(), Losses()
    found = task.loss(model, make_batch(task, [False, False]), ARM)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert model.seen == [(1, [0])]
    assert found.divisor is not None
    assert (found.loss.item(), found.divisor.item()) == (0, 0)
    assert model.weight.grad is not None
    assert float(model.weight.grad) == 0


def test_a_training_example_says_where_its_picture_ends_and_what_seeds_its_draws() -> None:
    task = make_task()
    sample = make_sample(8, 64, [0, 0, 16, 8])
    first, again = (task.training_example(sample, ARM).target for _ in range(2))
    assert (first.part, first.seed) == (again.part, again.seed)
    assert first.part[0] < 16
    other = task.training_example(sample._replace(key="other"), ARM).target
    assert other.seed != first.seed
