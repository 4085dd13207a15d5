import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra.processes import (
    ServiceError,
    find_free_ports,
    find_process,
    is_alive,
    start_process,
    stop_process,
    wait_until_ready,
)

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
# Starts a child in its own session, prints "ready", and ignores SIGTERM, as the child does.
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
    " start_new_session=True); print('ready', flush=True); time.sleep(600)",
]


def start_stubborn(folder: Path) -> list[psutil.Process]:
    start_process(folder, "x", STUBBORN, os.environ)
    wait_until_ready(folder, "x", lambda: "ready" in (folder / "x.log").read_text(), 20.0)
    process = find_process(folder, "x")
    assert process is not None
    family = [process, *process.children()]
    assert len(family) == 2
    return family


def test_a_process_is_found_and_stopped_with_its_children(
    tmp_path: Path, bystander: psutil.Process
) -> None:
    family = start_stubborn(tmp_path)
    assert stop_process(tmp_path, "x", grace_s=0.5)
    assert not any(is_alive(process) for process in family)
    assert is_alive(bystander)
    assert find_process(tmp_path, "x") is None
    assert not stop_process(tmp_path, "x", grace_s=0.5)


def test_a_killed_process_s_children_are_stopped(tmp_path: Path) -> None:
    root, child = start_stubborn(tmp_path)
    root.kill()
    root.wait()
    assert find_process(tmp_path, "x") is None
    assert is_alive(child)
    assert stop_process(tmp_path, "x", grace_s=0.5)
    assert not is_alive(child)


def test_a_recycled_pid_is_left_alone(tmp_path: Path, bystander: psutil.Process) -> None:
    record = {"pid": bystander.pid, "started_at_s": bystander.create_time() - 60}
    (tmp_path / "x.json").write_text(json.dumps(record))
    assert find_process(tmp_path, "x") is None
    assert not stop_process(tmp_path, "x", grace_s=0.5)
    assert is_alive(bystander)


def test_a_service_that_stops_at_once_shows_its_log(tmp_path: Path) -> None:
    start_process(tmp_path, "x", [sys.executable, "-c", "print('no room'); exit(1)"], os.environ)
    with pytest.raises(ServiceError, match=r"x stopped while it started(.|\n)*no room"):
        wait_until_ready(tmp_path, "x", lambda: False, timeout_s=20.0)


def test_a_service_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    start_process(tmp_path, "x", SLEEP, os.environ)
    with pytest.raises(ServiceError, match="x is not ready after 0 s"):
        wait_until_ready(tmp_path, "x", lambda: False, timeout_s=0.1)
    stop_process(tmp_path, "x", grace_s=5.0)


def test_free_ports_are_free_at_their_offset_too() -> None:
    first = find_free_ports(5, also_free_at=10_000)
    for port in [*range(first, first + 5), *range(first + 10_000, first + 10_005)]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    assert first + 10_005 < 32_768


PROGRAM = """
import sys, threading, time
from infra import processes
thread = threading.Thread(target=time.sleep, args=(%s,), daemon=False)
thread.start()
processes.note_working(thread)
print("said")
thread.join(%s)
processes.end_past_threads(7)
sys.exit(3)
"""


def test_a_thread_that_works_on_does_not_keep_the_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM % (600, 0.0)], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (7, "said\n")


def test_a_process_whose_threads_have_ended_ends_as_usual() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM % (0.0, 60.0)], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (3, "said\n")
