"""What an evaluation was computed from is its key."""

from pathlib import Path

import pytest

from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig
from pipelines.training.pretrain_evaluation import evaluation_key
from tests.pipelines.shard_sets import shard_set


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    for name in ("train", "val", "other"):
        shard_set(tmp_path / name, classes=[name])
    return [f"data.train={tmp_path}/train", f"data.val={tmp_path}/val"]


def key_of(*words: str) -> str:
    return evaluation_key(load_config(PretrainConfig, [], words, {}))


def test_without_labelled_data_there_is_none(words: list[str]) -> None:
    assert key_of(words[0], "health.every_epochs=0") == ""


def test_another_setting_or_set_is_another_evaluation(words: list[str], tmp_path: Path) -> None:
    keys = {
        key_of(*words),
        key_of(*words, "knn.k=5"),
        key_of(words[0], f"data.val={tmp_path}/other"),
        key_of(f"data.train={tmp_path}/other", words[1]),
    }
    assert len(keys) == 4


def test_how_the_model_is_trained_is_not_part_of_it(words: list[str]) -> None:
    assert key_of(*words, "optim.base_lr=0.5", "seed=3") == key_of(*words)
