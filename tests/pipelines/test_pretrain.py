"""What a finished pretraining is reused for, and which weights a new one may start from."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import pretrain
from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import ConfigError, StageResult
from pipelines.pretrain import OpenedPretraining, PretrainRun
from pipelines.reading.shards import open_shards
from pipelines.training.pretrain_evaluation import evaluation_key
from pipelines.training.run_folder import RunFolder

DONE = StageResult(
    "pretrain", "done", "r1", "/c", {"knn/top1": 0.1, "train/loss": 0.5, "data/left_out": 2}
)


@pytest.fixture
def opened(foreign: Path, tmp_path: Path) -> OpenedPretraining:
    """Open a run on sixteen images that are its validation set, too."""
    words = [f"data.train={foreign}", f"data.val={foreign}"]
    config = load_config(PretrainConfig, [], words, {})
    data = open_shards(str(foreign), str(tmp_path / "index"))
    return OpenedPretraining(config, RunFolder(str(tmp_path / "run")), data, data, None)


def test_a_finished_run_has_the_metrics_of_the_evaluation_asked_for(
    opened: OpenedPretraining,
) -> None:
    opened.folder.write_evaluation(evaluation_key(opened.config), {"knn/top1": 0.7})
    assert opened.reuse(DONE) == StageResult(
        "pretrain", "reused", "r1", "/c", {"knn/top1": 0.7, "train/loss": 0.5, "data/left_out": 2}
    )


def test_an_evaluation_of_something_else_is_not_handed_back(opened: OpenedPretraining) -> None:
    opened.folder.write_evaluation("another", {"knn/top1": 0.7})
    assert opened.reuse(DONE) is None


def test_a_run_is_identified_by_its_training_data_and_weights(opened: OpenedPretraining) -> None:
    identity = opened.identity
    assert identity.digest == opened.train.digest
    assert sorted(identity.inputs) == ["data.train"]
    assert identity.tags["stage"] == "pretrain"


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"encoder": "vit_base"}, "model.encoder=vit_base, this run has vit_micro"),
        ({"in_chans": 1}, "model.in_chans=1, this run has 3"),
        ({"patch_size": 8}, "model.patch_size=8, this run has 16"),
    ],
)
def test_weights_of_another_model_are_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, theirs: dict[str, object], message: str
) -> None:
    words = ["data.train=unused", "init_from=/c", "model.encoder=vit_micro"]
    config = load_config(PretrainConfig, [], words, {})
    model = config.model.model_copy(update=theirs)
    manifest = SimpleNamespace(model=model, origin=None, decoder_present=True)
    monkeypatch.setattr(pretrain, "fetch_manifest", lambda _: manifest)
    with pytest.raises(ConfigError, match=message):
        PretrainRun(config).open(RunFolder(str(tmp_path)))
