"""The kNN evaluation: by the names of classes, of the samples that have a label."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.data.manifest import ShardInfo
from mae_core.data.samples import DataError
from pipelines.config.pretrain import KnnConfig
from pipelines.reading.shards import open_shards
from pipelines.training.knn import (
    ImageReader,
    check_labels,
    has_labels,
    knn_metrics,
    small_pictures,
)
from tests.pipelines.conftest import png

WriteTar = Callable[[Path, dict[str, bytes]], Path]
Shards = tuple[ShardInfo, ...]
NEAREST = KnnConfig(k=1)
MODEL = ModelConfig(encoder="vit_micro", img_size=(16, 16), patch_size=8)


class Pixels(nn.Module):
    """Stands for an encoder: what it sees is what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return torch.stack([flat, flat], dim=1)


def shards(
    write_tar: WriteTar, folder: Path, labels: dict[int, bytes | None]
) -> tuple[ShardInfo, ...]:
    """A tar with picture NUMBER and its label; a label None is not there."""
    members = {}
    for number, label in labels.items():
        members[f"{number}.png"] = png(number, (16, 16))
        if label is not None:
            members[f"{number}.cls"] = label
    write_tar(folder / "a.tar", members)
    return open_shards(str(folder), str(folder / "index")).shards


def measure(
    train: Shards, val: Shards, numbers: dict[str, dict[int, int]], config: KnnConfig = NEAREST
) -> dict[str, float]:
    reader = ImageReader(MODEL, (0.5,) * 3, (0.3,) * 3, 1, numbers)
    metrics = knn_metrics(
        {"top1": Pixels()}, train, val, reader, config, lambda _done, _total: None
    )
    assert metrics is not None
    return metrics


def test_classes_are_compared_by_name(tmp_path: Path, write_tar: WriteTar) -> None:
    train = shards(write_tar, tmp_path / "train", {0: b"0", 1: b"1", 2: b"2"})
    val = shards(write_tar, tmp_path / "val", {0: b"0", 2: b"1"})
    assert measure(train, val, {}) == {"knn/top1": 0.5}
    numbers = {f"{tmp_path}/train": {0: 0, 1: 1, 2: 2}, f"{tmp_path}/val": {0: 0, 1: 2}}
    assert measure(train, val, numbers) == {"knn/top1": 1.0}


@pytest.mark.parametrize("label", [None, b"", b"-1", b"cat", b"1.0", b"0 1"])
def test_a_sample_without_a_label_is_left_out_and_counted(
    tmp_path: Path, write_tar: WriteTar, label: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    train = shards(write_tar, tmp_path / "train", {0: b"0", 1: b"1"})
    val = shards(write_tar, tmp_path / "val", {0: b"0", 1: label})
    with caplog.at_level(logging.WARNING):
        assert measure(train, val, {}) == {"knn/top1": 1.0, "knn/left_out": 1.0}
    assert "1 samples are left out of the kNN evaluation" in caplog.text
    assert f"{tmp_path}/val/a.tar: 1" in caplog.text


def test_a_linear_probe_compares_the_encoder_with_raw_pixels(
    tmp_path: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    train = shards(write_tar, tmp_path / "train", {n: b"%d" % (n % 2) for n in range(20)})
    val = shards(write_tar, tmp_path / "val", {0: b"0", 3: b"1"})
    with caplog.at_level(logging.INFO):
        metrics = measure(train, val, {})
    # These two images are among the training images, which a plane separates.
    assert metrics["linear/top1"] == metrics["linear/top1_pixels"] == 1.0
    assert "20 labelled images, of 2 test images: trained=1.000, raw pixels=1.000" in caplog.text


def test_a_linear_probe_takes_no_more_images_than_asked_for(
    tmp_path: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    train = shards(write_tar, tmp_path / "train", {n: b"%d" % (n % 2) for n in range(20)})
    val = shards(write_tar, tmp_path / "val", {0: b"0", 3: b"1"})
    with caplog.at_level(logging.INFO):
        assert "linear/top1" in measure(train, val, {}, KnnConfig(k=1, max_linear=14))
    assert "on 14 labelled images" in caplog.text
    assert "linear/top1" not in measure(train, val, {}, KnnConfig(k=1, max_linear=0))


def test_raw_pixels_are_averaged_over_areas() -> None:
    image = torch.arange(32.0).repeat(32, 1)[None, None]
    assert small_pictures(image).shape == (1, 256)
    assert small_pictures(image)[0, :3].tolist() == [0.5, 2.5, 4.5]
    assert small_pictures(image[..., :8, :8]).shape == (1, 64)


def test_a_class_that_training_lacks_is_wrong_and_large_numbers_cost_nothing(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    train = shards(write_tar, tmp_path / "train", {0: b"999999999", 1: b"1"})
    val = shards(write_tar, tmp_path / "val", {0: b"999999999", 1: b"7"})
    assert measure(train, val, {}) == {"knn/top1": 0.5}


def test_missing_labels_are_told_before_training(
    tmp_path: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    some = shards(write_tar, tmp_path / "some", {0: b"0", 1: None})
    with caplog.at_level(logging.WARNING):
        check_labels("data.val", some, {})
    assert "data.val: 1 of 2 samples that were looked at have no label" in caplog.text
    none = shards(write_tar, tmp_path / "none", {0: None, 1: b"x"})
    with pytest.raises(DataError, match=r"data\.val: .*none/a\.tar: 0 has no \.cls"):
        check_labels("data.val", none, {})


def test_a_number_that_its_own_set_does_not_name_is_no_label(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    one = shards(write_tar, tmp_path / "one", {0: b"2"})
    with pytest.raises(DataError, match=r"0.cls holds 2, but its set names 2 classes"):
        check_labels("data.val", one, {f"{tmp_path}/one": {0: 0, 1: 1}})


def test_a_label_that_cannot_be_used_is_still_one(tmp_path: Path, write_tar: WriteTar) -> None:
    assert has_labels(shards(write_tar, tmp_path / "one", {0: None, 1: b"x"}))
    assert not has_labels(shards(write_tar, tmp_path / "none", {0: None, 1: None}))
