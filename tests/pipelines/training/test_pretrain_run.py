"""What pretraining plans before anything is started, and when its training counts as done."""

from pathlib import Path

import pytest

from mae_core.data.manifest import IMAGENET_STATS, Manifest
from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import ConfigError
from pipelines.reading.shards import open_shards
from pipelines.training.pretrain_run import NUM_PICTURES, plan_pretraining
from pipelines.training.run_folder import RunFolder, Taken

WORDS = [
    "model.img_size=16",
    "model.patch_size=8",
    "optim.global_batch_size=8",
    "optim.micro_batch_size=4",
    "optim.epochs=3",
]


@pytest.fixture
def train(foreign: Path, tmp_path: Path) -> Manifest:
    """Of sixteen images, without statistics."""
    return open_shards(str(foreign), str(tmp_path / "index"))


def config_of(*words: str) -> PretrainConfig:
    return load_config(PretrainConfig, [], ["data.train=unused", *WORDS, *words], {})


def test_the_plan_has_steps_statistics_and_pictures(train: Manifest) -> None:
    plan = plan_pretraining(config_of(), train, None).plan
    assert plan.size == (6, 8, 16, 1)
    assert plan.stats.mean == pytest.approx((0.5, 0.5, 0.5), abs=0.02)  # of noise
    assert plan.pictures.pixels.shape == (NUM_PICTURES, 16, 16, 3)
    assert plan.pictures.noise.shape == (NUM_PICTURES, 4)


def test_the_masks_of_the_pictures_stay_the_same_in_a_run(train: Manifest) -> None:
    first, again = (plan_pretraining(config_of(), train, None).plan for _ in range(2))
    assert first.pictures.noise.tolist() == again.pictures.noise.tolist()
    other = plan_pretraining(config_of("seed=1"), train, None).plan
    assert first.pictures.noise.tolist() != other.pictures.noise.tolist()


def test_statistics_of_imagenet_are_taken_only_if_asked_for(train: Manifest) -> None:
    assert plan_pretraining(config_of("data.stats=imagenet"), train, None).plan.stats == (
        IMAGENET_STATS
    )
    with pytest.raises(ConfigError, match=r"model.in_chans=1, but .* have 3 channels"):
        plan_pretraining(config_of("data.stats=imagenet", "model.in_chans=1"), train, None)


def test_too_few_samples_for_a_step_are_told(train: Manifest) -> None:
    with pytest.raises(ConfigError, match="of 16 samples is less than one"):
        plan_pretraining(config_of("optim.epochs=0.1"), train, None)


@pytest.mark.parametrize(("step", "is_kept"), [(6, True), (5, False), (7, False)])
def test_the_training_is_done_at_its_last_step_only(
    train: Manifest, tmp_path: Path, step: int, is_kept: bool
) -> None:
    folder = tmp_path / f"run/checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    planned = plan_pretraining(config_of(), train, None)
    assert planned.is_kept(Taken(RunFolder(str(tmp_path / "run")), None)) is is_kept
