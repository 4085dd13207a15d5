"""Manage background processes that outlive the command that started them.

Each has two files in a folder: NAME.json with its pid and start time, so that another program with
the same pid is never mistaken for it, and NAME.log with its output.
"""

import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

# psutil derives start times from the clock, which may be changed in the meantime.
START_TIME_TOLERANCE_S = 5.0
POLL_S = 0.2
LOG_TAIL_LINES = 15
MARKER_VARIABLE = "MAE_SERVICE"
PARENT_VARIABLE = "MAE_PARENT_PID"
RAY_TOO_SLOW = "timed out during startup"  # what Ray says when its own limit of 30 s has passed
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class _Record(NamedTuple):
    pid: int
    started_at_s: float


class ServiceError(RuntimeError):
    """A service cannot be started; the message says which, why, and what to try."""


def start_process(folder: Path, name: str, command: list[str], env: Mapping[str, str]) -> int:
    """Start a program in its own session, with `folder` as its working folder; return its pid."""
    with _log_file(folder, name).open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**env, MARKER_VARIABLE: _marker(folder, name)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # The process is meant to outlive this object, which would warn about that.
    process.returncode = 0
    record = _Record(process.pid, psutil.Process(process.pid).create_time())
    _record_file(folder, name).write_text(json.dumps(record._asdict()))
    return process.pid


def find_process(folder: Path, name: str) -> psutil.Process | None:
    """Return the process that `start_process` started under this name, or None if it has ended."""
    record = _read_record(folder, name)
    if record is None:
        return None
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(record.pid)
        age_difference_s = abs(process.create_time() - record.started_at_s)
        is_ours = age_difference_s < START_TIME_TOLERANCE_S
        if is_ours and is_alive(process):
            return process
    return None


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie, which stays until its parent reaps it, does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def end_with_parent() -> None:
    """Ask for SIGTERM when the parent process dies, if PARENT_VARIABLE names the parent.

    This works on Linux only; elsewhere a child whose parent was killed continues to run.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before the request
        os.kill(os.getpid(), signal.SIGTERM)


_working: list[threading.Thread] = []


def note_working(thread: threading.Thread) -> None:
    """Register a thread that may be left running when the command is stopped."""
    _working.append(thread)


def is_thread_left() -> bool:
    """Return whether a registered thread still runs, besides the calling one."""
    # Not is_alive, which Python 3.11 gets wrong after a Ctrl-C inside of `join`.
    there = threading.enumerate()
    _working[:] = [thread for thread in _working if thread in there]
    return any(thread is not threading.current_thread() for thread in _working)


def end_past_threads(exit_code: int) -> None:
    """End this process and its children at once if a registered thread still runs.

    Python's own exit would wait for whatever such a thread waits for, and a library's C++ code that
    a daemon thread is in may abort the process then.
    """
    if is_thread_left():
        sys.stdout.flush()
        sys.stderr.flush()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(exit_code)


def stop_process(folder: Path, name: str, grace_s: float) -> bool:
    """Stop a process and all that it started: SIGTERM first, SIGKILL after `grace_s`.

    Returns:
        False if there was nothing to stop.
    """
    root = find_process(folder, name)
    family = _find_family(folder, name)
    _signal_all([root] if root else family, psutil.Process.terminate)
    _wait_until_dead([root] if root else family, grace_s)
    # Looked up again, because it may have started other processes in the meantime.
    remaining = {*family, *_find_family(folder, name)}
    _signal_all(remaining, psutil.Process.kill)
    _wait_until_dead(remaining, grace_s)
    _record_file(folder, name).unlink(missing_ok=True)
    return bool(family)


def _find_family(folder: Path, name: str) -> set[psutil.Process]:
    """Find the process, its descendants, and descendants whose own parents have ended."""
    root = find_process(folder, name)
    found = [root] if root else []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if _has_marker(process, folder, name) or _is_in_session(process, folder, name):
                found.append(process)
    family = set(found)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            family.update(process.children(recursive=True))
    return {process for process in family if is_alive(process)}


def _has_marker(process: psutil.Process, folder: Path, name: str) -> bool:
    """Look for our variable; misses processes that overwrote it with a title, as Ray workers do."""
    with contextlib.suppress(psutil.AccessDenied):
        return process.environ().get(MARKER_VARIABLE) == _marker(folder, name)
    return False


def _is_in_session(process: psutil.Process, folder: Path, name: str) -> bool:
    """Look for our session; misses processes with their own, such as the drivers of Ray jobs."""
    record = _read_record(folder, name)
    if record is None or os.getsid(process.pid) != record.pid:
        return False
    # A session's number is reused only after its last process has ended.
    return process.create_time() > record.started_at_s - START_TIME_TOLERANCE_S


def _signal_all(
    processes: Iterable[psutil.Process], send: Callable[[psutil.Process], None]
) -> None:
    for process in processes:
        # psutil compares start times too, so it never signals another process with the same pid.
        with contextlib.suppress(psutil.NoSuchProcess):
            send(process)


def _wait_until_dead(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while any(is_alive(process) for process in processes) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    # Processes that this program started stay zombies until their exit status is read.
    psutil.wait_procs(processes, timeout=0)


def wait_until_ready(
    folder: Path, name: str, is_ready: Callable[[], bool], timeout_s: float
) -> None:
    """Poll `is_ready` until it returns True.

    Raises:
        ServiceError: The process ended or the time is up; has the end of its log.
    """
    deadline_s = time.monotonic() + timeout_s
    while not is_ready():
        if find_process(folder, name) is None:
            raise ServiceError(f"{name} stopped while it started.\n{_log_tail(folder, name)}")
        if time.monotonic() > deadline_s:
            tail = _log_tail(folder, name)
            raise ServiceError(f"{name} is not ready after {timeout_s:.0f} s.\n{tail}")
        time.sleep(POLL_S)


def _log_tail(folder: Path, name: str) -> str:
    file = _log_file(folder, name)
    lines = file.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"The end of {file}:", *(f"  {line}" for line in lines)])


def is_port_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do, so that a connection that has just closed does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def find_free_ports(count: int, also_free_at: int) -> int:
    """Return the first of `count` consecutive free ports that are also free `also_free_at` higher.

    All are below 32768, because the system assigns higher ones to outgoing connections.
    """
    for _ in range(1000):
        first = random.randrange(20_000, 32_768 - also_free_at - count)
        ports = range(first, first + count)
        if all(is_port_free(port) and is_port_free(port + also_free_at) for port in ports):
            return first
    raise ServiceError(f"no {count} free ports in a row above 20000")


def _read_record(folder: Path, name: str) -> _Record | None:
    try:
        return _Record(**json.loads(_record_file(folder, name).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _record_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _log_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def _marker(folder: Path, name: str) -> str:
    return str(folder / name)
