"""What a run is compared with before it goes on: the data and weights of its earlier start."""

from pathlib import Path

import pytest

from infra import tracking
from mae_core.data.samples import DataError
from pipelines import job
from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig
from pipelines.training.recording import ended_in_mlflow, say_where_to_compare, take_over
from pipelines.training.run_folder import RunFolder, RunRecord, earlier_record


def started(folder: Path, inputs: dict[str, str]) -> RunFolder:
    run = RunFolder(str(folder))
    run.write_record(
        RunRecord(start="s", data_digest="a", inputs=inputs, run_id=None, config={"seed": 0})
    )
    return run


def test_the_same_inputs_go_on(tmp_path: Path) -> None:
    run = started(tmp_path, {"data.train": "1", "init_from": "2"})
    record = earlier_record(run, "a", {"data.train": "1", "init_from": "2"})
    assert record is not None
    assert record.start == "s"


@pytest.mark.parametrize("key", ["data.train", "init_from"])
def test_an_input_that_changed_is_named(tmp_path: Path, key: str) -> None:
    run = started(tmp_path, {"data.train": "1", "init_from": "2"})
    now = {"data.train": "1", "init_from": "2", key: "3"}
    with pytest.raises(DataError, match=f"changed since this run began .*now 3.*: {key}.*--fresh"):
        earlier_record(run, "a", now)


def test_another_digest_names_both(tmp_path: Path) -> None:
    run = started(tmp_path, {"data.train": "1"})
    with pytest.raises(DataError, match=r"changed since this run began \(digest a, now b\)"):
        earlier_record(run, "b", {"data.train": "2"})


def test_a_record_of_an_earlier_version_is_judged_by_its_digest(tmp_path: Path) -> None:
    run = started(tmp_path, {})
    assert earlier_record(run, "a", {"data.train": "1"}) is not None
    with pytest.raises(DataError, match="the shards or their manifest"):
        earlier_record(run, "b", {"data.train": "1"})


def test_a_run_that_mlflow_can_not_reopen_keeps_its_name_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is down when the run goes on does not make it a new run afterwards."""
    asked: list[str | None] = []

    def start(*_: object, run_id: str | None, **more: object) -> None:
        asked.append(run_id)

    monkeypatch.setattr(tracking, "start_run", start)
    record = RunRecord(start="s", data_digest="a", inputs={}, run_id="run-7", config={})
    taken = take_over(
        load_config(PretrainConfig, [], ["data.train=t"], {}),
        RunFolder(str(tmp_path)),
        digest="a",
        inputs={},
        earlier=record,
        fresh=False,
        tags={"stage": "pretrain"},
        data={},
    )
    assert asked == ["run-7"]
    assert taken.run_id is None  # nothing is recorded now
    kept = RunFolder(str(tmp_path)).read_record()
    assert kept is not None
    assert (kept.run_id, kept.start) == ("run-7", taken.start)


@pytest.mark.parametrize(("fresh", "is_kept"), [(True, False), (False, True)])
def test_only_a_fresh_start_deletes_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool, is_kept: bool
) -> None:
    monkeypatch.setattr(tracking, "start_run", lambda *_, **__: None)
    old = tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    take_over(
        load_config(PretrainConfig, [], ["data.train=t"], {}),
        RunFolder(str(tmp_path / "run")),
        digest="a",
        inputs={},
        earlier=None,
        fresh=fresh,
        tags={"stage": "pretrain"},
        data={},
    )
    assert old.exists() == is_kept


@pytest.mark.parametrize(("is_superseded", "statuses"), [(False, ["FINISHED"]), (True, [])])
def test_a_start_that_was_overtaken_leaves_the_record_in_mlflow_to_the_later_one(
    monkeypatch: pytest.MonkeyPatch, is_superseded: bool, statuses: list[str]
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(tracking, "end_run", lambda _uri, _run, status: ended.append(status))
    monkeypatch.setattr(RunFolder, "is_superseded", lambda _: is_superseded)
    with ended_in_mlflow("uri", "r1", RunFolder("/nowhere", "s"), what_is_saved=str):
        pass
    assert ended == statuses


@pytest.mark.parametrize(
    ("is_terminal", "stage", "told"),
    [
        (False, None, ["to see this run and compare it with others: open http://h:5000/#/r1"]),
        (True, None, []),  # its last line says it
        (False, "demo/pretrain", []),  # the pipeline's last line says it
    ],
)
def test_where_to_see_a_run_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_terminal: bool,
    stage: str | None,
    told: list[str],
) -> None:
    monkeypatch.setattr(tracking, "run_link", lambda _uri, run: f"#/{run}")
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    monkeypatch.delenv(job.STAGE_VARIABLE, raising=False)
    if stage is not None:
        monkeypatch.setenv(job.STAGE_VARIABLE, stage)
    caplog.set_level("INFO", "pipelines.training.recording")
    say_where_to_compare("http://h:5000", "r1")
    assert caplog.messages == told
