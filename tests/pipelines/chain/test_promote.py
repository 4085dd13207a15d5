"""The gate: which models get the alias, are refused, or are not comparable."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra import registry, tracking
from infra.config import TrackingConfig
from infra.mlflow_client import client_of
from infra.registry import Version
from infra.storage import StorageError
from pipelines.chain.config import PromoteSpec
from pipelines.chain.promote import judge_candidate, promote
from pipelines.outcome import ConfigError, StageResult

SPEC = PromoteSpec(model="m", metric="classify/top1", margin=0.01)


def holder(value: float = 0.5, **tags: str) -> Version:
    known = {"eval.value": repr(value), "eval.metric": "classify/top1", "eval.data": "d1"}
    return Version("3", "other-run", {**known, **{f"eval.{k}": v for k, v in tags.items()}})


@pytest.mark.parametrize(
    ("value", "is_refused"), [(1.0, False), (0.76, False), (0.75, True), (0.5, True), (0.4, True)]
)
def test_better_by_more_than_the_margin(value: float, is_refused: bool) -> None:
    spec = SPEC.model_copy(update={"margin": 0.25})
    verdict = judge_candidate(spec, value, "d1", "run", holder(0.5))
    assert verdict.is_refused == is_refused
    assert "0.5, margin 0.25" in verdict.text


def test_where_less_is_better() -> None:
    spec = SPEC.model_copy(update={"higher_is_better": False})
    assert not judge_candidate(spec, 0.4, "d1", "run", holder(0.5)).is_refused
    assert judge_candidate(spec, 0.6, "d1", "run", holder(0.5)).is_refused


def test_the_first_takes_it() -> None:
    assert not judge_candidate(SPEC, 0.0, "d1", "run", None).is_refused


def test_the_holder_is_not_its_own_rival() -> None:
    version = holder(0.9)._replace(run_id="run")
    verdict = judge_candidate(SPEC, 0.5, "d2", "run", version)
    assert not verdict.is_refused
    assert "is already this one" in verdict.text


@pytest.mark.parametrize(
    "version",
    [holder(data="d2"), holder(metric="detect/ap"), Version("3", "other", {}), holder(value="x")],
)
def test_what_was_measured_otherwise_is_not_compared(version: Version) -> None:
    verdict = judge_candidate(SPEC, 0.99, "d1", "run", version)
    assert verdict.is_refused
    assert "not comparable" in verdict.text
    taken = judge_candidate(
        SPEC.model_copy(update={"other_data": "replace"}), 0.1, "d1", "run", version
    )
    assert not taken.is_refused


@pytest.fixture
def track(store_uri: str) -> TrackingConfig:
    return TrackingConfig(uri=store_uri, experiment="e")


def made(track: TrackingConfig, value: float) -> tuple[StageResult, StageResult]:
    """Return a model's run and its measurements."""
    run_id = tracking.start_run(track, run_name="r", params={}, tags={}, run_id=None)
    model = StageResult("pretrain", "done", run_id, "/runs/model", {})
    return model, StageResult("classify", "done", None, "/runs/c", {"top1": value})


def test_the_alias_moves_only_to_what_is_better(track: TrackingConfig) -> None:
    verdicts = [promote(SPEC, track, *made(track, value), "d1") for value in (0.5, 0.4, 0.7)]
    assert [verdict.is_refused for verdict in verdicts] == [False, True, False]
    assert [verdict.version for verdict in verdicts] == ["1", "2", "3"]
    found = registry.alias_holder(track.uri, "m", "champion")
    assert found is not None
    assert found.number == "3"
    assert found.tags["eval.value"] == "0.7"
    # The verdict on what was refused is written, too.
    refused = MlflowClient(track.uri).get_model_version("m", "2")
    assert refused.tags["verdict"] == "refused"


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"])
def test_a_logged_model_is_promoted_in_its_own_store_whatever_mlflow_is_told_elsewhere(
    track: TrackingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    results = made(track, 0.5)
    run_id = results[0].run_id
    assert run_id is not None
    client = client_of(track.uri)
    logged = client.create_logged_model(
        client.get_run(run_id).info.experiment_id, name="encoder", source_run_id=run_id
    )
    client.finalize_logged_model(logged.model_id, "READY")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv(variable, f"sqlite:///{elsewhere}/other.db")
    client_of.cache_clear()
    verdict = promote(SPEC, track, *results, "d1")
    assert (verdict.is_refused, verdict.version) == (False, "1")
    made_version = client.get_model_version("m", "1")
    assert (
        made_version.source == f"file://{tmp_path}/mlartifacts/models/{logged.model_id}/artifacts"
    )
    assert made_version.tags["output"] == "/runs/model"
    assert list(elsewhere.iterdir()) == []


def test_the_same_model_again_makes_no_other_version(track: TrackingConfig) -> None:
    results = made(track, 0.5)
    first, second = (promote(SPEC, track, *results, "d1") for _ in range(2))
    assert first.version == second.version == "1"
    assert not second.is_refused


def test_a_holder_keeps_what_it_was_measured_at(track: TrackingConfig) -> None:
    """Test that a shorter probe of the same model does not make it easier to beat."""
    model, measured = made(track, 0.9)
    promote(SPEC, track, model, measured, "d1")
    promote(SPEC, track, model, measured._replace(metrics={"top1": 0.1}), "d2")
    found = registry.alias_holder(track.uri, "m", "champion")
    assert found is not None
    assert (found.tags["eval.value"], found.tags["eval.data"]) == ("0.9", "d1")


def test_a_metric_that_is_not_there_is_named(track: TrackingConfig) -> None:
    spec = SPEC.model_copy(update={"metric": "classify/top5"})
    with pytest.raises(ConfigError, match="no such metric; it has top1"):
        promote(spec, track, *made(track, 0.5), "d1")


def test_a_registry_that_is_down_is_an_infrastructure_error(track: TrackingConfig) -> None:
    results = made(track, 0.5)
    down = track.model_copy(update={"uri": "http://127.0.0.1:9"})
    with pytest.raises(StorageError, match="registry"):
        promote(SPEC, down, *results, "d1")
