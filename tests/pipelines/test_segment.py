"""What segment adds to a training process: masks, holes, losses, and maps of whole pictures."""

import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.data.label_budget import LabelBudget
from mae_core.data.samples import DataError
from pipelines.config.arms import ArmKind
from pipelines.config.downstream import SegmentConfig
from pipelines.config.loading import load_config
from pipelines.downstream.arms import Arm
from pipelines.downstream.task import Batch, EncodedSample, TaskInfo
from pipelines.segment import SegmentTask, _summarize, _window_stride

ARM = Arm(ArmKind.FINETUNE, LabelBudget(1.0), 0, 10, 1, 0)
NAMES = ("ground", "tree")


def make_task(*words: str) -> SegmentTask:
    needed = ["init_from=c", "data.train=t", "data.val=v", "segment.names=[ground,tree]"]
    config = load_config(SegmentConfig, [], [*needed, *words], {})
    return SegmentTask(config, TaskInfo(ModelConfig(img_size=(8, 8), patch_size=4), NAMES, "title"))


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_sample(mask: npt.NDArray[np.uint8]) -> EncodedSample:
    """A sample whose image is bright where its mask says tree."""
    image = np.repeat(np.where(mask == 1, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    return EncodedSample("s/a.tar", "k", 0, png(image), png(mask))


def left_half(height: int, width: int) -> npt.NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 1
    return mask


class Brightness(nn.Module):
    """Calls what is bright a tree."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        bright = self.scale * images[:, 0]
        return torch.stack([-bright, bright], dim=1)


def test_the_map_of_a_picture_larger_than_the_window_lies_where_the_picture_does() -> None:
    task = make_task("segment.overlap=0.5")
    example = task.validation_example(make_sample(left_half(16, 24)))._replace(place=(0, 0))
    images = torch.from_numpy(example.pixels.copy()).permute(2, 0, 1)[None].float() - 127.5
    (prediction,) = task.predict(Brightness(), images, [example])
    assert prediction.classes is not None
    assert np.array_equal(prediction.classes, left_half(16, 24))
    assert prediction.counts.tolist() == [[192, 0], [0, 192]]
    found = task.evaluate([prediction], ARM, lambda _: example, [])
    assert found.metrics["miou"] == 1.0


def test_windows_overlap_by_the_share_that_is_asked_for() -> None:
    section = make_task("segment.overlap=0.25").section
    assert _window_stride(section, (8, 16)) == (6, 12)


def test_ignored_pixels_and_holes_add_nothing_to_the_loss() -> None:
    task = make_task()
    mask = left_half(8, 8)
    mask[:, 4:] = 255
    example = task.validation_example(make_sample(mask))
    weights = torch.tensor([1.0, 0.0])
    batch = Batch(torch.zeros(2, 3, 8, 8), [example.target, None], weights, 1, 0)
    found = task.loss(Brightness(), batch, ARM)
    assert found.loss.item() == pytest.approx(0.34657359)  # ln 2, over two images
    assert found.num_samples.item() == 1


def test_a_class_weight_multiplies_the_loss_of_its_pixels() -> None:
    task = make_task("segment.class_weights=[1,3]")
    example = task.validation_example(make_sample(left_half(8, 8)))
    batch = Batch(torch.zeros(1, 3, 8, 8), [example.target], torch.ones(1), 1, 0)
    found = task.loss(Brightness(), batch, ARM)
    assert found.loss.item() == pytest.approx(2 * 0.69314718)  # half of the pixels count thrice


def test_a_training_view_cuts_image_and_mask_at_the_same_place() -> None:
    example = make_task().training_example(make_sample(left_half(16, 24)), ARM)
    assert example.pixels.shape == (8, 8, 3)
    whole = np.isin(example.pixels[..., 0], (0, 255)) & (example.target.classes != 255)
    assert whole.any()
    assert np.array_equal((example.pixels[..., 0] == 255)[whole], example.target.classes[whole])


def test_a_mask_of_another_size_is_an_error_of_its_sample() -> None:
    sample = make_sample(left_half(8, 8))._replace(target=png(left_half(8, 4)))
    with pytest.raises(DataError, match=r"s/a\.tar: k"):
        make_task().validation_example(sample)


def test_the_foreground_is_scored_where_the_first_class_is_the_background() -> None:
    for names, is_scored in ((("ground", "tree"), False), (("background", "tree"), True)):
        task = make_task(f"segment.names=[{','.join(names)}]")
        task.info = task.info._replace(names=names)
        example = task.validation_example(make_sample(left_half(8, 8)))
        images = torch.from_numpy(example.pixels.copy()).permute(2, 0, 1)[None].float() - 127.5
        (prediction,) = task.predict(Brightness(), images, [example])
        metrics = task.evaluate([prediction], ARM, lambda _, x=example: x, []).metrics
        assert ("foreground_iou" in metrics) == is_scored


def test_the_ceiling_stands_below_the_table_of_the_arms() -> None:
    task = make_task()
    info = task.info._replace(ceiling={"ceiling/miou": 0.6543, "ceiling/instance_f1": 0.9})
    summary = _summarize(task.config, info, {ARM: {"miou": 0.5}})
    last = summary.texts["summary.md"].splitlines()[-1]
    assert (
        last
        == "Ceiling (an oracle on the grid of the head's output): miou 0.654, instance_f1 0.900"
    )
    assert (
        "Ceiling"
        not in _summarize(task.config, task.info, {ARM: {"miou": 0.5}}).texts["summary.md"]
    )
