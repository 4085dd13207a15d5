"""Which stage runs, which is reused, and why: keys, files in the store, runs in MLflow."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from infra import tracking
from infra.config import StorageConfig, TrackingConfig
from infra.mlflow_client import client_of
from mae_core.config import StrictConfig
from pipelines.chain import plan as chain_plan
from pipelines.chain.attempt import reuse
from pipelines.chain.config import Chain, ChainConfig, Stage, StageSpec, dotted
from pipelines.chain.execute import Action
from pipelines.chain.kinds import KINDS, StageKind
from pipelines.chain.plan import (
    Forced,
    Planned,
    key_parts,
    mermaid_graph,
    plan_chain,
    plan_table,
    text_graph,
)
from pipelines.config.downstream import ClassifyConfig, DetectConfig, SegmentConfig
from pipelines.config.embed import EmbedConfig
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.config.validate import ValidateConfig
from pipelines.outcome import ConfigError, StageResult
from tests.pipelines.shard_sets import shard_set

UNSPLIT = {"drop_path_rate": 0}  # so that the split of a batch changes nothing
CONFIGS: dict[str, StrictConfig] = {
    "prepare": PrepareConfig.model_validate({"source": "/a", "output": "/b"}),
    "validate": ValidateConfig.model_validate({"data": "/a"}),
    "pretrain": PretrainConfig.model_validate({"data": {"train": "/a"}}),
    "classify": ClassifyConfig.model_validate(
        {"init_from": "/c", "data": {"train": "/a", "val": "/b"}, "optim": UNSPLIT}
    ),
    "detect": DetectConfig.model_validate(
        {"init_from": "/c", "data": {"train": "/a", "val": "/b"}, "optim": UNSPLIT}
    ),
    "segment": SegmentConfig.model_validate(
        {
            "init_from": "/c",
            "data": {"train": "/a", "val": "/b"},
            "optim": UNSPLIT,
            "segment": {"masks": "instances"},
        }
    ),
    "embed": EmbedConfig.model_validate({"init_from": "/c", "data": "/a"}),
}
SCALING = ("num_workers", "use_gpu", "cpus_per_worker", "max_failures")
EVERYWHERE = {
    "name",
    *(f"scaling.{key}" for key in SCALING),
    "storage.root",
    "tracking.uri",
    "tracking.experiment",
    "tracking.parent_run_id",
}
SAVING = {"checkpoint.every_minutes", "checkpoint.grace_s"}
TRAINING = {
    "checkpoint.every_steps",
    "checkpoint.keep",
    "debug.sample_trace",
    "scaling.checkpoint_activations",
    *SAVING,
}
TUNING = {
    *EVERYWHERE,
    *TRAINING,
    "reporting.every_steps",
    "optim.micro_batch_size",
    "data.max_bad_ratio",
}
HITS: dict[str, set[str]] = {
    "prepare": {"output", "workers", "max_bad_ratio"},
    "validate": {"name", "storage.root", "workers"},
    "pretrain": {
        *EVERYWHERE,
        *TRAINING,
        "reporting.every_steps",
        "reporting.picture_every_steps",
        "optim.micro_batch_size",
        "optim.compile",
        "checkpoint.keep_best",
        "data.decode",
        "data.max_bad_ratio",
    },
    "classify": TUNING,
    "detect": TUNING,
    "segment": TUNING,
    "embed": {*EVERYWHERE, *SAVING, "batch_size", "max_bad_ratio", "query", "num_neighbours"},
}
FIELDS = [(name, key) for name, config in CONFIGS.items() for key, _ in dotted(config.model_dump())]


def with_value(config: StrictConfig, key: str, value: Any) -> StrictConfig:
    """Return a copy with another value, whether it is valid or not."""
    first, _, rest = key.partition(".")
    inner = getattr(config, first, None)
    new = with_value(inner, rest, value) if rest and isinstance(inner, StrictConfig) else value
    if rest and not isinstance(inner, StrictConfig):  # infra's models, which are no StrictConfig
        assert inner is not None
        new = inner.model_copy(update={rest: value})
    return config.model_copy(update={first: new})


def key_of(name: str, config: StrictConfig) -> str:
    stage = Stage(name, StageSpec(), name, KINDS[name], config)
    with warnings.catch_warnings():  # of values of another type than the field's
        warnings.simplefilter("ignore")
        return key_parts(stage, {}).key


@pytest.fixture
def found_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_plan, "fingerprint", lambda value, by_time: str(value))


@pytest.mark.usefixtures("found_data")
@pytest.mark.parametrize(("name", "key"), FIELDS)
def test_a_field_is_a_miss_unless_it_says_how_or_where(name: str, key: str) -> None:
    before, after = CONFIGS[name], with_value(CONFIGS[name], key, "something else")
    is_hit = key_of(name, before) == key_of(name, after)
    assert is_hit == (key in HITS[name])


@pytest.mark.usefixtures("found_data")
@pytest.mark.parametrize("key", ["optim.micro_batch_size", "scaling.num_workers"])
def test_the_split_of_a_batch_is_a_miss_where_the_result_depends_on_it(key: str) -> None:
    before = with_value(CONFIGS["classify"], "optim.drop_path_rate", 0.1)
    assert key_of("classify", before) != key_of("classify", with_value(before, key, 3))


def test_each_field_that_is_a_hit_is_there() -> None:
    assert {(n, k) for n, keys in HITS.items() for k in keys} <= set(FIELDS)


def test_resources_of_the_file_do_not_matter() -> None:
    config = ValidateConfig.model_validate({"data": "{x}"})
    specs = [StageSpec(), StageSpec(cpus=3, gpus=1, retries=9, timeout_s=1.0)]
    stages = [Stage("v", spec, "validate", KINDS["validate"], config) for spec in specs]
    assert len({key_parts(stage, {"x": "0" * 16}).key for stage in stages}) == 1


def test_a_gate_is_waited_for_and_no_part_of_the_result() -> None:
    config = ValidateConfig.model_validate({"data": "{x}"})
    stage = Stage("v", StageSpec(needs=("gate",)), "validate", KINDS["validate"], config)
    assert stage.node.needs == ("gate", "x")
    keys = [key_parts(stage, {"x": "0" * 16, "gate": gate * 16}).key for gate in "12"]
    assert keys[0] == keys[1]
    assert key_parts(stage, {"x": "1" * 16, "gate": "1" * 16}).key != keys[0]


def test_code_counts(monkeypatch: pytest.MonkeyPatch, found_data: None) -> None:
    before = key_of("embed", CONFIGS["embed"])
    monkeypatch.setattr(chain_plan, "code_digests", lambda modules: dict.fromkeys(modules, "new"))
    assert key_of("embed", CONFIGS["embed"]) != before


def test_data_counts_and_not_where_it_lies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "s.tar").write_bytes(b"x" * 10)
        shard = {"path": "s.tar", "index": "i", "num_samples": 1, "num_bytes": 10, "sha256": "ff"}
        (folder / "manifest.json").write_text(json.dumps({"version": 1, "shards": [shard]}))
    places = [str(tmp_path / "a"), str(tmp_path / "b")]
    configs = [EmbedConfig.model_validate({"init_from": "{m}", "data": p}) for p in places]
    stages = [Stage("e", StageSpec(), "embed", KINDS["embed"], config) for config in configs]
    keys = [key_parts(stage, {"m": "0" * 16}).key for stage in stages]
    assert keys[0] == keys[1]
    (tmp_path / "b/s.tar").write_bytes(b"x" * 11)
    assert key_parts(stages[1], {"m": "0" * 16}).key != keys[0]


def test_data_beside_the_output_of_a_stage_counts(tmp_path: Path) -> None:
    folder = shard_set(tmp_path / "a")
    config = ValidateConfig.model_validate({"data": ["{x}/train", str(folder)]})
    stage = Stage("v", StageSpec(), "validate", KINDS["validate"], config)
    before = key_parts(stage, {"x": "0" * 16})
    assert before.inputs
    (folder / "s.tar").write_bytes(b"x" * 11)
    assert key_parts(stage, {"x": "0" * 16}).key != before.key
    assert key_parts(stage, {"x": "1" * 16}).inputs == key_parts(stage, {"x": "0" * 16}).inputs


def test_shards_that_are_indexed_in_place_are_what_is_read(tmp_path: Path) -> None:
    keys = set()
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "s.tar").write_bytes(b"x" * (10 + ord(name)))
        config = PrepareConfig.model_validate({"existing": "index", "output": str(folder)})
        keys.add(key_of("prepare", config))
    assert len(keys) == 2


# A chain of two stages, `first` and `second`, whose results are written by hand.


class Own(StrictConfig):
    number: int = 1
    take: str = ""


KIND = StageKind(Own, "", (), ())


@pytest.fixture
def make_chain(tmp_path: Path, store_uri: str) -> Callable[..., Chain]:
    def make(number: int = 1, second: int = 1) -> Chain:
        config = ChainConfig(
            name="c",
            stages={"first": StageSpec(), "second": StageSpec()},
            storage=StorageConfig(root=str(tmp_path / "runs")),
            tracking=TrackingConfig(uri=store_uri, experiment="c"),
        )
        stages = (
            Stage("first", StageSpec(), "first", KIND, Own(number=number)),
            Stage("second", StageSpec(), "second", KIND, Own(number=second, take="{first}")),
        )
        return Chain(config, stages)

    return make


def finish(chain: Chain, plans: list[Planned]) -> None:
    """Write results as if each stage had run."""
    for plan in plans:
        track = chain.config.tracking
        run_id = tracking.start_run(track, run_name="r", params={}, tags={}, run_id=None)
        tracking.end_run(track.uri, run_id, "FINISHED")
        folder = Path(plan.folder.uri)
        folder.mkdir(parents=True)
        (folder / "out").mkdir()
        (folder / "out/result.txt").write_text("12345")
        plan.folder.write_parts(plan.parts)
        done = StageResult("x", "done", run_id, f"{folder}/out", {"score": 0.5})
        plan.folder.commit(done, seconds=10.0, steps=5)


def decisions(
    chain: Chain,
    forced: Forced = Forced(),  # noqa: B008  # a NamedTuple does not change
) -> dict[str, tuple[Action, str]]:
    return {
        plan.stage.name: (plan.decision.action, plan.decision.why)
        for plan in plan_chain(chain, forced)
    }


RUN, REUSE = Action.RUN, Action.REUSE


@pytest.fixture
def finished(make_chain: Callable[..., Chain]) -> Chain:
    chain = make_chain()
    assert decisions(chain) == {
        "first": (RUN, "no earlier result"),
        "second": (RUN, "no earlier result"),
    }
    finish(chain, plan_chain(chain, Forced()))
    return chain


def test_what_is_finished_is_reused(finished: Chain) -> None:
    plans = plan_chain(finished, Forced())
    assert [plan.decision.action for plan in plans] == [REUSE, REUSE]
    assert plans[0].output == f"{plans[0].folder.uri}/out"


def test_a_leaf_that_changed_runs_alone(finished: Chain, make_chain: Callable[..., Chain]) -> None:
    found = decisions(make_chain(second=2))
    assert found["first"][0] is REUSE
    assert found["second"] == (RUN, "config number 1 -> 2")


def test_what_changed_takes_along_all_after_it(
    finished: Chain, make_chain: Callable[..., Chain]
) -> None:
    assert decisions(make_chain(number=2)) == {
        "first": (RUN, "config number 1 -> 2"),
        "second": (RUN, "first changed"),
    }


def test_the_nearest_earlier_result_is_the_one_compared_with(
    finished: Chain, make_chain: Callable[..., Chain]
) -> None:
    other = make_chain(number=5, second=5)
    finish(other, plan_chain(other, Forced()))
    # Of the first, `second` differs in one part; of the other, in two.
    assert decisions(make_chain(second=3))["second"] == (RUN, "config number 1 -> 3")


def damage(file: Path, how: str) -> None:
    if how == "gone":
        file.unlink()
    else:
        file.write_text("123")


@pytest.mark.parametrize(
    ("how", "why"),
    [("gone", "out/result.txt is gone"), ("cut", "out/result.txt has 3 bytes, not 5")],
)
def test_a_result_whose_files_changed_is_no_hit(finished: Chain, how: str, why: str) -> None:
    plan = plan_chain(finished, Forced())[0]
    damage(Path(plan.folder.uri) / "out/result.txt", how)
    again = plan_chain(finished, Forced())
    assert again[0].decision == (RUN, f"output changed: {why}", True)
    # What came of the same result stays: it is made again, bit for bit.
    assert again[1].decision.action is REUSE


def test_files_outside_of_the_folder_count_too(tmp_path: Path, finished: Chain) -> None:
    plan = plan_chain(finished, Forced())[0]
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "a.bin").write_text("1")
    done = plan.folder.commit(
        StageResult("x", "done", plan.done.run_id if plan.done else None, str(outside), {}),
        seconds=1.0,
    )
    assert plan.folder.output(done) == str(outside)
    assert plan.folder.problem(done) is None
    (outside / "a.bin").unlink()
    assert plan.folder.problem(done) == f"{outside}/a.bin is gone"


def test_a_result_may_be_moved_with_its_store(
    tmp_path: Path, finished: Chain, make_chain: Callable[..., Chain]
) -> None:
    (tmp_path / "runs").rename(tmp_path / "moved")
    config = finished.config.model_copy(
        update={"storage": StorageConfig(root=str(tmp_path / "moved"))}
    )
    moved = Chain(config, finished.stages)
    plans = plan_chain(moved, Forced())
    assert [plan.decision.action for plan in plans] == [REUSE, REUSE]
    assert plans[0].output is not None
    assert plans[0].output.startswith(str(tmp_path / "moved"))


def test_what_was_started_goes_on(finished: Chain) -> None:
    plan = plan_chain(finished, Forced())[1]
    Path(plan.folder.uri, "done.json").unlink()
    assert decisions(finished)["second"] == (Action.RESUME, "was started and not finished")


def test_a_damaged_marker_is_none(finished: Chain) -> None:
    plan = plan_chain(finished, Forced())[1]
    Path(plan.folder.uri, "done.json").write_text("{")
    assert decisions(finished)["second"][0] is Action.RESUME


@pytest.mark.parametrize("status", ["FAILED", "KILLED", "RUNNING"])
def test_a_committed_result_outlives_what_mlflow_missed(finished: Chain, status: Any) -> None:
    """Test that a server that was down at the end of a run does not cost hours of training."""
    plan = plan_chain(finished, Forced())[0]
    assert plan.done is not None
    uri = finished.config.tracking.uri
    client_of(uri).update_run(plan.done.run_id, status=status)
    again = plan_chain(finished, Forced())[0]
    assert again.decision.action is Action.REBUILD
    assert again.decision.why == f"result exists, its run is {status} in MLflow: corrected"
    result = reuse(again, finished.config.tracking)
    assert result.run_id == plan.done.run_id
    assert tracking.run_status(uri, plan.done.run_id) == "FINISHED"
    assert plan_chain(finished, Forced())[0].decision.action is REUSE


def with_tracking(chain: Chain, uri: str) -> Chain:
    track = chain.config.tracking.model_copy(update={"uri": uri})
    return Chain(chain.config.model_copy(update={"tracking": track}), chain.stages)


def test_a_lost_mlflow_is_written_anew_from_the_store(tmp_path: Path, finished: Chain) -> None:
    chain = with_tracking(finished, f"sqlite:///{tmp_path}/empty.db")
    plans = plan_chain(chain, Forced())
    assert [plan.decision.action for plan in plans] == [Action.REBUILD] * 2
    results = [reuse(plan, chain.config.tracking) for plan in plans]
    run = MlflowClient(chain.config.tracking.uri).get_run(str(results[0].run_id))
    assert run.data.metrics == {"score": 0.5}
    assert run.info.status == "FINISHED"
    assert [plan.decision.action for plan in plan_chain(chain, Forced())] == [REUSE] * 2


def test_mlflow_alone_is_no_result(tmp_path: Path, finished: Chain) -> None:
    (tmp_path / "runs").rename(tmp_path / "lost")
    assert decisions(finished)["first"] == (RUN, "no earlier result")


def test_a_server_that_is_down_does_not_cost_the_results(finished: Chain) -> None:
    chain = with_tracking(finished, "http://127.0.0.1:9")
    assert {action for action, _ in decisions(chain).values()} == {REUSE}


def test_force_from_and_only(finished: Chain, make_chain: Callable[..., Chain]) -> None:
    force = Forced.of(finished, ["first"], [], None)
    assert {n: a for n, (a, _) in decisions(finished, force).items()} == {
        "first": RUN,
        "second": REUSE,
    }
    assert plan_chain(finished, force)[0].decision.fresh
    start = Forced.of(finished, [], ["first"], None)
    assert {a for a, _ in decisions(finished, start).values()} == {RUN}
    changed = make_chain(number=2)
    only = Forced.of(changed, [], [], "first")
    assert {n: p.decision.action for n, p in zip("ab", plan_chain(changed, only), strict=True)} == {
        "a": RUN,
        "b": RUN,
    }
    with pytest.raises(ConfigError, match="--only second: needs first, which is not there"):
        plan_chain(changed, Forced.of(changed, [], [], "second"))
    with pytest.raises(ConfigError, match="no stage 'third'; the stages are first, second"):
        Forced.of(finished, ["third"], [], None)


def test_the_name_of_a_swept_stage_means_all_its_points(make_chain: Callable[..., Chain]) -> None:
    chain = make_chain()
    first, second = chain.stages
    points = [replace(second, name=f"second@number={n}") for n in (1, 2)]
    swept = Chain(chain.config, (first, *points))
    assert Forced.of(swept, ["second"], [], None).stages == {p.name for p in points}
    assert Forced.of(swept, [], ["second@number=1"], None).stages == {"second@number=1"}
    assert Forced.of(swept, [], [], "second@number=2").only == "second@number=2"
    with pytest.raises(ConfigError, match="choose one of second@number=1, second@number=2"):
        Forced.of(swept, [], [], "second")


def test_another_torch_is_noted_and_no_reason_to_run(
    finished: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_chain(finished, Forced())[0]
    assert plan.done is not None
    plan.folder.write_done(plan.done.model_copy(update={"made_with": {"torch": "1.0"}}))
    monkeypatch.setattr(chain_plan, "versions", lambda: {"torch": "2.0"})
    again = plan_chain(finished, Forced())[0]
    assert again.decision.action is REUSE
    assert again.notes == ("was made with torch 1.0, now 2.0",)


def test_the_table_says_what_is_expected_from_what_was(
    finished: Chain, make_chain: Callable[..., Chain]
) -> None:
    table = plan_table(plan_chain(make_chain(second=2), Forced()))
    lines = table.splitlines()
    assert lines[1].split() == ["first", "reuse", "nothing", "changed"]
    assert "config number 1 -> 2" in lines[2]
    assert "0m10s" in lines[2]
    assert "5 B" in lines[2]


def test_before_the_first_run_the_table_has_no_empty_columns(
    make_chain: Callable[..., Chain],
) -> None:
    first, *lines = plan_table(plan_chain(make_chain(), Forced())).splitlines()
    assert first.split() == ["stage", "why"]
    assert lines[0].split() == ["first", "run", "no", "earlier", "result"]


def test_the_graph_in_text_and_as_mermaid(finished: Chain) -> None:
    assert text_graph(finished) == "first\n└─ second"
    assert mermaid_graph(finished, {"first": "run"}) == (
        'graph LR\n  s0["first<br/>run"]\n  s1["second"]\n  s0 --> s1\n'
    )
