"""What detect adds to a training process: boxes, holes, losses, and boxes back in the picture."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.data.boxes import Boxes
from mae_core.data.label_budget import LabelBudget
from mae_core.model.detector import BoxTargets, DetectionLosses, Detections, Detector
from pipelines.config.arms import ArmKind
from pipelines.config.downstream import DetectConfig
from pipelines.config.loading import load_config
from pipelines.detect import DetectTask, _Wanted
from pipelines.downstream.arms import Arm
from pipelines.downstream.task import Batch, EncodedSample, TaskInfo

ARM = Arm(ArmKind.FINETUNE, LabelBudget(1.0), 0, 10, 1, 0)


def make_task(*words: str) -> DetectTask:
    needed = ["init_from=c", "data.train=t", "data.val=v"]
    config = load_config(DetectConfig, [], [*needed, *words], {})
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


def test_the_picture_shows_both_kinds_of_boxes_in_the_pixels_of_the_view(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []

    def draw(pixels: Any, truths: list[Any], found: list[Any], *_: Any, **__: Any) -> Any:
        drawn.extend([truths[0].xyxy.tolist(), found[0].boxes.tolist()])
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr("pipelines.detect.detection_picture", draw)
    task = make_task()
    example = task.validation_example(make_sample(32, 64, [8, 4, 16, 8]))
    predictions = task.predict(Finder(), torch.zeros(1, 3, 16, 16), [example])
    task.evaluate(predictions, ARM, lambda _: example, [])
    assert drawn == [[[2, 1, 6, 3]], [[2, 1, 6, 3]]]


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
        self.images: list[Tensor] = []
        self.boxes: list[BoxTargets] = []

    def forward(self, images: Tensor, boxes: list[BoxTargets]) -> DetectionLosses:
        self.seen.append((len(images), [len(each.labels) for each in boxes]))
        self.images += images
        self.boxes += boxes
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


def test_each_image_goes_with_its_own_boxes_picture_and_seed() -> None:
    task, model = make_task(), Losses()
    boxes = Boxes(np.zeros((1, 4), np.float32), np.zeros(1, np.int64), np.zeros(1, np.bool_))
    targets = [_Wanted(boxes, (8, 16), 11), None, _Wanted(boxes, (16, 4), 12)]
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 16, 16)
    task.loss(model, Batch(images, targets, torch.tensor([1.0, 0.0, 1.0]), 1, 0), ARM)
    assert [image.max().item() for image in model.images] == [0, 2]
    assert [(x.picture, x.seed) for x in model.boxes] == [((8, 16), 11), ((16, 4), 12)]


def test_the_learning_rate_grows_with_the_global_batch() -> None:
    task = make_task("optim.global_batch_size=64", "optim.micro_batch_size=64")
    assert task.peak_learning_rate(ARM, 0.008) == pytest.approx(0.002)


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
