"""Paths are refused in words, signals stop a run in order, and a run says where it came from."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from infra.config import TrackingConfig
from pipelines import driver, job
from pipelines.outcome import ConfigError


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the driver of a submitted job."""
    raw = json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raw)


@pytest.mark.usefixtures("in_job")
def test_a_relative_path_is_refused_in_a_ray_job() -> None:
    with pytest.raises(ConfigError) as caught:
        driver.check_paths([("data.train", "s3://data/train"), ("storage.root", "runs")])
    assert str(caught.value) == (
        "storage.root=runs: in a Ray job a path must be absolute or s3://...; "
        "give storage.root=... on the command line, or MAE__STORAGE__ROOT"
    )


@pytest.mark.usefixtures("in_job")
def test_a_path_of_a_list_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"^data\.train=b: "):
        driver.check_paths([("data.train", "b"), ("data.train", "/a")])


@pytest.mark.usefixtures("in_job")
def test_absolute_and_remote_paths_are_taken_in_a_ray_job() -> None:
    driver.check_paths([("data.train", "/data/train"), ("storage.root", "s3://mae/runs")])
    assert job.ray_job_id() == "raysubmit_1"


@pytest.mark.usefixtures("in_job")
def test_an_mlflow_store_in_the_working_copy_of_a_ray_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri=.*is lost with the Ray job's working"):
        driver.check_tracking(TrackingConfig().uri)
    driver.check_tracking("http://127.0.0.1:5000")
    driver.check_tracking(f"sqlite:///{tmp_path}/mlflow.db")


def test_relative_paths_are_taken_outside_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    driver.check_paths([("data.train", "data/train"), ("storage.root", "runs")])
    assert job.ray_job_id() is None


@pytest.mark.parametrize("uri", ["gs://bucket/x", "https://host/x.tar", "s3://"])
def test_another_scheme_is_a_config_error(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.val: "):
        driver.check_paths([("data.val", uri)])


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_a_signal_calls_first_then_cancels_and_handlers_come_back(
    number: int, exit_code: int
) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    calls: list[str] = []

    def go_on_after_a_signal() -> None:
        with driver.cancel_on_signals(lambda: calls.append("first")):
            os.kill(os.getpid(), number)
            time.sleep(10)
            calls.append("went on")

    with pytest.raises(driver.CancelledError) as caught:
        go_on_after_a_signal()
    assert caught.value.exit_code == exit_code
    assert calls == ["first"]
    assert {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)} == before


def test_without_a_signal_nothing_is_called() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    calls: list[str] = []
    with driver.cancel_on_signals(lambda: calls.append("first")):
        pass
    with pytest.raises(ValueError, match="mine"), driver.cancel_on_signals(lambda: None):
        raise ValueError("mine")
    assert calls == []
    assert {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)} == before


class Work:
    """What runs in the workers: it ends `seconds` after it was asked to."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.asked = threading.Event()
        self.is_saved = False

    def __call__(self) -> None:
        assert self.asked.wait(20)
        time.sleep(self.seconds)
        self.is_saved = True


def stop(work: Work, *numbers: int, grace_s: float = 20, is_worth_waiting: bool = True) -> int:
    """Run the work and send the signals; returns the exit code."""

    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            work.asked.wait(20)

    def run() -> None:
        with driver.cancel_on_signals(lambda: None) as stopper:
            threading.Timer(0.05, send).start()
            stopper.run(
                work,
                ask=work.asked.set,
                is_worth_waiting=lambda: is_worth_waiting,
                grace_s=grace_s,
            )

    with pytest.raises(driver.CancelledError) as caught:
        run()
    return caught.value.exit_code


@pytest.mark.parametrize(
    ("numbers", "exit_code"),
    [
        ((signal.SIGTERM,), 143),
        ((signal.SIGINT,), 130),
        ((signal.SIGTERM, signal.SIGTERM), 143),
        ((signal.SIGINT, signal.SIGINT), 130),
    ],
    ids=["term", "ctrl-c", "job-and-chain", "terminal-and-wrapper"],
)
def test_work_that_is_asked_to_stop_may_save_first(
    numbers: tuple[int, ...], exit_code: int
) -> None:
    work = Work(0.2)
    assert stop(work, *numbers) == exit_code
    assert work.is_saved


def test_a_second_ctrl_c_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SAME_PRESS_S", 0.0)  # so that the test need not wait for it
    work = Work(30)
    assert stop(work, signal.SIGINT, signal.SIGINT) == 130
    assert not work.is_saved


def test_work_is_left_when_its_time_is_up_or_it_has_nothing_to_save() -> None:
    late, idle = Work(30), Work(30)
    assert stop(late, signal.SIGTERM, grace_s=0.2) == 143
    assert stop(idle, signal.SIGTERM, is_worth_waiting=False) == 143
    assert not late.is_saved
    assert not idle.is_saved


def test_an_mlflow_that_hangs_takes_no_time_from_what_is_saved() -> None:
    work = Work(0.2)
    release = threading.Event()

    def run() -> None:
        with driver.cancel_on_signals(lambda: release.wait(20) and None) as stopper:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
            stopper.run(work, ask=work.asked.set, is_worth_waiting=lambda: True, grace_s=1)

    with pytest.raises(driver.CancelledError):
        run()
    release.set()
    assert work.is_saved


def test_what_work_raises_comes_out() -> None:
    def work() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), driver.cancel_on_signals(lambda: None) as stopper:
        stopper.run(work, ask=lambda: None, is_worth_waiting=lambda: True, grace_s=1)


@pytest.mark.parametrize(("given", "seconds"), [(None, 2.0), ("60", 25.0), ("soon", 2.0)])
@pytest.mark.usefixtures("in_job")
def test_a_ray_job_has_what_job_stop_leaves_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None, seconds: float
) -> None:
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", given)
    assert job.grace_s(25.0) == seconds


def test_outside_of_a_job_the_config_says_how_long_a_stop_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert job.grace_s(25.0) == 25.0


def test_a_run_is_tagged_with_commit_and_job(monkeypatch: pytest.MonkeyPatch, in_job: None) -> None:
    monkeypatch.setenv("MAE_GIT_COMMIT", "abc123")
    assert driver.run_tags("pretrain", seed=7, output="/out") == {
        "stage": "pretrain",
        "seed": "7",
        "output": "/out",
        "mlflow.source.git.commit": "abc123",
        "ray.job_id": "raysubmit_1",
    }
