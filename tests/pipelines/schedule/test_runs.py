"""Runs that schedules start: local processes, jobs of a simulated Ray, and state on S3."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.own_files import DamagedFileError
from infra.services import object_store
from infra.storage import StorageError
from pipelines.schedule import runs as schedule_runs
from pipelines.schedule.config import Schedule
from pipelines.schedule.runs import (
    Submission,
    read_state,
    read_submission,
    status,
    stop,
    submit,
    write_state,
)
from pipelines.schedule.times import ScheduleState, Tick, tick_of

AT = datetime(2027, 3, 27, 23, 30, tzinfo=UTC)
NIGHTLY = Schedule(
    name="nightly", chain="demo.yaml", cron="30 0 * * *", time_zone="Europe/Berlin", words=("a=1",)
)
TICK = tick_of(NIGHTLY, AT)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


RunScript = Callable[[str], None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunScript:
    """Return the command that is started instead of `mae run`."""

    def use(text: str) -> None:
        monkeypatch.setattr(schedule_runs, "_command", lambda _schedule, _tick: ["-c", text])

    return use


def root_of(folder: Path) -> str:
    return str(folder / "runs")


def wait(folder: Path) -> str:
    return wait_at(root_of(folder), TICK)


def wait_at(root: str, tick: Tick) -> str:
    deadline_s = time.monotonic() + 30
    while (how := status(root, "nightly", tick.id)) == "running":
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return how


def log(folder: Path) -> str:
    return (folder / f"runs/schedules/nightly/runs/{TICK.id}.log").read_text()


def test_the_command_is_mae_run_with_the_tick_in_its_words() -> None:
    schedule = NIGHTLY.model_copy(update={"words": ("prepare.source=in/{tick_date}", "t={tick}")})
    words = ["-m", "pipelines.cli", "run", "demo.yaml"]
    assert schedule_runs._command(schedule, TICK) == [
        *words,
        "prepare.source=in/2027-03-28",
        "t=2027-03-27T23:30:00Z",
    ]


@pytest.mark.parametrize(("code", "how"), [(0, "done"), (3, "failed")])
def test_a_run_is_a_process_with_a_log_and_an_exit_code(
    code: int, how: str, script: RunScript, tmp_path: Path
) -> None:
    script(
        "import os, sys; print(os.environ['MAE_SCHEDULE_TICK'], os.getcwd(), flush=True);"
        f"print('to stderr', file=sys.stderr); sys.exit({code})"
    )
    submission = submit(root_of(tmp_path), NIGHTLY, TICK)
    assert submission is not None
    assert submission.log == str(tmp_path / f"runs/schedules/nightly/runs/{TICK.id}.log")
    assert wait(tmp_path) == how
    assert log(tmp_path).splitlines() == [f"nightly-20270327T233000Z {tmp_path}", "to stderr"]
    # A later scheduler can tell, too, and starts it no more.
    assert submit(root_of(tmp_path), NIGHTLY, TICK) is None
    assert status(root_of(tmp_path), "nightly", TICK.id) == how


def test_of_many_that_try_at_once_one_starts_it(
    script: RunScript, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script("print('ran', flush=True)")
    # All look before the first has written.
    monkeypatch.setattr(storage, "exists", lambda _uri: False)
    with ThreadPoolExecutor(8) as pool:
        tries = [pool.submit(submit, root_of(tmp_path), NIGHTLY, TICK) for _ in range(16)]
    assert [one.result() for one in tries].count(None) == 15
    assert wait(tmp_path) == "done"
    assert log(tmp_path) == "ran\n"


def test_stop_asks_first_and_waits(script: RunScript, tmp_path: Path) -> None:
    script(
        "import signal, sys, time\n"
        "def end(*_):\n    print('asked', flush=True); time.sleep(0.3)\n"
        "    print('ended', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end); print('ready', flush=True); time.sleep(60)\n"
    )
    submit(root_of(tmp_path), NIGHTLY, TICK)
    deadline_s = time.monotonic() + 30
    while "ready" not in log(tmp_path):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert status(root_of(tmp_path), "nightly", TICK.id) == "running"
    stop(root_of(tmp_path), "nightly", TICK.id)
    assert log(tmp_path).splitlines() == ["ready", "asked", "ended"]
    assert status(root_of(tmp_path), "nightly", TICK.id) == "failed"
    exit_file = tmp_path / f"runs/schedules/nightly/runs/{TICK.id}.exit"
    assert exit_file.read_text() == "143\n"


def test_a_killed_run_failed(script: RunScript, tmp_path: Path) -> None:
    script("import time; time.sleep(60)")
    submit(root_of(tmp_path), NIGHTLY, TICK)
    record = tmp_path / f"runs/schedules/nightly/runs/{TICK.id}.json"
    os.killpg(json.loads(record.read_text())["pid"], 9)
    assert wait(tmp_path) == "failed"


def test_what_can_not_be_started_may_be_tried_again(
    script: RunScript, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script("pass")
    with monkeypatch.context() as patch:
        patch.setattr(schedule_runs, "start_process", _refuse)
        with pytest.raises(StorageError, match=r"cannot start nightly-20270327T233000Z: no room"):
            submit(root_of(tmp_path), NIGHTLY, TICK)
    assert submit(root_of(tmp_path), NIGHTLY, TICK) is not None
    assert wait(tmp_path) == "done"


def _refuse(*_: object) -> None:
    raise OSError("no room")


@pytest.mark.parametrize(("hours", "how"), [(1, None), (25, "failed")])
def test_the_run_of_another_machine_is_unknown_for_a_day(
    hours: int, how: str | None, tmp_path: Path
) -> None:
    submission = Submission(
        id=TICK.id,
        submitted_at=datetime.now(UTC) - timedelta(hours=hours),
        where="local",
        host="elsewhere",
        log="x",
    )
    file = tmp_path / f"runs/schedules/nightly/ticks/{TICK.id}.json"
    file.parent.mkdir(parents=True)
    file.write_text(submission.model_dump_json())
    if how is None:
        with pytest.raises(StorageError, match="was started on elsewhere, and only that machine"):
            status(root_of(tmp_path), "nightly", TICK.id)
    else:
        assert status(root_of(tmp_path), "nightly", TICK.id) == how


def test_state_is_read_as_it_was_written_and_damage_is_told(tmp_path: Path) -> None:
    state = ScheduleState(trigger="x", handled_until=AT, queued=(AT, AT), running="r", seen="s")
    assert read_state(root_of(tmp_path), "nightly") is None
    write_state(root_of(tmp_path), "nightly", state)
    assert read_state(root_of(tmp_path), "nightly") == state
    (tmp_path / "runs/schedules/nightly/state.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"state\.json is damaged .* delete it"):
        read_state(root_of(tmp_path), "nightly")


class FakeStatus(str):
    @property
    def value(self) -> str:
        return str(self)

    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "FAILED", "STOPPED")


class FakeRay:
    """Simulates the jobs of a cluster, with the texts of Ray 2.60's answers."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.status: dict[str, str] = {}
        self.is_down = False

    def client(self) -> "FakeRay":
        if self.is_down:
            raise ConnectionError("Failed to connect to Ray at address: http://head:8265.")
        return self

    def submit_job(self, *, submission_id: str, **fields: Any) -> str:
        if submission_id in self.jobs:
            raise RuntimeError(
                "Request failed with status code 500: ValueError: Job with submission_id "
                f"{submission_id} already exists. Please use a different submission_id."
            )
        self.jobs[submission_id] = fields
        self.status[submission_id] = "RUNNING"
        return submission_id

    def get_job_status(self, submission_id: str) -> FakeStatus:
        if submission_id not in self.status:
            raise RuntimeError("Request failed with status code 404: Job x does not exist.")
        return FakeStatus(self.status[submission_id])

    def stop_job(self, submission_id: str) -> None:
        self.status[submission_id] = "STOPPED"


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    monkeypatch.setattr(schedule_runs, "_ray_client", ray.client)
    return ray


def test_where_a_cluster_is_named_a_run_is_a_job_under_the_tick_s_id(
    fake_ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAE__TRACKING__URI", "http://mlflow")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("MAE_GIT_COMMIT", "abc")
    submission = submit(root_of(tmp_path), NIGHTLY, TICK)
    assert submission is not None
    assert submission.log == "ray job logs nightly-20270327T233000Z"
    (job,) = fake_ray.jobs.values()
    assert job["entrypoint"] == "python -m pipelines.cli run demo.yaml a=1"
    environment = job["runtime_env"]["env_vars"]
    assert environment["MAE__TRACKING__URI"] == "http://mlflow"
    assert environment["MAE_SCHEDULE_TICK"] == "nightly-20270327T233000Z"
    assert environment["MAE_GIT_COMMIT"] == "abc"
    assert "secret" not in str(job)
    assert job["runtime_env"]["working_dir"] == str(tmp_path)
    assert "/data" in job["runtime_env"]["excludes"]  # with a slash: mae_core/data is code


def test_a_job_that_another_submitted_is_left_to_it(fake_ray: FakeRay, tmp_path: Path) -> None:
    fake_ray.jobs[TICK.id] = {}
    fake_ray.status[TICK.id] = "RUNNING"
    assert submit(root_of(tmp_path), NIGHTLY, TICK) is None
    assert status(root_of(tmp_path), "nightly", TICK.id) == "running"


def test_a_tick_is_not_run_again_by_a_cluster_that_forgot_it(
    fake_ray: FakeRay, tmp_path: Path
) -> None:
    submit(root_of(tmp_path), NIGHTLY, TICK)
    fake_ray.jobs.clear()
    fake_ray.status.clear()
    assert status(root_of(tmp_path), "nightly", TICK.id) == "failed"
    assert submit(root_of(tmp_path), NIGHTLY, TICK) is None
    assert fake_ray.jobs == {}


@pytest.mark.parametrize(
    ("ray_status", "how"),
    [
        ("PENDING", "running"),
        ("RUNNING", "running"),
        ("SUCCEEDED", "done"),
        ("FAILED", "failed"),
        ("STOPPED", "failed"),
    ],
)
def test_the_status_of_a_job(ray_status: str, how: str, fake_ray: FakeRay, tmp_path: Path) -> None:
    submit(root_of(tmp_path), NIGHTLY, TICK)
    fake_ray.status[TICK.id] = ray_status
    assert status(root_of(tmp_path), "nightly", TICK.id) == how


def test_a_job_is_stopped(fake_ray: FakeRay, tmp_path: Path) -> None:
    submit(root_of(tmp_path), NIGHTLY, TICK)
    stop(root_of(tmp_path), "nightly", TICK.id)
    assert fake_ray.status[TICK.id] == "STOPPED"


def test_a_cluster_that_is_down_is_told_and_the_tick_may_be_tried_again(
    fake_ray: FakeRay, tmp_path: Path
) -> None:
    fake_ray.is_down = True
    with pytest.raises(StorageError, match=r"cannot submit nightly-.* at http://head:8265: Failed"):
        submit(root_of(tmp_path), NIGHTLY, TICK)
    fake_ray.is_down = False
    assert submit(root_of(tmp_path), NIGHTLY, TICK) is not None


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with object_store(tmp_path / "store") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield "s3://mae/runs"


@pytest.mark.services
@pytest.mark.slow
def test_on_s3_of_many_that_try_at_once_one_starts_it(
    bucket: str, script: RunScript, tmp_path: Path
) -> None:
    """Test that the store honours If-None-Match, as AWS does."""
    script("print('ran', flush=True)")
    for i in range(5):
        tick = tick_of(NIGHTLY, AT + timedelta(days=i))
        with ThreadPoolExecutor(8) as pool:
            tries = [pool.submit(submit, bucket, NIGHTLY, tick) for _ in range(8)]
        assert [one.result() for one in tries].count(None) == 7
        assert wait_at(bucket, tick) == "done"
        assert read_submission(bucket, "nightly", tick.id) in [one.result() for one in tries]
        logs = tmp_path / f"runs/schedules/nightly/runs/{tick.id}.log"
        assert logs.read_text() == "ran\n"
    assert len(storage.list_files(f"{bucket}/schedules/nightly/ticks")) == 5
