"""What a SQLite store says of a run is what MLflow would say of it, without MLflow."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.config import TrackingConfig
from infra.mlflow_client import client_of
from infra.run_records import run_status
from infra.tracking import end_run, start_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/a b%20.db"


def started(uri: str) -> str:
    config = TrackingConfig(uri=uri, experiment="e")
    run_id = start_run(config, run_name="r", params={}, tags={"stage": "s"}, run_id=None)
    assert run_id is not None
    return run_id


@pytest.mark.parametrize("status", ["RUNNING", "FINISHED", "FAILED", "KILLED"])
def test_a_run_is_as_mlflow_left_it(store: str, status: str) -> None:
    run_id = started(store)
    if status != "RUNNING":
        end_run(store, run_id, status)  # type: ignore[arg-type]
    assert run_status(store, run_id) == status


def test_a_run_that_was_deleted_or_never_was_is_missing(store: str) -> None:
    run_id = started(store)
    client_of(store).delete_run(run_id)
    assert run_status(store, run_id) == "MISSING"
    assert run_status(store, "0" * 32) == "MISSING"
    assert run_status(store, None) == "MISSING"


def test_a_store_of_another_form_is_left_to_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def ask(uri: str, run_id: str | None) -> str:
        asked.append(run_id)
        return "FINISHED"

    monkeypatch.setattr("infra.tracking.run_status", ask)
    (tmp_path / "other.db").write_bytes(b"no database at all, and longer than a header " * 9)
    for number, uri in enumerate(
        (f"sqlite:///{tmp_path}/other.db", f"sqlite:///{tmp_path}/absent.db", "http://h:1")
    ):
        assert run_status(uri, f"run-{number}") == "FINISHED"
    assert asked == ["run-0", "run-1", "run-2"]
    assert not (tmp_path / "absent.db").exists()


def test_asking_a_sqlite_store_loads_no_mlflow(store: str) -> None:
    code = (
        "import sys; from infra.run_records import run_status\n"
        f"print(run_status({store!r}, {started(store)!r}), 'mlflow' in sys.modules)"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert asked.stdout == "RUNNING False\n", asked.stderr
