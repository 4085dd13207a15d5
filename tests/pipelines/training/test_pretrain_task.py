"""What pretraining adds to a training process, with a tiny model and without Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mae_core.model.mae import MaskedAutoencoder
from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig
from pipelines.reading.batches import DecodedBatch
from pipelines.training.pretrain_task import Pictures, PretrainJob, PretrainTask, WholeRun
from pipelines.training.process import Process
from pipelines.training.reporting import RunSize

WORDS = [
    "data.train=t",
    "data.shuffle_window=32",
    "model.encoder=vit_micro",
    "model.img_size=8",
    "model.patch_size=4",
    "model.decoder={dim: 8, depth: 1, num_heads: 1}",
    "optim.base_lr=0.01",
    "optim.global_batch_size=16",
    "optim.micro_batch_size=8",
    "optim.warmup_epochs=0.5",
]
PROCESS = Process(0, 1, torch.device("cpu"), lambda *_: None, Path)
# 96 samples: 6 steps an epoch; the warm-up ends after 3 of 30 steps.
SIZE = RunSize(30, 16, 96, 1)
PART = WholeRun(0, 30)


def make_task(folder: Path, **changes: Any) -> PretrainTask:
    job = PretrainJob(
        config=load_config(PretrainConfig, [], WORDS, {}),
        run_uri=str(folder),
        init_uri=None,
        start="",
        run_id=None,
        size=SIZE,
        data_digest="d",
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.5, 1.0),
        pictures=Pictures(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 4), np.float32)),
        train_shards=(),
        val_shards=(),
        class_numbers={},
        has_labels=False,
        evaluation_key="",
    )
    return PretrainTask(job._replace(**changes), PROCESS)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (1, 0.0),  # the first step of a warm-up, as in the reference
        (2, 0.000208333),  # a third of the peak, 0.01 x 16 / 256
        (4, 0.000625),  # the end of the warm-up
        (30, 0.00000211301),  # the last: 26 of 27 steps along the cosine
    ],
)
def test_the_learning_rate_of_a_step(tmp_path: Path, step: int, rate: float) -> None:
    found = make_task(tmp_path).learning_rate(PART, step)
    assert found == pytest.approx(rate, rel=1e-5)


def test_gradients_are_clipped_to_the_configs_norm(tmp_path: Path) -> None:
    assert make_task(tmp_path).options.max_grad_norm is None
    words = [*WORDS, "optim.max_grad_norm=0.5"]
    task = make_task(tmp_path, config=load_config(PretrainConfig, [], words, {}))
    assert task.options.max_grad_norm == 0.5


def test_a_shortened_run_reaches_its_full_learning_rate(tmp_path: Path) -> None:
    """Half an epoch has 3 steps, but the warm-up takes a fifth of the 5 steps at most."""
    task = make_task(tmp_path, size=SIZE._replace(total_steps=5))
    assert task.learning_rate(PART._replace(steps=5), 2) == pytest.approx(0.000625, rel=1e-5)


def test_whole_numbers_become_normalised_images_and_holes_keep_their_weight(tmp_path: Path) -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 8, 8, 3)
    noise, weights = torch.rand(2, 4), torch.tensor([1.0, 0.0])
    decoded = DecodedBatch(pixels, noise, weights, [], pa.table({"position": [0, 1]}))
    batch = make_task(tmp_path).batch(decoded, PART, step=1, number=0)
    assert batch.images.shape == (2, 3, 8, 8)
    assert batch.images[:, :, 0, 0].tolist() == [[-2.0, -1.0, -0.5], [2.0, 1.0, 0.5]]
    assert batch.weights.tolist() == [1.0, 0.0]
    assert torch.equal(batch.noise, noise)
    assert decoded.came == [True, False]


def test_a_mask_ratio_rises_alike_for_masks_and_for_the_model(tmp_path: Path) -> None:
    """Noise is drawn by the sample's position, 16 to a step, and ranked by the step."""
    decoded = DecodedBatch(
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        torch.rand(1, 4),
        torch.ones(1),
        [],
        pa.table({"position": [0]}),
    )
    words = [*WORDS, "masking.mask_ratio=[0.3, 0.8]"]
    task = make_task(tmp_path, config=load_config(PretrainConfig, [], words, {}))
    for step, position, ratio in ((1, 0, 0.3), (1, 15, 0.3), (2, 16, 0.3172414), (30, 479, 0.8)):
        assert task._ratio_at_position(position) == pytest.approx(ratio)
        batch = task.batch(decoded, PART, step=step, number=0)
        assert batch.mask_ratio == pytest.approx(ratio)
    assert make_task(tmp_path).batch(decoded, PART, step=1, number=0).mask_ratio is None


def test_a_sample_of_several_views_came_once() -> None:
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0])
    rows = pa.table({"position": [0, 1]})
    decoded = DecodedBatch(torch.zeros(4, 1), torch.zeros(4, 1), weights, [], rows)
    assert decoded.came == [True, False]


def test_the_model_is_the_seeds_and_a_hole_adds_nothing_to_its_loss(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    model = task.build(PART, is_resumed=False).model
    torch.manual_seed(99)
    again = task.build(PART, is_resumed=False).model
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    rows = pa.table({"position": [0, 1]})
    losses = [
        task.loss(
            model,
            task.batch(
                DecodedBatch(shown, torch.rand(2, 4), torch.tensor([1.0, 0.0]), [], rows),
                PART,
                step=1,
                number=0,
            ),
            PART,
        )
        for shown in (pixels, torch.cat([pixels[:1], 255 - pixels[1:]]))
        if torch.manual_seed(5)
    ]
    assert losses[0].loss.item() == losses[1].loss.item() > 0
    assert losses[0].num_samples.item() == 1


def test_a_resumed_run_fetches_no_weights_to_start_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    process = PROCESS._replace(fetch=lambda uri: Path(fetched.append(uri) or uri))
    monkeypatch.setattr(
        "pipelines.training.pretrain_task.load_starting_weights", lambda *_, **__: None
    )
    task = PretrainTask(make_task(tmp_path, init_uri="there").job, process)
    task.build(PART, is_resumed=True)
    assert fetched == []
    task.build(PART, is_resumed=False)
    assert fetched == ["there"]


def test_a_checkpoint_says_how_far_the_run_is(tmp_path: Path) -> None:
    record = make_task(tmp_path).record(PART, 9)
    assert (record.step, record.samples_seen, record.epoch) == (9, 144, 1.5)
    assert (record.total_steps, record.data_digest, record.stage) == (30, "d", "pretrain")


class Writer:
    """Notes the steps that a picture is drawn at."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def picture(self, picture: Any, name: str, step: int) -> None:
        assert (picture.ndim, name) == (3, "reconstruction")
        self.steps.append(step)


def test_a_picture_is_drawn_at_its_interval_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    monkeypatch.setattr(PretrainTask, "_picture", lambda *_: picture)
    config = load_config(PretrainConfig, [], [*WORDS, "reporting.picture_every_steps=12"], {})
    task, writer = make_task(tmp_path, config=config), Writer()
    model: Any = torch.nn.Linear(1, 1)
    fake: Any = writer
    monkeypatch.setattr("pipelines.training.run_folder.RunFolder.check_start", lambda _: None)
    for step in range(1, 31):
        task.show(model, PART, step, fake)
    assert writer.steps == [12, 24, 30]
    assert (tmp_path / "reconstruction.png").exists()


def test_the_evaluation_compares_with_an_untrained_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def measured(encoders: dict[str, Any], *_: object) -> dict[str, float]:
        seen.update(encoders)
        return {"knn/top1": 0.5}

    monkeypatch.setattr("pipelines.training.pretrain_task.knn_metrics", measured)
    monkeypatch.setattr("pipelines.training.run_folder.RunFolder.check_start", lambda _: None)
    shard: Any = object()
    config = load_config(PretrainConfig, [], [*WORDS, "health.every_epochs=0"], {})
    task = make_task(
        tmp_path, config=config, val_shards=(shard,), has_labels=True, evaluation_key="k"
    )
    model = task.build(PART, is_resumed=False).model
    assert isinstance(model, MaskedAutoencoder)
    untrained = [p.clone() for p in model.encoder.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    task.measure(PART, model)
    assert seen["top1"] is model.encoder
    pairs = zip(untrained, seen["top1_untrained"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert task.job.folder.read_evaluation("k") == {"knn/top1": 0.5}


class Health:
    """In the place of what measures: the rank falls from one point to the next."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def measure(self, mae: object, step: int, total_steps: int) -> dict[str, float]:
        self.steps.append(step)
        return {"rank": 100.0 - step}

    def best_step(self, step: int) -> int | None:
        return self.steps[0]


def test_health_is_measured_at_its_interval_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch has 6 steps. What an earlier start has logged is not logged again."""
    monkeypatch.setattr("pipelines.training.run_folder.RunFolder.check_start", lambda _: None)
    monkeypatch.setattr("infra.tracking.last_logged_step", lambda *_: 12)
    config = load_config(PretrainConfig, [], [*WORDS, "health.every_epochs=1.5"], {})
    task = make_task(tmp_path, config=config, evaluation_key="k")
    health: Any = Health()
    task.health = health
    model = task.build(PART, is_resumed=False).model
    logged: dict[int, tuple[dict[str, float], int]] = {}

    def write(metrics: dict[str, float], step: int, *, after_step: int) -> None:
        logged[step] = metrics, after_step

    writer: Any = SimpleNamespace(write=write)
    saved = [step for step in range(1, 31) if task.watch(model, PART, step, writer)]
    assert health.steps == [9, 18, 27]
    assert saved == [9]
    assert logged[18] == ({"health/rank": 82.0}, 12)
    task.measure(PART, model)
    assert health.steps[-1] == 30
    assert task.job.folder.read_evaluation("k") == {"health/rank": 70.0}


def test_health_that_is_off_measures_nothing(tmp_path: Path) -> None:
    config = load_config(PretrainConfig, [], [*WORDS, "health.every_epochs=0"], {})
    task = make_task(tmp_path, config=config)
    health: Any = Health()
    task.health = health
    model = task.build(PART, is_resumed=False).model
    assert [step for step in range(1, 31) if task.watch(model, PART, step, None)] == []
    task.measure(PART, model)
    assert health.steps == []
