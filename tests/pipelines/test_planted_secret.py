"""A secret, however it was passed in, is in nothing that is written."""

import json
import logging
import sqlite3
from pathlib import Path

import pytest

from infra import storage, tracking
from infra.config import TrackingConfig
from pipelines import cli
from pipelines.outcome import StageResult
from pipelines.schedule import runs as schedule_runs
from pipelines.schedule.config import Schedule
from pipelines.schedule.times import Tick
from pipelines.terminal import worker_logging
from pipelines.training.run_folder import RunFolder, RunRecord

SECRET = "pl4nted-s3cret"
ADDRESS = f"http://user:{SECRET}@127.0.0.1:9"
VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
    "PGPASSWORD",
)
# How it may come in: the whole text, of which nothing else is known to be a secret.
WAYS_IN = {
    "address": ADDRESS,
    "signed": f"https://bucket.host/key?X-Amz-Signature={SECRET}&n=1",
    "query": f"https://host/set?token={SECRET}",
    **dict.fromkeys(VARIABLES, f"the text has {SECRET} in it"),
}


@pytest.fixture(params=WAYS_IN)
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param in VARIABLES:
        monkeypatch.setenv(request.param, SECRET)
    return WAYS_IN[request.param]


def holders(folder: Path) -> list[str]:
    """Return the names of the files that contain the secret."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file.name for file in files if SECRET.encode() in file.read_bytes()]


def test_mlflow_never_gets_it(planted: str, tmp_path: Path) -> None:
    track = TrackingConfig(uri=f"sqlite:///{tmp_path}/m.db", experiment="e")
    for _ in range(2):  # the second reopens the run
        run_id = tracking.start_run(
            track, run_name=planted, params={"p": planted}, tags={"t": planted}, run_id=None
        )
    assert run_id is not None
    tracking.start_run(track, run_name="n", params={"p": "new"}, tags={}, run_id=run_id)
    tracking.set_tags(track.uri, run_id, {"mlflow.note.content": planted})
    tracking.log_artifact_text(track.uri, run_id, planted, "note.txt")
    tracking.log_dataset(track.uri, run_id, name="d", digest="1", source=planted, context="train")
    with sqlite3.connect(tmp_path / "m.db") as database:
        dump = "\n".join(database.iterdump())
    assert "***" in dump
    assert holders(tmp_path) == []


def test_the_folder_of_a_run_never_gets_it(planted: str, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_record(RunRecord(data_digest="d", run_id=None, config={"tracking": planted}))
    folder.write_result(StageResult("pretrain", "done", None, planted, {}))
    folder.add_bad_samples([{"shard": planted, "key": "k"}])
    folder.record_failure(storage.StorageError(planted, is_lasting=True))
    folder.write_arm_file("arm", "table.md", planted.encode())
    for name in ("report.html", "state.json", "done.json", "card.md"):
        folder.write_file(name, planted.encode())
    assert len(list((tmp_path / "run").rglob("*.*"))) == 9
    assert holders(tmp_path) == []
    assert folder.read_record() is not None


def test_a_command_that_fails_does_not_show_it(
    planted: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        logging.getLogger("pipelines.x").warning("at %s", planted)
        raise storage.StorageError(f"cannot reach {planted}")

    monkeypatch.setattr(cli, "read_config", fail)
    assert cli.main(["pretrain", "--debug"]) == 5
    shown = capsys.readouterr()
    assert "infrastructure error: cannot reach" in shown.err
    assert json.loads(shown.out)["status"] == "failed"
    assert SECRET not in shown.out + shown.err


def test_what_a_worker_logs_does_not_hold_it(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loggers = [logging.getLogger(name) for name in worker_logging.OURS]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    monkeypatch.setenv(worker_logging.LOG_FILE_VARIABLE, str(tmp_path / "workers.log"))
    try:
        worker_logging.set_up()
        logging.getLogger("infra.storage").error("failed: %s", planted)
        loggers[0].handlers[0].close()
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
    assert "***" in (tmp_path / "workers.log").read_text()
    assert holders(tmp_path) == []


def test_a_schedule_hands_it_to_no_process(planted: str) -> None:
    with pytest.raises(ValueError, match=r"word 1 .*contains a password") as caught:
        Schedule(name="s", chain="c.yaml", words=(f"tracking.uri={planted}",), cron="0 0 * * *")
    assert SECRET not in str(caught.value.errors()[0]["msg"])  # type: ignore[attr-defined]


def test_a_job_does_not_get_it_in_its_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("MAE__TRACKING__URI", ADDRESS)
    schedule = Schedule(name="s", chain="c.yaml", cron="0 0 * * *")
    with pytest.raises(storage.StorageError, match="MAE__TRACKING__URI contains a password"):
        schedule_runs.submit(str(tmp_path), schedule, Tick("s-1", None))
    assert holders(tmp_path) == []
