"""The health of a model on real shards: reproducible, kept, and beside the untrained model's."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mae_core.data.manifest import ShardInfo
from mae_core.model.mae import MaskedAutoencoder, build_mae
from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig
from pipelines.reading.shards import open_shards
from pipelines.training.health import HealthData, HealthWatch
from pipelines.training.knn import ImageReader
from pipelines.training.run_folder import RunFolder
from tests.pipelines.conftest import png

WriteTar = Callable[[Path, dict[str, bytes]], Path]
WORDS = [
    "data.train=t",
    "model.encoder=vit_micro",
    "model.img_size=8",
    "model.patch_size=4",
    "model.decoder={dim: 8, depth: 1, num_heads: 1}",
    "knn.k=1",
]


def make_config(*words: str) -> PretrainConfig:
    return load_config(PretrainConfig, [], [*WORDS, *words], {})


def make_model(config: PretrainConfig, seed: int) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return build_mae(config.model, config.masking, config.loss)


@pytest.fixture
def shards(tmp_path: Path, write_tar: WriteTar) -> tuple[ShardInfo, ...]:
    """Write 70 labelled pictures, of which one can't be decoded: more than one read has."""
    members = {}
    for number in range(70):
        members[f"{number:02d}.png"] = png(number, (8, 8)) if number != 5 else b"damaged"
        members[f"{number:02d}.cls"] = str(number % 3).encode()
    write_tar(tmp_path / "set/a.tar", members)
    return open_shards(str(tmp_path / "set"), str(tmp_path / "index")).shards


def make_watch(
    config: PretrainConfig,
    folder: Path,
    shards: tuple[ShardInfo, ...],
    *,
    has_val: bool = True,
    has_labels: bool = True,
    key: str = "k",
    builds: list[int] | None = None,
) -> HealthWatch:
    def build_untrained() -> MaskedAutoencoder:
        if builds is not None:
            builds.append(1)
        return make_model(config, 0)

    reader = ImageReader(config.model, (0.5,) * 3, (0.3,) * 3, 1, {})
    data = HealthData(shards, shards if has_val else (), has_labels, reader)
    return HealthWatch(config, RunFolder(str(folder)), key, data, build_untrained)


def test_a_model_is_measured_beside_the_untrained_one(
    tmp_path: Path, shards: tuple[ShardInfo, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = make_config()
    model = make_model(config, 0)
    untrained = make_watch(config, tmp_path / "run", shards).measure(model, 5, 100)
    names = ["loss", "knn", "rank", "dead", "mean_share"]
    assert sorted(untrained) == sorted([*names, *(f"{name}_untrained" for name in names)])
    assert all(untrained[name] == untrained[f"{name}_untrained"] for name in names)
    assert untrained["knn"] == 1.0  # each image is its own nearest neighbour
    assert 0.5 < untrained["loss"] < 3
    assert 1 < untrained["rank"] < 69
    assert "health at step 5 (untrained): loss=" in caplog.text

    with torch.no_grad():
        model.encoder.norm.weight.zero_()
    collapsed = make_watch(config, tmp_path / "run", shards).measure(model, 60, 100)
    assert (collapsed["rank"], collapsed["dead"]) == (0.0, 1.0)
    assert collapsed["rank_untrained"] == untrained["rank"]
    assert "less than half of the untrained encoder's" in caplog.text


def test_training_goes_on_as_if_nothing_had_been_measured(
    tmp_path: Path, shards: tuple[ShardInfo, ...]
) -> None:
    config = make_config()
    model = make_model(config, 1).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    make_watch(config, tmp_path / "run", shards).measure(model, 5, 100)
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_run_that_goes_on_keeps_its_points_and_measures_the_untrained_model_once(
    tmp_path: Path, shards: tuple[ShardInfo, ...]
) -> None:
    config = make_config("checkpoint.keep_best=health/rank")
    models = [make_model(config, seed) for seed in range(3)]
    whole = make_watch(config, tmp_path / "whole", shards)
    for step, model in zip((5, 10, 15), models, strict=True):
        whole.measure(model, step, 100)

    builds: list[int] = []
    for steps in ((5, 10), (10, 15)):  # killed after step 10 was measured, before it was saved
        watch = make_watch(config, tmp_path / "run", shards, builds=builds)
        for step in steps:
            watch.measure(models[step // 5 - 1], step, 100)
        assert watch.best_step(5) == 5
    assert len(builds) == 1
    points = RunFolder(str(tmp_path / "run")).read_health("k")
    assert points == RunFolder(str(tmp_path / "whole")).read_health("k")
    assert list(points) == [5, 10, 15]
    assert watch.best_step(15) == max(points, key=lambda step: points[step]["rank"])


def test_points_of_other_data_begin_a_new_curve(
    tmp_path: Path, shards: tuple[ShardInfo, ...]
) -> None:
    config = make_config()
    model = make_model(config, 1)
    make_watch(config, tmp_path / "run", shards).measure(model, 5, 100)
    make_watch(config, tmp_path / "run", shards, key="other").measure(model, 10, 100)
    folder = RunFolder(str(tmp_path / "run"))
    assert list(folder.read_health("other")) == [10]
    assert folder.read_health("k") == {}


@pytest.mark.parametrize("has_val", [True, False])
def test_images_without_labels_are_measured_as_far_as_that_goes(
    tmp_path: Path, write_tar: WriteTar, has_val: bool
) -> None:
    """The loss is of held-out images only; of training images, the features are measured."""
    config = make_config()
    write_tar(tmp_path / "set/a.tar", {f"{i}.png": png(i, (8, 8)) for i in range(6)})
    unlabelled = open_shards(str(tmp_path / "set"), str(tmp_path / "index")).shards
    watch = make_watch(config, tmp_path / "run", unlabelled, has_val=has_val, has_labels=False)
    point = watch.measure(make_model(config, 1), 5, 100)
    measured = {name for name in point if not name.endswith("_untrained")}
    assert measured == {"rank", "dead", "mean_share", *(["loss"] if has_val else [])}
    assert 1 < point["rank"] <= 5
    assert watch.best_step(5) is None  # nothing is to be kept
