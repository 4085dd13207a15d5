"""Every sample is predicted once, in order; what can't be is counted against the limit."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mae_core.checkpoint_manifest import CheckpointManifest
from mae_core.data.decode import decode_image
from mae_core.data.label_budget import LabelBudget
from mae_core.data.manifest import ShardInfo
from mae_core.data.samples import DataError
from pipelines.config.arms import ArmKind
from pipelines.downstream.arms import Arm
from pipelines.downstream.measuring import Measurer, write_evaluation
from pipelines.downstream.task import EncodedSample, Evaluation, Example, Task
from pipelines.reading.shards import open_shards
from pipelines.training.run_folder import RunFolder


class FakeTask:
    """Predicts an image's label and place, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def validation_example(self, sample: EncodedSample) -> Example:
        return Example(decode_image(sample.image, 3), int(sample.target or b"-1"))

    def predict(
        self, model: nn.Module, images: Tensor, examples: Sequence[Example]
    ) -> list[tuple[int, tuple[int, int] | None]]:
        assert not model.training
        self.batches.append(tuple(images.shape))
        return [(example.target, example.place) for example in examples]


class FakeManifest:
    channel_mean = (0.5, 0.5, 0.5)
    channel_std = (1.0, 1.0, 1.0)


def make_measurer(task: FakeTask, *, rank: int = 0, max_bad_ratio: float = 0.01) -> Measurer:
    return Measurer(
        task=cast(Task, task),
        encoder=cast(CheckpointManifest, FakeManifest()),
        targets=("cls",),
        max_bad_ratio=max_bad_ratio,
        batch_size=4,
        pool=ThreadPoolExecutor(2),
        device=torch.device("cpu"),
        rank=rank,
        world_size=1,
        tell=lambda *_: None,
    )


def png(side: int, shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path, write_tar: Callable[..., Path]) -> tuple[ShardInfo, ...]:
    """Shards of 40 and 5 samples, labelled 0 to 44; every seventh image is wider."""
    number = 0
    for name, count in (("a", 40), ("b", 5)):
        members = {}
        for _ in range(count):
            members[f"{number:03d}.png"] = png(16 if number % 7 == 3 else 8, number)
            members[f"{number:03d}.cls"] = str(number).encode()
            number += 1
        write_tar(tmp_path / f"t/{name}.tar", members)
    return open_shards(str(tmp_path / "t"), str(tmp_path / "cache")).shards


def test_every_sample_is_predicted_once_in_order(shards: tuple[ShardInfo, ...]) -> None:
    task, model = FakeTask(), nn.Linear(1, 1).train()
    found: Any = make_measurer(task).predictions(model, shards, None)
    assert [label for label, _ in found] == list(range(45))
    assert [place for _, place in found] == [
        *((0, row) for row in range(40)),
        *((1, row) for row in range(5)),
    ]
    assert model.training  # as it was
    assert max(batch[0] for batch in task.batches) == 4
    assert {batch[3] for batch in task.batches} == {8, 16}


def test_chosen_rows_alone_are_predicted(shards: tuple[ShardInfo, ...]) -> None:
    rows = (np.asarray([1, 2, 39]), np.asarray([4]))
    found: Any = make_measurer(FakeTask()).predictions(nn.Linear(1, 1), shards, rows)
    assert [label for label, _ in found] == [1, 2, 39, 44]


def test_features_are_kept_for_the_same_rows_and_made_anew_for_others(
    shards: tuple[ShardInfo, ...],
) -> None:
    task, model = FakeTask(), nn.Linear(1, 1)
    measurer = make_measurer(task)
    few, others = (np.asarray([0]), np.asarray([1])), (np.asarray([2]), np.asarray([3]))
    first: Any = measurer.features(model, None, shards, few)
    num_batches = len(task.batches)
    assert measurer.features(model, None, shards, few) is first
    assert len(task.batches) == num_batches
    second: Any = measurer.features(model, None, shards, others)
    assert [label for label, _ in second] == [2, 43]


def test_features_of_fresh_weights_are_kept_beside_the_pretrained_ones(
    shards: tuple[ShardInfo, ...],
) -> None:
    task, model = FakeTask(), nn.Linear(1, 1)
    measurer, rows = make_measurer(task), (np.asarray([0]), np.asarray([1]))
    pretrained = measurer.features(model, None, shards, rows)
    seed_0 = measurer.features(model, 0, shards, rows)
    assert seed_0 is not pretrained
    assert measurer.features(model, 0, shards, rows) is seed_0
    assert measurer.features(model, 1, shards, rows) is not seed_0
    assert measurer.features(model, None, shards, rows) is pretrained


def test_a_metric_that_has_no_value_is_left_out(tmp_path: Path) -> None:
    arm = Arm(ArmKind.KNN, LabelBudget(1.0), 0, 10, 0, 0)
    folder = RunFolder(str(tmp_path))
    write_evaluation(folder, arm, Evaluation({"top1": 0.5, "auroc/rare": float("nan")}, {}, {}))
    assert folder.read_arm(arm.label) == {"top1": 0.5}


def test_a_sample_is_found_again_by_its_place(shards: tuple[ShardInfo, ...]) -> None:
    assert make_measurer(FakeTask()).example_at(shards, (1, 3)).target == 43


def test_what_cannot_be_measured_is_named_and_bounded(
    tmp_path: Path, write_tar: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    members = {"bad.png": png(8, 1)[:40], "bad.cls": b"0", "good.png": png(8, 2), "good.cls": b"1"}
    write_tar(tmp_path / "t/a.tar", members)
    shards = open_shards(str(tmp_path / "t"), str(tmp_path / "cache")).shards
    model = nn.Linear(1, 1)
    found: Any = make_measurer(FakeTask()).predictions(model, shards, None)
    assert [label for label, _ in found] == [1]
    assert "not measured: shard=" in caplog.text
    assert "key=bad" in caplog.text
    with pytest.raises(
        DataError, match=r"1 of 2 samples of .*a\.tar .* than data\.max_bad_ratio=0"
    ):
        make_measurer(FakeTask(), max_bad_ratio=0.0).predictions(model, shards, None)
