"""The stand-in for an agent of Ray lives as long as its raylet, and no longer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pipelines.training import ray_agent_stand_in

# A raylet that starts a stand-in, says its process id and waits.
RAYLET = """
import os, subprocess, sys, time
given = {**os.environ, "RAY_RAYLET_PID": str(os.getpid())}
print(subprocess.Popen([sys.executable, "-I", "-S", sys.argv[1]], env=given).pid, flush=True)
time.sleep(100)
"""


def ignores(process: psutil.Process, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("SigIgn:"))
    return bool(int(line.split()[1], 16) & 1 << (number - 1))


def test_it_ignores_an_interrupt_and_ends_with_a_raylet_that_is_killed() -> None:
    words = [sys.executable, "-c", RAYLET, str(Path(ray_agent_stand_in.__file__))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as raylet:
        assert raylet.stdout is not None
        stand_in = psutil.Process(int(raylet.stdout.readline()))
        while not ignores(stand_in, signal.SIGINT):
            time.sleep(0.01)  # it has not begun yet
        stand_in.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert stand_in.is_running()
        raylet.kill()
        assert not psutil.wait_procs([stand_in], timeout=30)[1]


def test_it_ends_at_once_if_its_raylet_has_ended_before() -> None:
    given = {**os.environ, "RAY_RAYLET_PID": "1"}
    words = [sys.executable, "-I", "-S", ray_agent_stand_in.__file__]
    assert subprocess.run(words, env=given, timeout=60, check=False).returncode == 0
