"""Run a stage as a separate process: start, watch and stop it, and interpret how it ended."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import IO, Any

import psutil

from infra import processes
from pipelines.chain.execute import Failure
from pipelines.config.loading import ENVIRONMENT_PREFIX
from pipelines.job import ROOT, STAGE_VARIABLE
from pipelines.outcome import STOPPED_CODES, StageResult

logger = logging.getLogger(__name__)

STOP_GRACE_S = 40.0  # a stage takes `checkpoint.grace_s` to save what it has done
MEMORY_EVERY_S = 2.0
TAIL_LINES = 8


class StageProcess:
    """One attempt of a stage; implements `pipelines.chain.execute.Running`."""

    def __init__(self, name: str, words: list[str]) -> None:
        """Start `mae WORDS`; its log appears in ours, each line with the stage's name."""
        # The resolved config already includes what the environment says about configs.
        env = {k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT_PREFIX)}
        path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        self._name = name
        self._process = subprocess.Popen(
            # -P: a module in the working folder must not replace one of ours.
            [sys.executable, "-P", "-m", "pipelines.cli", *words],
            env={
                **env,
                "PYTHONPATH": path,
                processes.PARENT_VARIABLE: str(os.getpid()),
                STAGE_VARIABLE: name,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # Ctrl-C reaches all processes of a terminal, so we forward it ourselves, once.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._output: deque[str] = deque(maxlen=1)
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._readers = [
            _follow(self._process.stdout, self._output.append),
            _follow(self._process.stderr, self._log),
        ]
        self.peak_bytes = 0
        self._measured_at_s = 0.0

    def _log(self, line: str) -> None:
        self._tail.append(line)
        logger.info("[%s] %s", self._name, line)

    def poll(self) -> StageResult | Failure | None:
        exit_code = self._process.poll()
        if exit_code is None:
            self._measure()
            return None
        for reader in self._readers:
            reader.join(timeout=5)
        fields = _last_object(self._output)
        if exit_code == 0 and {"output", "metrics"} <= fields.keys():
            return StageResult(**{key: fields[key] for key in StageResult._fields})
        return self._failure(exit_code, fields)

    def _failure(self, exit_code: int, fields: Mapping[str, Any]) -> Failure:
        if exit_code < 0:
            name = signal.Signals(-exit_code).name
            return Failure(f"its process was killed by {name}", 5, can_pass=True)
        if exit_code in STOPPED_CODES:
            return Failure("it was stopped from outside", exit_code, can_pass=False)
        message = fields.get("error") or "\n".join(self._tail) or f"exit code {exit_code}"
        return Failure(str(message), exit_code, can_pass=bool(fields.get("can_pass")))

    def _measure(self) -> None:
        """Measure the memory of all its processes; shared pages count once for each process."""
        if time.monotonic() - self._measured_at_s < MEMORY_EVERY_S:
            return
        self._measured_at_s = time.monotonic()
        try:
            parent = psutil.Process(self._process.pid)
            family = [parent, *parent.children(recursive=True)]
            self.peak_bytes = max(self.peak_bytes, sum(map(_resident_bytes, family)))
        except psutil.Error:
            return

    def ask_to_stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def wait_until_stopped(self) -> None:
        try:
            self._process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join(timeout=5)


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _follow(stream: IO[str], take: Any) -> threading.Thread:
    def read() -> None:
        with stream:
            for line in stream:
                take(line.rstrip("\n"))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _last_object(lines: deque[str]) -> dict[str, Any]:
    try:
        fields = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
