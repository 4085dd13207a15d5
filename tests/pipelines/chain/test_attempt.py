"""What an attempt of a stage deletes, reuses and continues, tested without processes."""

from pathlib import Path
from typing import Any

import pytest

from infra.config import StorageConfig, TrackingConfig
from infra.storage import StorageError
from mae_core.config import StrictConfig
from pipelines.chain import attempt as stage_try
from pipelines.chain.attempt import StageTry
from pipelines.chain.config import Chain, ChainConfig, Stage, StageSpec
from pipelines.chain.execute import Failure
from pipelines.chain.kinds import StageKind
from pipelines.chain.plan import Forced, Planned, plan_chain
from pipelines.outcome import StageResult


class Own(StrictConfig):
    number: int = 1


KIND = StageKind(Own, "", (), ())


class Process:
    """Records the words that it was started with, and runs for ever."""

    started: list[list[str]]
    peak_bytes = 0

    def __init__(self, _name: str, words: list[str]) -> None:
        self.started.append(words)

    def poll(self) -> None:
        return None


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    monkeypatch.setattr(Process, "started", [], raising=False)
    monkeypatch.setattr(stage_try, "StageProcess", Process)
    return Process.started


@pytest.fixture
def chain(tmp_path: Path, store_uri: str) -> Chain:
    config = ChainConfig(
        name="c",
        stages={"a": StageSpec()},
        storage=StorageConfig(root=str(tmp_path / "runs")),
        tracking=TrackingConfig(uri=store_uri, experiment="c"),
    )
    return Chain(config, (Stage("a", StageSpec(), "a", KIND, Own()),))


def plan(chain: Chain, *force: str) -> Planned:
    return plan_chain(chain, Forced.of(chain, force, [], None))[0]


def finish(planned: Planned) -> Path:
    """Write files as if the stage had run; return the file of its result."""
    out = Path(planned.folder.uri) / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out / "weights").write_text("12345")
    planned.folder.write_parts(planned.parts)
    planned.folder.commit(StageResult("a", "done", None, str(out), {}), seconds=1.0)
    return out / "weights"


def begin(chain: Chain, planned: Planned, workspace: Path) -> StageResult | Failure | None:
    tried = StageTry(planned, {}, chain.config.tracking, "/pipeline", workspace)
    try:
        return tried.poll()
    finally:
        tried._held.close()


def test_a_forced_stage_begins_from_nothing_and_its_second_try_goes_on(
    chain: Chain, tmp_path: Path, started: list[list[str]]
) -> None:
    weights = finish(plan(chain))
    forced = plan(chain, "a")
    assert begin(chain, forced, tmp_path) is None
    assert not weights.exists()
    weights.parent.mkdir()
    weights.write_text("half")
    assert begin(chain, forced, tmp_path) is None
    assert weights.read_text() == "half"
    assert ["--fresh" in words for words in started] == [True, False]


def test_a_try_that_could_not_begin_leaves_the_deleting_to_the_next(
    chain: Chain, tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = finish(plan(chain))
    forced = plan(chain, "a")

    def refuse(*_: Any) -> None:
        raise StorageError("NETWORK_CONNECTION")

    with monkeypatch.context() as patch:
        patch.setattr(stage_try, "lease", refuse)
        failed = begin(chain, forced, tmp_path)
    assert isinstance(failed, Failure)
    assert failed.can_pass
    assert weights.exists()
    assert begin(chain, forced, tmp_path) is None
    assert not weights.exists(), "forced, and yet the old result was taken"
    assert "--fresh" in started[0]


def test_a_result_that_another_made_since_is_taken(
    chain: Chain, tmp_path: Path, started: list[list[str]]
) -> None:
    planned, forced = plan(chain), plan(chain, "a")
    weights = finish(planned)
    for each in (planned, forced):
        found = begin(chain, each, tmp_path)
        assert isinstance(found, StageResult)
        assert found.status == "reused"
    assert weights.exists()
    assert started == []


def test_a_result_that_lost_a_file_since_is_made_from_nothing(
    chain: Chain, tmp_path: Path, started: list[list[str]]
) -> None:
    """Test this because the stage would find its own `result.json` and commit half a result."""
    planned = plan(chain)
    weights = finish(planned)
    (weights.parent / "more").write_text("left over")
    weights.unlink()
    assert begin(chain, planned, tmp_path) is None
    assert not weights.parent.exists()
    assert "--fresh" in started[0]
