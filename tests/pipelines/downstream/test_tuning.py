"""What the downstream stages add to a training process, with tiny models and without Ray."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from mae_core.config import LossConfig, MaskingConfig, ModelConfig
from mae_core.data.label_budget import LabelBudget
from mae_core.data.manifest import Manifest, ShardInfo
from mae_core.data.pixels import CorruptSampleError
from pipelines.config.arms import ArmKind
from pipelines.config.downstream import ClassifyConfig
from pipelines.config.loading import load_config
from pipelines.downstream.arms import Arm, plan_arms
from pipelines.downstream.task import ArmStart, EncodedSample, Evaluation, Example
from pipelines.downstream.tuning import DecodedExamples, TuningJob, TuningTask, remaining_data
from pipelines.reading.sequence import SequencePlan
from pipelines.training.process import Process
from pipelines.training.run_folder import RunFolder

FINETUNE = Arm(ArmKind.FINETUNE, LabelBudget(1.0), 0, 80, 20, 5)
ENCODER = SimpleNamespace(
    model=SimpleNamespace(img_size=(2, 2), in_chans=3),
    channel_mean=(0.5, 0.5, 0.5),
    channel_std=(0.5, 0.5, 0.5),
)


class FakeTask:
    """Has a peak rate of 1 and decodes what is not broken."""

    def start(self, arm: Arm) -> None:
        return None

    def peak_learning_rate(self, arm: Arm, base_lr: float) -> float:
        return base_lr

    def training_example(self, sample: EncodedSample, arm: Arm) -> Example:
        if sample.key == "broken":
            raise CorruptSampleError("its image ends early", "truncated")
        return Example(np.full((2, 2, 3), 255, np.uint8), arm.label)


def _no_fetch(uri: str) -> Path:
    raise AssertionError(f"{uri} is fetched")


def make_task(folder: Path, *words: str) -> TuningTask:
    needed = ["init_from=c", "data.train=t", "data.val=v", "data.shuffle_window=8"]
    batch = ["optim.global_batch_size=8", "optim.micro_batch_size=4", "optim.base_lr=1"]
    job: Any = SimpleNamespace(
        config=load_config(ClassifyConfig, [], [*needed, *batch, *words], {}),
        arms=(Arm(ArmKind.LINEAR, LabelBudget(1.0), 0, 80, 5, 0), FINETUNE),
        make_task=FakeTask,
        encoder=ENCODER,
        targets=("cls",),
    )
    return TuningTask(job, Process(0, 1, torch.device("cpu"), lambda *_: None, _no_fetch))


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (1, 0.0),
        (2, 0.5),  # 0.2 epochs of 10 steps: two steps of warm-up
        (3, 1.0),  # the end of the warm-up
        (20, 0.1 + 0.9 * 0.007596124),  # the last: 17 of 18 steps along the cosine, to the floor
    ],
)
def test_the_learning_rate_of_a_step(tmp_path: Path, step: int, rate: float) -> None:
    task = make_task(tmp_path, "optim.warmup_epochs=0.2", "optim.min_lr_ratio=0.1")
    assert task.learning_rate(FINETUNE, step) == pytest.approx(rate)


def test_a_warm_up_takes_a_fifth_of_the_steps_at_most(tmp_path: Path) -> None:
    task = make_task(tmp_path, "optim.warmup_epochs=5")
    assert task.learning_rate(FINETUNE, 3) == pytest.approx(0.5)
    assert task.learning_rate(FINETUNE, 5) == pytest.approx(1.0)


def rows(*keys: str, position: int, errors: tuple[str | None, ...]) -> pa.Table:
    count = len(keys)
    return pa.table(
        {
            "position": list(range(position, position + count)),
            "shard": ["a.tar"] * count,
            "key": list(keys),
            "epoch": [2] * count,
            "image": [b""] * count,
            "target": [b"1"] * count,
            "error": pa.array(errors, pa.string()),
        }
    )


def test_what_can_not_be_used_is_a_hole_with_its_reason(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    errors = (None, None, "checksum: it changed")
    table = rows("whole", "broken", "changed", position=40, errors=errors)
    (decoded,) = task.decoded([table])
    assert decoded.came == [True, False, False]
    assert [(x.key, x.kind, x.epoch) for x in decoded.bad] == [
        ("broken", "truncated", 2),
        ("changed", "checksum", 2),
    ]
    batch = task.batch(decoded, FINETUNE, step=6, number=0)
    assert batch.images[:, 0, 0, 0].tolist() == [1.0, 0.0, 0.0]  # a hole's pixels are zeros
    assert batch.weights.tolist() == [1.0, 0.0, 0.0]
    assert batch.targets == ["finetune-1-seed0", None, None]


def test_a_sample_is_decoded_for_the_arm_that_its_step_is_of(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    tables = [rows("k", position=place, errors=(None,)) for place in (39, 40)]
    found = [decoded.examples[0] for decoded in task.decoded(tables)]
    assert [x.target for x in found if x is not None] == ["linear-1-seed0", "finetune-1-seed0"]


def test_a_micro_batch_knows_its_place_in_the_global_batch(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    decoded = DecodedExamples([None], [], pa.table({}))
    assert [task.batch(decoded, FINETUNE, step=6, number=x).first for x in (0, 1)] == [0, 4]
    task.process = task.process._replace(rank=1, world_size=2)
    assert [task.batch(decoded, FINETUNE, step=6, number=x).first for x in (0, 1)] == [4, 12]


def test_arms_of_a_seed_train_on_the_same_samples_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans: list[SequencePlan] = []
    monkeypatch.setattr(
        "pipelines.downstream.tuning.sequence_dataset", lambda plan: plans.append(plan)
    )
    monkeypatch.setattr("pipelines.downstream.tuning.resume_position", lambda _: 0)
    words = ["classify.arms=[logistic,finetune,scratch]", "classify.label_fraction=[0.5]"]
    needed = ["init_from=c", "data.train=t", "data.val=v", "data.shuffle_window=8"]
    batch = ["optim.global_batch_size=8", "optim.micro_batch_size=4", "optim.epochs=3"]
    config = load_config(ClassifyConfig, [], [*needed, *batch, *words, "classify.seeds=[4]"], {})
    shards = tuple(
        ShardInfo(path=f"{i}.tar", index=f"{i}.npy", num_samples=n, num_bytes=99)
        for i, n in enumerate((20, 12))
    )
    planned = plan_arms(config, Manifest(shards=shards), [0, 1, 2, 3] * 8)
    job: Any = SimpleNamespace(
        config=config,
        arms=tuple(arm for arm, _ in planned),
        rows=tuple(rows for _, rows in planned),
        train_shards=shards,
        run_uri="r",
        targets=("cls",),
    )
    remaining_data(job)
    (plan,) = plans
    assert [arm.first_step for arm in job.arms] == [0, 0, 6]
    num_shards, samples = len(shards), 48  # of each of the two arms that take steps
    windows = plan.order.window_of(samples)
    seen = []
    for first, shift in ((0, 0), (windows, num_shards)):
        arm_rows = []
        for window in range(first, first + windows):
            in_order = [
                (part.epoch, part.shard - shift, int(plan.rows[part.shard][row]))
                for part in plan.order.window_segments(window)
                for row in range(part.start, part.stop)
            ]
            arm_rows += [in_order[i] for i in plan.order.window_permutation(window)]
        seen.append(arm_rows)
    assert len(seen[0]) == samples
    assert seen[0] == seen[1]


def test_an_arm_from_scratch_fetches_no_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def build_encoder(_: object, *, drop_path_rate: float) -> nn.Module:
        rates.append(drop_path_rate)
        return nn.Linear(1, 1)

    monkeypatch.setattr("pipelines.downstream.tuning.build_encoder", build_encoder)
    task = make_task(tmp_path, "optim.drop_path_rate=0.3")
    fake: Any = task.task
    fake.build_model = lambda encoder, arm: encoder
    fake.build_optimizer = lambda model, arm: torch.optim.SGD(model.parameters(), lr=0.0)
    scratch = FINETUNE._replace(kind=ArmKind.SCRATCH)
    first = task.build(scratch, is_resumed=False).model
    torch.manual_seed(99)
    again = task.build(scratch, is_resumed=True).model
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    task.build(scratch._replace(kind=ArmKind.UNTRAINED), is_resumed=False)
    assert rates == [0.3, 0.3, 0.0]  # a frozen encoder drops no paths


def test_the_start_is_fitted_before_the_first_step_and_not_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipelines.downstream.tuning.build_encoder", lambda *_, **__: nn.Linear(1, 1)
    )
    task = make_task(tmp_path)
    fake, measurer, job = cast(Any, task.task), cast(Any, task.measurer), cast(Any, task.job)
    fake.build_model = lambda encoder, arm: encoder
    fake.build_optimizer = lambda model, arm: torch.optim.SGD(model.parameters(), lr=0.0)
    fake.start = lambda arm: ArmStart(10, lambda *_: [], lambda model, _: model.weight.fill_(3))
    scratch, untrained = (FINETUNE._replace(kind=x) for x in (ArmKind.SCRATCH, ArmKind.UNTRAINED))
    untrained = untrained._replace(steps=0)
    job.arms, job.rows, job.train_shards = (scratch, untrained), ((range(4),), (range(4),)), ()
    monkeypatch.setattr(type(measurer), "outputs", lambda *_: [])

    def weight(arm: Arm, *, is_resumed: bool) -> float:
        return cast(nn.Linear, task.build(arm, is_resumed=is_resumed).model).weight.item()

    assert weight(scratch, is_resumed=False) == 3
    assert weight(scratch, is_resumed=True) != 3
    assert weight(untrained, is_resumed=False) != 3  # it takes no step


def make_job(tmp_path: Path) -> TuningJob[Any, Any, Any]:
    """A job of two arms, of 5 and 20 steps of 8 images, that are measured on 40 images."""
    shard: Any = SimpleNamespace(num_samples=40)
    needed = ["init_from=c", "data.train=t", "data.val=v", "data.shuffle_window=8"]
    batch = ["optim.global_batch_size=8", "optim.micro_batch_size=4"]
    encoder: Any = SimpleNamespace(
        model=ModelConfig(),
        channel_mean=(0.5,) * 3,
        channel_std=(0.5,) * 3,
        masking=MaskingConfig(),
        loss=LossConfig(),
    )
    fields: Any = dict.fromkeys(TuningJob._fields)
    fields |= {
        "config": load_config(ClassifyConfig, [], [*needed, *batch], {}),
        "make_task": FakeTask,
        "arms": (Arm(ArmKind.LINEAR, LabelBudget(1.0), 0, 80, 5, 0), FINETUNE),
        "val_shards": (shard,),
        "train_shards": (shard,),
        "rows": (None, None),
        "encoder": encoder,
        "pretrained": ModelConfig(),
        "targets": ("cls",),
        "classes": ("a", "b"),
        "category_ids": (),
        "data_digest": "d",
        "run_uri": str(tmp_path),
    }
    return TuningJob(**fields)


def test_a_checkpoint_counts_the_epochs_of_its_own_arm(tmp_path: Path) -> None:
    process = Process(0, 1, torch.device("cpu"), lambda *_: None, _no_fetch)
    record = make_job(tmp_path).build_task(process).record(FINETUNE, 15)
    assert record.epoch == 1.0  # 10 steps of 8 images after the arm's first step, of 80 images
    assert (record.step, record.samples_seen, record.total_steps) == (15, 120, 25)
    assert (record.stage, record.classes) == ("classify", ("a", "b"))


def test_the_time_that_is_left_counts_later_arms_and_their_measurements(tmp_path: Path) -> None:
    process = Process(0, 1, torch.device("cpu"), lambda *_: None, _no_fetch)
    task = make_job(tmp_path).build_task(process)
    linear, finetune = task.parts
    # Two arms of 40 images at three times the speed of a step of 8.
    assert task.after(linear).steps == pytest.approx(20 + 2 * 40 / 24)
    assert task.after(finetune).steps == pytest.approx(40 / 24)


@pytest.mark.parametrize(("kind", "weights"), [(ArmKind.KNN, None), (ArmKind.UNTRAINED, 4)])
def test_frozen_features_are_kept_by_the_weights_of_their_encoder(
    tmp_path: Path, kind: ArmKind, weights: int | None
) -> None:
    process = Process(0, 1, torch.device("cpu"), lambda *_: None, _no_fetch)
    arm = FINETUNE._replace(kind=kind, steps=0, seed=4)
    task = make_job(tmp_path)._replace(arms=(arm,), rows=((),)).build_task(process)
    asked: list[int | None] = []

    def features(_model: object, weights: int | None, *_: object) -> list[Any]:
        asked.append(weights)
        return []

    task.measurer = cast(Any, SimpleNamespace(features=features, example_at=print))
    cast(Any, task.task).evaluate = lambda *_: Evaluation({}, {}, {})
    task._evaluation(arm, nn.Linear(1, 1))
    assert asked == [weights, weights]


def test_an_arm_trains_at_the_rate_that_its_trials_chose(tmp_path: Path) -> None:
    task = make_task(tmp_path, "optim.base_lr=[1,3]", "optim.warmup_epochs=0")
    trials = [FINETUNE._replace(first_step=0, steps=1, tried_rate=rate) for rate in (1.0, 3.0)]
    job = cast(Any, task.job)
    job.arms, job.folder = (*trials, FINETUNE), RunFolder(str(tmp_path))
    for trial, top1 in zip(trials, (0.2, 0.4), strict=True):
        job.folder.write_arm(trial.label, json.dumps({"top1": top1}))
    assert [task.learning_rate(arm, 1) for arm in job.arms] == pytest.approx([1, 3, 3])


def test_a_trial_is_measured_on_the_held_labels_without_pictures(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    job, asked = cast(Any, task.job), list[Any]()
    trial = FINETUNE._replace(tried_rate=0.1)
    job.arms, job.rows = (trial, FINETUNE), ((np.asarray([0, 2]),), (range(4),))
    job.train_shards, job.val_shards = "train", "val"

    def predict(model: nn.Module, shards: str, rows: Any) -> list[Any]:
        asked.append((shards, rows))
        return []

    task.measurer = cast(Any, SimpleNamespace(predictions=predict, example_at=print))
    picture = np.zeros((1, 1, 3), np.uint8)
    cast(Any, task.task).evaluate = lambda *_: Evaluation({"top1": 0.5}, {"p": picture}, {"t": ""})
    assert task._evaluation(trial, nn.Linear(1, 1)) == Evaluation({"top1": 0.5}, {}, {})
    ((shards, (rows,)),) = asked
    assert (shards, rows.tolist()) == ("train", [1, 3])
