"""With labels, held-out images have a kNN accuracy; without any, they have the rest."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from mae_core.data.manifest import Manifest
from mae_core.data.samples import DataError
from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import ConfigError
from pipelines.reading.shards import open_shards
from pipelines.training.pretrain_run import Plan, plan_pretraining
from tests.pipelines.conftest import png

WriteTar = Callable[[Path, dict[str, bytes]], Path]
WORDS = [
    "data.train=t",
    "data.val=v",
    "model.encoder=vit_micro",
    "model.img_size=8",
    "model.patch_size=4",
    "optim.global_batch_size=4",
]


@pytest.fixture
def make_set(tmp_path: Path, write_tar: WriteTar) -> Callable[..., Manifest]:
    def make(name: str, *, labelled: bool) -> Manifest:
        members = {}
        for number in range(4):
            members[f"{number}.png"] = png(number, (8, 8))
            if labelled:
                members[f"{number}.cls"] = b"1"
        write_tar(tmp_path / name / "a.tar", members)
        return open_shards(str(tmp_path / name), str(tmp_path / "index" / name))

    return make


def plan(train: Manifest, val: Manifest, *words: str) -> Plan:
    return plan_pretraining(load_config(PretrainConfig, [], [*WORDS, *words], {}), train, val).plan


def test_images_without_labels_are_held_out_for_the_loss_alone(
    make_set: Callable[..., Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train, val = make_set("train", labelled=False), make_set("val", labelled=False)
    assert plan(train, val).has_labels is False
    assert "data.val has no labels" in caplog.text
    with pytest.raises(ConfigError, match=r"keep_best=health/knn needs labels"):
        plan(train, val, "checkpoint.keep_best=health/knn")
    with pytest.raises(DataError, match=r"data\.train: .*0 has no \.cls"):
        plan(train, val, "health.every_epochs=0")


@pytest.mark.parametrize("labelled", ["train", "val"])
def test_labels_in_one_set_alone_are_a_mistake(
    make_set: Callable[..., Manifest], labelled: str
) -> None:
    train = make_set("train", labelled=labelled == "train")
    val = make_set("val", labelled=labelled == "val")
    with pytest.raises(DataError, match=r"0 has no \.cls.* needs labels"):
        plan(train, val)


def test_labels_in_both_sets_give_a_knn_accuracy(make_set: Callable[..., Manifest]) -> None:
    assert plan(make_set("train", labelled=True), make_set("val", labelled=True)).has_labels
