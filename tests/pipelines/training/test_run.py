"""The driver that all stages share: what it asks a stage, in which order, and how a run ends."""

import signal
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from infra import tracking
from mae_core.data.samples import DataError
from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig
from pipelines.driver import CancelledError
from pipelines.outcome import ConfigError, StageResult
from pipelines.training import launch, run
from pipelines.training.protocol import Identity, Work
from pipelines.training.run import checked, drive
from pipelines.training.run_folder import RunFolder, Taken
from pipelines.training.stopping import Told


class Channel:
    def told(self) -> Told:
        return Told()

    def ask(self) -> None:
        """Nobody stops this run."""


class FakeRun:
    """A stage that opens, plans, works and finishes, and notes it."""

    stage = "fake"
    needs_ray = True

    def __init__(self, config: PretrainConfig, error: Exception | None = None) -> None:
        self.config = config
        self.error = error
        self.digest = "a"
        self.keeps = False
        self.is_whole = True
        self.said: list[str] = []

    @property
    def identity(self) -> Identity:
        return Identity(self.digest, {"data.train": self.digest}, {}, {"stage": "fake"})

    def open(self, folder: RunFolder) -> "FakeRun":
        self.said.append("open")
        return self

    def reuse(self, done: StageResult) -> StageResult | None:
        self.said.append("reuse")
        return done._replace(status="reused") if self.is_whole else None

    def plan(self) -> "FakeRun":
        self.said.append("plan")
        return self

    def work(self, taken: Taken) -> Work:
        channel: Any = Channel()
        return Work(self._do, channel, lambda: "nothing")

    def _do(self) -> None:
        self.said.append("work")
        if self.error is not None:
            raise self.error

    def is_kept(self, taken: Taken) -> bool:
        return self.keeps

    def finish(
        self, taken: Taken, earlier: StageResult | None, failure: Exception | None
    ) -> StageResult:
        self.said.append("finish" if earlier is None else "finish anew")
        status: Any = "done" if earlier is None else "evaluated"
        result = StageResult("fake", status, taken.run_id, taken.folder.uri, {})
        taken.folder.write_result(result)
        return result


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How runs ended in MLflow, which is not there; neither is Ray."""
    statuses: list[str] = []

    def start(*_: object, run_id: str | None, **more: object) -> str:
        return run_id or f"run-{len(statuses)}"

    monkeypatch.setattr(launch, "running_ray", lambda _, in_driver: nullcontext())
    monkeypatch.setattr(tracking, "start_run", start)
    monkeypatch.setattr(tracking, "end_run", lambda _uri, _run, status: statuses.append(status))
    monkeypatch.setattr(tracking, "log_artifact_text", lambda *_: None)
    return statuses


def make_run(folder: Path, *words: str, error: Exception | None = None) -> FakeRun:
    given = ["data.train=t", f"storage.root={folder}", *words]
    return FakeRun(load_config(PretrainConfig, [], given, {}), error)


def test_a_run_is_opened_planned_worked_and_finished(tmp_path: Path, ended: list[str]) -> None:
    first = make_run(tmp_path)
    result = drive(first, fresh=False)
    assert first.said == ["open", "plan", "work", "finish"]
    assert (result.status, result.run_id, ended) == ("done", "run-0", ["FINISHED"])


def test_a_run_that_is_done_is_reused_unless_fresh(tmp_path: Path) -> None:
    drive(make_run(tmp_path), fresh=False)
    again, fresh = make_run(tmp_path), make_run(tmp_path)
    assert drive(again, fresh=False).status == "reused"
    assert again.said == ["open", "reuse"]
    assert drive(fresh, fresh=True).run_id == "run-1"
    assert fresh.said == ["open", "plan", "work", "finish"]


def test_a_result_that_lacks_something_is_finished_anew_in_the_same_mlflow_run(
    tmp_path: Path,
) -> None:
    drive(make_run(tmp_path), fresh=False)
    again = make_run(tmp_path)
    again.is_whole = False
    result = drive(again, fresh=False)
    assert again.said == ["open", "reuse", "plan", "work", "finish anew"]
    assert (result.status, result.run_id) == ("evaluated", "run-0")


def test_other_data_are_refused_before_an_earlier_result_is_looked_at(tmp_path: Path) -> None:
    drive(make_run(tmp_path), fresh=False)
    changed = make_run(tmp_path)
    changed.digest = "b"
    with pytest.raises(DataError, match="changed since this run began"):
        drive(changed, fresh=False)
    assert changed.said == ["open"]


def test_a_failure_of_the_workers_is_the_runs_and_is_kept(tmp_path: Path, ended: list[str]) -> None:
    failing = make_run(tmp_path, error=DataError("a label is wrong"))
    with pytest.raises(DataError, match="a label is wrong"):
        drive(failing, fresh=False)
    assert failing.said == ["open", "plan", "work"]
    assert ended == ["FAILED"]
    (folder,) = (tmp_path / "fake").iterdir()
    assert isinstance(RunFolder(str(folder)).read_failure(), DataError)


def test_work_that_counts_is_finished_before_its_failure_is_told(
    tmp_path: Path, ended: list[str]
) -> None:
    failing = make_run(tmp_path, error=DataError("no label"))
    failing.keeps = True
    with pytest.raises(DataError, match="no label"):
        drive(failing, fresh=False)
    assert failing.said == ["open", "plan", "work", "finish"]
    assert ended == ["FINISHED"]
    assert drive(make_run(tmp_path), fresh=False).status == "reused"


def test_work_that_needs_no_ray_starts_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(launch, "running_ray")
    alone = make_run(tmp_path)
    alone.needs_ray = False
    assert drive(alone, fresh=False).status == "done"


def test_without_ray_workers_that_do_not_fit_are_refused_and_sigterm_cancels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.machine, "count_cpus", lambda: 2)
    large = make_run(tmp_path, "scaling.cpus_per_worker=3")
    large.needs_ray = False
    with pytest.raises(ConfigError, match="needs 3 CPUs, this machine has 2"):
        drive(large, fresh=False)
    stopped = make_run(tmp_path)
    stopped.needs_ray = False
    monkeypatch.setattr(stopped, "plan", lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(CancelledError, match="stopped by SIGTERM"):
        drive(stopped, fresh=False)


def test_a_path_that_is_none_is_refused_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def check(uris: Any) -> None:
        asked.extend(uris)
        raise ConfigError("stop here")

    monkeypatch.setattr(run.driver, "check_paths", check)
    given: Mapping[str, Any] = {"data.train": ("a", "b"), "data.val": None, "init_from": "c"}
    with pytest.raises(ConfigError, match="stop here"):
        checked(make_run(tmp_path).config, given)
    assert asked == [("data.train", "a"), ("data.train", "b"), ("init_from", "c")]
