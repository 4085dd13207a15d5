"""`mae plan` prints the graph and why each stage runs, and starts nothing."""

from pathlib import Path

import pytest

from pipelines.chain.command import command
from pipelines.outcome import ConfigError

CHAIN = """
name: two
stages:
  prepare:
    set: {synthetic: shapes, output: "{self}/set"}
  pretrain:
    set: {data.train: "{prepare}/train"}
storage: {root: ROOT/runs}
tracking: {uri: "sqlite:///ROOT/mlflow.db"}
"""


@pytest.fixture
def chain(tmp_path: Path) -> str:
    file = tmp_path / "chain.yaml"
    file.write_text(CHAIN.replace("ROOT", str(tmp_path)))
    return str(file)


def test_a_plan_shows_the_graph_and_the_reasons(
    chain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["plan", chain]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["prepare", "└─ pretrain"]
    assert [line.split()[:2] for line in lines[-2:]] == [["prepare", "run"], ["pretrain", "run"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chain.yaml"]


def test_a_plan_can_be_a_mermaid_diagram(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["plan", chain, "--mermaid"]) == 0
    assert "s0 --> s1" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--set", "pretrain.seed=1"], ["pretrain.seed=1"]])
def test_a_value_is_given_with_set_or_without(
    chain: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["plan", chain, *options]) == 0
    assert "pretrain" in capsys.readouterr().out


def test_a_stage_that_is_not_there_is_told(chain: str) -> None:
    with pytest.raises(ConfigError, match="train"):
        command(["plan", chain, "--force", "train"])


def test_results_in_a_passing_place_are_refused_in_a_job(
    chain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.driver.ray_job_id", lambda: "job-1")
    with pytest.raises(ConfigError, match=r"storage\.root=runs: in a Ray job a path must be"):
        command(["plan", chain, "storage.root=runs"])
