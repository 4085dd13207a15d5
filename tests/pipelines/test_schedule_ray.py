"""Schedules on a real Ray head: its job API refuses a second job of one tick."""

import shutil
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from infra import services
from infra.processes import find_free_ports, stop_process, wait_until_ready
from pipelines import schedule_runs
from pipelines.schedule_config import Schedule
from pipelines.schedule_pass import run_pass
from pipelines.schedule_runs import status, stop, submit
from pipelines.schedule_times import tick_of

NOW = datetime(2027, 3, 28, 1, 0, 5, tzinfo=UTC)
# Stands for the project in the folder that the job takes with it.
STUB = """
import os, sys, time
print("RAN", *sys.argv[1:], os.environ["MAE_SCHEDULE_TICK"], os.environ["MAE__X"], flush=True)
time.sleep(600 if "stay=1" in sys.argv else 0)
"""


@pytest.fixture(scope="module")
def ray_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ray-head")
    first = find_free_ports(services.NUM_RAY_PORTS, also_free_at=0)
    ports = services.Ports(ray=first)
    env = services._client_env(folder, ports)
    try:
        services._start_ray(folder, ports, env)
        is_ready = partial(services._is_ready, "ray", env)
        wait_until_ready(folder, "ray", is_ready, services.START_TIMEOUT_S)
        yield {key: value for key, value in env.items() if key.startswith("RAY_")}
    finally:
        stop_process(folder, "ray", services.STOP_GRACE_S["ray"])
        shutil.rmtree(services.ray_temp_dir(folder), ignore_errors=True)


@pytest.fixture
def schedule(ray_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Schedule:
    for name, value in ray_env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MAE__X", "x")
    monkeypatch.chdir(tmp_path)
    for name, text in (("__init__", ""), ("cli", STUB)):
        file = tmp_path / f"pipelines/{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    name = tmp_path.name.replace("_", "-").lower().strip("0123456789-")[:30]
    return Schedule(name=name, chain="demo.yaml", cron="0 * * * *", overlap="replace")


def wait(root: str, schedule: Schedule, tick_id: str, until: tuple[str, ...]) -> str:
    deadline_s = time.monotonic() + 120
    while (how := status(root, schedule.name, tick_id)) not in until:
        assert time.monotonic() < deadline_s
        time.sleep(0.3)
    return how


@pytest.mark.services
@pytest.mark.slow
def test_two_schedulers_that_share_nothing_but_the_cluster_run_a_tick_once(
    schedule: Schedule,
) -> None:
    tick = tick_of(schedule, NOW.replace(second=0))
    both_ready = threading.Barrier(2)
    won: list[str] = []

    def serve(root: str) -> None:
        both_ready.wait(timeout=60)
        if submit(root, schedule, tick) is not None:
            won.append(root)

    threads = [threading.Thread(target=serve, args=(root,)) for root in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    # Both can tell how it went.
    assert [wait(root, schedule, tick.id, ("done", "failed")) for root in ("one", "two")] == [
        "done",
        "done",
    ]
    logs = schedule_runs._ray_client().get_job_logs(tick.id)
    assert f"RAN run demo.yaml {tick.id} x" in logs


@pytest.mark.services
@pytest.mark.slow
def test_a_job_is_replaced_by_that_of_the_next_tick(schedule: Schedule) -> None:
    staying = schedule.model_copy(update={"words": ("stay=1",)})
    run_pass("runs", staying, NOW - timedelta(hours=1))
    run_pass("runs", staying, NOW)
    first, second = (f"{schedule.name}-20270328T0{hour}0000Z" for hour in (1, 2))
    client = schedule_runs._ray_client()
    deadline_s = time.monotonic() + 120
    while "RAN" not in client.get_job_logs(first):
        assert time.monotonic() < deadline_s
        time.sleep(0.3)
    _, lines = run_pass("runs", staying, NOW + timedelta(hours=1))
    assert lines[0].startswith(f"{second}: replace")
    assert client.get_job_status(first).value == "STOPPED"
    assert status("runs", schedule.name, first) == "failed"
    assert status("runs", schedule.name, second) == "running"
    stop("runs", schedule.name, second)
