"""What a downstream run plans and how it brings results together, without any training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mae_core.config import ModelConfig
from mae_core.data.label_budget import LabelBudget
from mae_core.data.manifest import Manifest, ShardInfo
from mae_core.data.samples import DataError
from pipelines.config.arms import ArmKind
from pipelines.config.downstream import ClassifyConfig, DetectConfig, SegmentConfig
from pipelines.config.loading import load_config
from pipelines.downstream.arms import (
    Arm,
    arm_of_step,
    arms_table,
    held_part,
    kept_arm,
    mean_metrics,
    plan_arms,
)
from pipelines.downstream.measuring import NotMeasuredError
from pipelines.downstream.run import LabelledData, OpenedTuning, PlannedTuning
from pipelines.downstream.task import Evaluation, TaskInfo
from pipelines.downstream.tuning import TuningTask
from pipelines.outcome import ConfigError
from pipelines.training.process import Process
from pipelines.training.run_folder import RunFolder, Taken

NEEDED = ["init_from=c", "data.train=t", "data.val=v"]


def make_config(*words: str) -> ClassifyConfig:
    batch = ["optim.global_batch_size=8", "optim.micro_batch_size=8", "data.shuffle_window=8"]
    return load_config(ClassifyConfig, [], [*NEEDED, *batch, *words], {})


def make_manifest(*counts: int) -> Manifest:
    return Manifest(
        shards=tuple(
            ShardInfo(path=f"{i}.tar", index=f"{i}.npy", num_samples=n, num_bytes=100 * n)
            for i, n in enumerate(counts)
        )
    )


def make_arm(name: str, fraction: float = 1.0, seed: int = 0, steps: int = 1) -> Arm:
    return Arm(ArmKind[name.upper()], LabelBudget(fraction), seed, 10, steps, 0)


def test_arms_follow_one_another_without_a_gap() -> None:
    config = make_config(
        "classify.arms=[knn,finetune,scratch,untrained]",
        "classify.label_fraction=[1.0,0.5]",
        "classify.seeds=[0,3]",
        "optim.epochs=2",
        "optim.max_steps=6",
    )
    planned = [arm for arm, _ in plan_arms(config, make_manifest(10, 22), [0, 1] * 16)]
    assert [arm.label for arm in planned] == [
        "knn-0.5-seed0",
        "finetune-0.5-seed0",
        "scratch-0.5-seed0",
        "untrained-0.5-seed0",
        "knn-0.5-seed3",
        "finetune-0.5-seed3",
        "scratch-0.5-seed3",
        "untrained-0.5-seed3",
        "knn-1-seed0",  # once: no seed matters
        "finetune-1-seed0",
        "scratch-1-seed0",
        "untrained-1-seed0",
        "finetune-1-seed3",
        "scratch-1-seed3",
        "untrained-1-seed3",  # its weights are drawn from the seed
    ]
    assert [arm.steps for arm in planned] == [0, 4, 4, 0, 0, 4, 4, 0, 0, 6, 6, 0, 6, 6, 0]
    first_steps = [arm.first_step for arm in planned]
    assert first_steps == [0, 0, 4, 8, 8, 8, 12, 16, 16, 16, 22, 28, 28, 34, 40]


def test_an_untrained_encoder_gets_a_trained_head_where_the_task_is_dense() -> None:
    words = ["detect.arms=[frozen,untrained]", "optim.max_steps=3", "optim.micro_batch_size=8"]
    config = load_config(DetectConfig, [], [*NEEDED, *words, "optim.global_batch_size=8"], {})
    planned = [arm for arm, _ in plan_arms(config, make_manifest(32), [0] * 32)]
    assert [(arm.label, arm.steps) for arm in planned] == [
        ("frozen-1-seed0", 3),
        ("untrained-1-seed0", 3),
    ]


@pytest.mark.parametrize("config_type", [ClassifyConfig, DetectConfig, SegmentConfig])
def test_every_stage_compares_with_scratch_and_untrained_by_default(config_type: Any) -> None:
    words = ["segment.names=[a,b]"] if config_type is SegmentConfig else []
    arms = load_config(config_type, [], [*NEEDED, *words], {}).section.arms
    assert {"finetune", "scratch", "untrained"} <= set(arms)


def test_trials_of_several_rates_come_before_the_arms_of_their_share() -> None:
    words = ["classify.arms=[logistic,linear,finetune]", "classify.seeds=[0,3]"]
    config = make_config(*words, "optim.base_lr=[1e-3,4e-3]", "optim.epochs=1")
    planned = plan_arms(config, make_manifest(40), [0, 1] * 20)
    assert [(arm.label, arm.num_samples, arm.steps) for arm, _ in planned] == [
        ("finetune-1-seed0-lr0.001", 32, 4),
        ("finetune-1-seed0-lr0.004", 32, 4),
        ("finetune-1-seed3-lr0.001", 32, 4),
        ("finetune-1-seed3-lr0.004", 32, 4),
        ("logistic-1-seed0", 40, 0),
        ("linear-1-seed0", 40, 5),
        ("finetune-1-seed0", 40, 5),
        ("linear-1-seed3", 40, 5),
        ("finetune-1-seed3", 40, 5),
    ]
    same, also, other = (set(planned[i][1][0].tolist()) for i in (0, 1, 2))
    assert same == also != other
    assert sum(row % 2 for row in same) == 16  # a fifth of each class is held


@pytest.mark.parametrize(("sizes", "held"), [((10, 4), (2, 1)), ((5, 1), (1, 0)), ((2, 2), (1, 1))])
def test_a_fifth_of_each_class_is_held_and_the_only_sample_of_a_class_is_not(
    sizes: tuple[int, int], held: tuple[int, int]
) -> None:
    strata = ["a"] * sizes[0] + ["b"] * sizes[1]
    found = held_part(strata, np.arange(sum(sizes)), seed=0)
    assert [strata[i] for i in found].count("a") == held[0]
    assert [strata[i] for i in found].count("b") == held[1]


def test_rates_need_labels_to_be_chosen_on() -> None:
    with pytest.raises(ConfigError, match=r"base_lr lists several rates.*give one rate"):
        held_part(["a", "b"], np.arange(2), seed=0)


def test_a_share_of_the_labels_is_cut_into_rows_of_each_shard() -> None:
    config = make_config("classify.arms=[finetune]", "classify.label_fraction=[0.5]")
    ((arm, rows),) = plan_arms(config, make_manifest(3, 0, 9), ["a"] * 6 + ["b"] * 6)
    assert arm.num_samples == 6
    assert [len(part) for part in rows][1] == 0
    chosen = [*np.asarray(rows[0]), *(np.asarray(rows[2]) + 3)]
    assert sum(place < 6 for place in chosen) == 3
    assert max(rows[2]) < 9


def test_too_few_samples_for_a_batch_are_refused_with_both_numbers() -> None:
    config = make_config("classify.arms=[finetune]", "optim.epochs=1")
    with pytest.raises(ConfigError, match=r"epochs=1 of 5 labelled samples is less than one"):
        plan_arms(config, make_manifest(5), [0] * 5)


def test_metrics_are_means_over_seeds_with_their_deviation() -> None:
    found = {make_arm("finetune", seed=i): {"top1": value} for i, value in enumerate([0.1, 0.3])}
    assert mean_metrics(found) == pytest.approx(
        {"finetune/top1": 0.2, "finetune/top1_std": 0.1414213562}
    )


def test_several_shares_are_told_apart_by_name() -> None:
    found = {make_arm("knn", fraction): {"top1": fraction} for fraction in (0.01, 1.0)}
    assert mean_metrics(found) == {"knn-0.01/top1": 0.01, "knn-1/top1": 1.0}


def test_few_shot_arms_train_on_so_many_of_each_class() -> None:
    config = make_config("classify.arms=[finetune]", "classify.labels_per_class=[5,1]")
    planned = plan_arms(config, make_manifest(6, 14), ["cat"] * 10 + ["dog"] * 7 + ["fox"] * 3)
    assert [arm.label for arm, _ in planned] == ["finetune-1shot-seed0", "finetune-5shot-seed0"]
    assert [arm.num_samples for arm, _ in planned] == [3, 13]


@pytest.mark.parametrize("counts", ["[0]", "[5,5]", "[-1]"])
def test_a_number_of_labels_that_cannot_be_meant_is_a_config_error(counts: str) -> None:
    with pytest.raises(ConfigError, match=r"labels_per_class=.*give different numbers from 1 on"):
        make_config(f"classify.labels_per_class={counts}")


def test_the_table_has_a_row_for_each_arm_and_share() -> None:
    found = {
        make_arm("finetune", seed=0): {"ap": 0.5, "ap50": 0.75},
        make_arm("finetune", seed=1): {"ap": 0.7, "ap50": 0.75},
        make_arm("scratch"): {"ap": 0.25},
    }
    assert arms_table(found).splitlines() == [
        "| arm | labels | ap | ap50 |",
        "|---|---|---|---|",
        "| finetune | 100 % | 0.600 ± 0.141 | 0.750 ± 0.000 |",
        "| scratch | 100 % | 0.250 |  |",
    ]


def test_each_step_is_of_the_arm_that_trains_it() -> None:
    arms = [
        Arm(ArmKind.KNN, LabelBudget(1.0), 0, 10, 0, 0),
        Arm(ArmKind.FINETUNE, LabelBudget(1.0), 0, 10, 3, 0),
        Arm(ArmKind.LOGISTIC, LabelBudget(1.0), 0, 10, 0, 3),
        Arm(ArmKind.SCRATCH, LabelBudget(1.0), 0, 10, 2, 3),
    ]
    names = [arm_of_step(arms, step).kind for step in range(1, 6)]
    assert names == ["finetune", "finetune", "finetune", "scratch", "scratch"]


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["knn", "linear", "finetune", "scratch"], "finetune"),
        (["scratch", "frozen"], "frozen"),
        (["untrained", "scratch"], "scratch"),
    ],
)
def test_the_output_is_the_fine_tuned_model_if_there_is_one(names: list[str], kept: str) -> None:
    arms = [make_arm(name, steps=0 if name == "knn" else 1) for name in names]
    found = kept_arm(arms)
    assert found is not None
    assert found.kind == kept
    assert kept_arm([make_arm("knn", steps=0)]) is None


def test_the_output_is_of_the_largest_share_of_the_labels() -> None:
    arms = [make_arm("finetune", share) for share in (0.1, 1.0, 0.5)]
    found = kept_arm([*arms, make_arm("scratch", 1.0)])
    assert found is not None
    assert found.label == "finetune-1-seed0"


@pytest.mark.parametrize(
    ("config_type", "words", "message"),
    [
        (ClassifyConfig, ["classify.label_fraction=[0.1,1.5]"], "must be above 0, at most 1"),
        (ClassifyConfig, ["classify.seeds=[1,1]"], "give different numbers"),
        (
            ClassifyConfig,
            ["classify.labels=many", "classify.arms=[knn]"],
            "the arm knn needs labels=one",
        ),
        (
            ClassifyConfig,
            ["optim.micro_batch_size=48", "optim.global_batch_size=64"],
            "is not a multiple of",
        ),
        (ClassifyConfig, ["classify.arms=[finetun]"], "Input should be"),
        (ClassifyConfig, ["optim.base_lr=[1e-3,1e-3]"], "each only once"),
        (ClassifyConfig, ["optim.base_lr=[]"], "give at least one rate"),
        (ClassifyConfig, ["optim.base_lr=[1e-3,-1]"], "should be greater than 0"),
        (DetectConfig, ["detect.hed=fcos"], "did you mean detect.head"),
        (SegmentConfig, ["segment.head=fpn"], "segment.names is needed"),
        (
            SegmentConfig,
            ["segment.names=[a,b]", "segment.class_weights=[1]"],
            "class_weights=.*1 for 2 classes",
        ),
    ],
)
def test_a_mistake_in_a_config_is_told(config_type: Any, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_type, [], [*NEEDED, *words], {})


def test_batches_that_were_not_set_fit_the_one_that_was() -> None:
    config = load_config(ClassifyConfig, [], [*NEEDED, "optim.micro_batch_size=48"], {})
    assert (config.optim.global_batch_size, config.data.shuffle_window) == (1056, 1056)


def test_where_it_runs_is_not_what_it_is() -> None:
    name = make_config().run_name
    assert make_config("scaling.num_workers=1", "checkpoint.every_steps=7").run_name == name
    assert make_config("classify.seeds=[1]").run_name != name
    assert make_config("init_from=other").run_name != name


@pytest.mark.parametrize(
    ("words", "is_another_run"),
    [
        (["classify.arms=[finetune]", "optim.drop_path_rate=0"], False),
        (["classify.arms=[finetune]", "optim.drop_path_rate=0.1"], True),
        (["classify.arms=[logistic]", "optim.drop_path_rate=0.1"], False),
        (["classify.arms=[linear]", "optim.drop_path_rate=0"], True),
    ],
)
def test_the_split_of_a_batch_is_part_of_a_run_whose_result_depends_on_it(
    words: list[str], is_another_run: bool
) -> None:
    name = make_config(*words).run_name
    assert (make_config(*words, "optim.micro_batch_size=4").run_name != name) is is_another_run
    two_workers = ("optim.micro_batch_size=4", "scaling.num_workers=2")
    one_worker = make_config(*words, "optim.micro_batch_size=4").run_name
    assert (make_config(*words, *two_workers).run_name != one_worker) is is_another_run


def test_pairs_that_are_mixed_stay_in_one_micro_batch() -> None:
    with pytest.raises(ConfigError, match="micro_batch_size=1 is odd, but mixup and CutMix"):
        make_config("optim.micro_batch_size=1")
    make_config("optim.micro_batch_size=1", "classify.mixup=0", "classify.cutmix=0")
    make_config("optim.micro_batch_size=1", "classify.arms=[logistic]")
    config = load_config(ClassifyConfig, [], [*NEEDED, "optim.global_batch_size=70"], {})
    assert config.optim.micro_batch_size == 14  # 35 would fit, and part a pair


class StubMeasurer:
    """Fails to measure one model, as if too few of its images could be decoded."""

    def __init__(self, failing: object) -> None:
        self.failing = failing

    def predictions(self, model: object, *place: object) -> list[object]:
        if model is self.failing:
            raise NotMeasuredError("a.tar: none of the images can be decoded")
        return []

    def features(self, model: object, weights: object, *place: object) -> list[object]:
        return self.predictions(model, *place)

    def example_at(self) -> None:
        """Nothing is drawn."""


def worker_of(folder: RunFolder, failing: object, evaluate: Any) -> Any:
    """A worker that has trained, without Ray."""
    worker: Any = object.__new__(TuningTask)
    worker.job = SimpleNamespace(folder=folder, arms=[], val_shards=(), train_shards=(), rows=())
    worker.process = Process(0, 1, torch.device("cpu"), lambda *_: None, Path)
    worker.measurer = StubMeasurer(failing)
    worker.task = SimpleNamespace(evaluate=evaluate)
    return worker


def test_an_arm_that_can_not_be_measured_costs_the_others_nothing(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    bad, good = make_arm("knn", seed=1, steps=0), make_arm("knn", seed=2, steps=0)
    models = {bad: torch.nn.Linear(1, 1), good: torch.nn.Linear(1, 1)}
    worker = worker_of(folder, models[bad], lambda *_: Evaluation({"top1": 0.5}, {}, {}))
    worker.job.arms, worker.job.rows = [bad, good], ((), ())
    for arm, model in models.items():
        worker.measure(arm, model)
    assert folder.read_arm_failure(bad.label) == "a.tar: none of the images can be decoded"
    assert not folder.has_arm(bad.label)
    assert folder.read_arm(good.label) == {"top1": 0.5}

    kind: Any = SimpleNamespace(summarize=lambda *_: Evaluation({}, {}, {"summary.md": "| knn |"}))
    nothing: Any = None
    opened = OpenedTuning(make_config(), kind, folder, nothing, nothing, nothing)
    planned = PlannedTuning(opened, TaskInfo(nothing, ("a", "b"), "t"), [(bad, ()), (good, ())])
    with pytest.raises(DataError, match=r"1 of 2 arms could not be measured.* knn-1-seed1: a\.tar"):
        planned.finish(Taken(folder, None), None, None)
    assert (tmp_path / "summary.md").read_text() == "| knn |"
    assert folder.read_result() is None  # The same command measures the other one again.


def test_what_was_left_out_is_counted_in_the_result(tmp_path: Path) -> None:
    folder, arm = RunFolder(str(tmp_path)), make_arm("knn", steps=0)
    folder.write_arm(arm.label, '{"top1": 0.5}')
    folder.add_bad_samples([{"shard": "a.tar", "key": k, "kind": "empty"} for k in ("x", "y")])
    kind: Any = SimpleNamespace(summarize=lambda *_: Evaluation({}, {}, {"summary.md": ""}))
    nothing: Any = None
    opened = OpenedTuning(make_config(), kind, folder, nothing, nothing, nothing)
    planned = PlannedTuning(opened, TaskInfo(nothing, ("a", "b"), "t"), [(arm, ())])
    assert planned.finish(Taken(folder, None), None, None).metrics["data/left_out"] == 2


def test_other_weights_of_the_encoder_are_other_inputs() -> None:
    train: Any = SimpleNamespace(digest="a" * 64)
    val: Any = SimpleNamespace(digest="b" * 64)
    digests = []
    for sha256 in ("c" * 64, "d" * 64):
        encoder: Any = SimpleNamespace(files={"model.safetensors": SimpleNamespace(sha256=sha256)})
        digests.append(LabelledData(train, val).digest(encoder))
    assert digests == [
        "aaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb-cccccccccccccccc",
        "aaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb-dddddddddddddddd",
    ]


@pytest.mark.parametrize(
    ("encoder", "split"),
    [
        ("vit_nano", {}),
        ("resnet18", {"optim.micro_batch_size": "4", "scaling.num_workers": "2"}),
    ],
)
def test_the_split_of_a_batch_is_an_input_if_the_encoder_has_batch_norms(
    encoder: Any, split: dict[str, str]
) -> None:
    words = ("optim.micro_batch_size=4", "scaling.num_workers=2")
    manifest: Any = SimpleNamespace(model=ModelConfig(encoder=encoder, img_size=(32, 32)))
    nothing: Any = None
    opened = OpenedTuning(make_config(*words), nothing, nothing, nothing, nothing, manifest)
    assert opened._split == split


def test_an_arm_that_is_measured_at_last_is_no_failure_any_more(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.write_arm_failure("knn-1-seed0", "why")
    folder.write_arm("knn-1-seed0", "{}")
    assert folder.read_arm_failure("knn-1-seed0") is None


def test_scores_that_can_not_be_computed_are_a_failure_of_their_arm(tmp_path: Path) -> None:
    def evaluate(*_: object) -> Evaluation:
        raise ValueError("too few images to choose a penalty")

    folder = RunFolder(str(tmp_path))
    arm = make_arm("logistic", steps=0)
    worker = worker_of(folder, None, evaluate)
    worker.job.arms, worker.job.rows = [arm], ((),)
    worker.measure(arm, torch.nn.Linear(1, 1))
    assert folder.read_arm_failure(arm.label) == "too few images to choose a penalty"
