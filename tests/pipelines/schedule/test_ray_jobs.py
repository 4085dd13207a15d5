"""Schedules on a real Ray head: its job API refuses a second job for one tick."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from infra import services
from infra.processes import find_free_ports, stop_process, wait_until_ready

ROOT = Path(__file__).parents[3]
# Stands for the project in the folder that the job takes with it.
STUB = """
import os, sys, time
print("RAN", *sys.argv[1:], os.environ["MAE_SCHEDULE_TICK"], os.environ["MAE__X"], flush=True)
time.sleep(600 if "stay=1" in sys.argv else 0)
"""
# What a scheduler does, in a process of its own: Ray looks for its token once in a process.
PRELUDE = """
import sys, time
from datetime import UTC, datetime, timedelta
from pipelines.schedule.config import Schedule
from pipelines.schedule.passes import run_pass
from pipelines.schedule.runs import _ray_client, status, stop, submit
from pipelines.schedule.times import tick_of

HOUR = timedelta(hours=1)
NOW = datetime(2027, 3, 28, 1, 0, 5, tzinfo=UTC)
deadline_s = time.monotonic() + 120

def wait(is_so):
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.3)
"""
SUBMIT = """
root = sys.argv[1]
schedule = Schedule(name="once", chain="demo.yaml", cron="0 * * * *")
tick = tick_of(schedule, NOW.replace(second=0))
client = _ray_client()
submission = submit(root, schedule, tick)
wait(lambda: status(root, "once", tick.id) != "running")
print("started" if submission else "left", status(root, "once", tick.id))
print(client.get_job_logs(tick.id))
"""
REPLACE = """
schedule = Schedule(
    name="often", chain="demo.yaml", cron="0 * * * *", overlap="replace", words=("stay=1",)
)
run_pass("runs", schedule, NOW - HOUR)
run_pass("runs", schedule, NOW)
client = _ray_client()
wait(lambda: "RAN" in client.get_job_logs("often-20270328T010000Z"))
_, lines = run_pass("runs", schedule, NOW + HOUR)
print(lines[0].split(",")[0])
print(client.get_job_status("often-20270328T010000Z").value)
print(*(status("runs", "often", f"often-20270328T0{hour}0000Z") for hour in (1, 2)))
stop("runs", "often", "often-20270328T020000Z")
"""


@pytest.fixture(scope="module")
def ray_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ray-head")
    first = find_free_ports(services.NUM_RAY_PORTS, also_free_at=0)
    env = services._client_env(folder, services.Ports(ray=first))
    try:
        services._start_ray(folder, services.Ports(ray=first), env)
        is_ready = partial(services._is_ready, "ray", env)
        wait_until_ready(folder, "ray", is_ready, services.START_TIMEOUT_S)
        yield {key: value for key, value in env.items() if key.startswith("RAY_")}
    finally:
        stop_process(folder, "ray", services.STOP_GRACE_S["ray"])
        shutil.rmtree(services.ray_temp_dir(folder), ignore_errors=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in (("__init__", ""), ("cli", STUB)):
        file = tmp_path / f"pipelines/{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return tmp_path


def start(
    project: Path, ray_env: dict[str, str], script: str, *words: str
) -> subprocess.Popen[str]:
    others = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MAE__"))}
    return subprocess.Popen(
        # Not the project's own `pipelines`, which is a stub.
        [sys.executable, "-P", "-W", "ignore", "-c", PRELUDE + script, *words],
        cwd=project,
        env={**others, **ray_env, "MAE__X": "x", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.services
@pytest.mark.slow
def test_two_schedulers_that_share_nothing_but_the_cluster_run_a_tick_once(
    project: Path, ray_env: dict[str, str]
) -> None:
    schedulers = [start(project, ray_env, SUBMIT, root) for root in ("one", "two")]
    told = [one.communicate(timeout=180)[0].splitlines() for one in schedulers]
    assert sorted(lines[0] for lines in told) == ["left done", "started done"]
    ran = [line for line in told[0] if line.startswith("RAN")]
    assert ran == ["RAN run demo.yaml once-20270328T010000Z x"]


@pytest.mark.services
@pytest.mark.slow
def test_a_job_is_replaced_by_that_of_the_next_tick(project: Path, ray_env: dict[str, str]) -> None:
    told, _ = start(project, ray_env, REPLACE).communicate(timeout=180)
    assert told.splitlines() == [
        "often-20270328T020000Z: replace",
        "STOPPED",
        "failed running",
    ]
