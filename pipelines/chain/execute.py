"""The stage graph: what names a result, whether it exists, and how missing ones are made.

A result's key is a hash of everything that determines it: kind and version of the stage, the code
that computes, the config, the data from outside the pipeline, and the keys of the stages that it
needs. Using these keys instead of hashes of outputs means that every key is known before anything
runs. Settings of how and where (workers, paths, retries, time limits) are not included.

This module does not know MLflow, Ray or processes: `execute` gets a function that starts a stage.
"""

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple, Protocol

from pipelines.outcome import ConfigError, StageResult

POLL_S = 0.05
MAX_BACKOFF_S = 60.0
KEY_CHARS = 16
MAX_LINE_CHARS = 300


@dataclass(frozen=True)
class KeyParts:
    """Everything that determines a result, in parts by which a person can follow a change."""

    kind: str
    version: int
    code: Mapping[str, str]  # digest by module
    config: Mapping[str, Any]  # value by dotted key
    inputs: Mapping[str, str]  # fingerprint of data from outside the pipeline, by dotted key
    needs: Mapping[str, str]  # key of each earlier stage by its name

    @property
    def key(self) -> str:
        # The names that a pipeline gives to the earlier stages do not matter.
        parts = {**asdict(self), "needs": sorted(self.needs.values())}
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_CHARS]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def differences(old: KeyParts, new: KeyParts) -> list[str]:
    """Describe what changed, one line each: `config optim.base_lr 0.001 -> 0.002`."""
    lines = []
    if old.version != new.version:
        lines.append(f"version {old.version} -> {new.version}")
    lines += [
        f"config {key} {_shown(before)} -> {_shown(after)}"
        for key, before, after in _changed(old.config, new.config)
    ]
    lines += [f"data {key} changed" for key, _, _ in _changed(old.inputs, new.inputs)]
    lines += [f"code {module} changed" for module, _, _ in _changed(old.code, new.code)]
    if sorted(old.needs.values()) != sorted(new.needs.values()):
        changed = [name for name, key in new.needs.items() if key not in old.needs.values()]
        lines.append(f"{', '.join(changed) or 'the stages before'} changed")
    return lines


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*old, *new}):
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        # Where only the key of an earlier stage differs, that stage is reported instead.
        if _KEY.sub("{}", json.dumps(before, default=repr)) != _KEY.sub(
            "{}", json.dumps(after, default=repr)
        ):
            yield key, before, after


_KEY = re.compile(rf"\{{[0-9a-f]{{{KEY_CHARS}}}\}}")


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, _Absent) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Action(Enum):
    REUSE = "reuse"
    RUN = "run"
    RESUME = "resume"  # unfinished: continues where it was stopped
    REBUILD = "rebuild"  # the result exists, but its record does not


class Decision(NamedTuple):
    """What will happen to a stage, and why."""

    action: Action
    why: str
    fresh: bool = False  # whether the existing result is deleted first


@dataclass(frozen=True)
class Node:
    """A stage in its place in the graph."""

    name: str
    needs: tuple[str, ...] = ()
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 2
    timeout_s: float | None = None


def in_order(nodes: Sequence[Node]) -> list[Node]:
    """Sort stages so that each comes after those that it needs, otherwise in the given order.

    Raises:
        ConfigError: A stage needs one that does not exist, or directly or indirectly itself.
    """
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        for need in node.needs:
            if need not in by_name:
                there = ", ".join(by_name)
                raise ConfigError(f"stages.{node.name}: needs {need!r}; the stages are {there}")
    try:
        order = list(TopologicalSorter({n.name: n.needs for n in nodes}).static_order())
    except CycleError as error:
        loop = " -> ".join(reversed(error.args[1]))
        raise ConfigError(f"stages need each other in a circle: {loop}") from None
    depth: dict[str, int] = {}
    for name in order:
        depth[name] = 1 + max((depth[need] for need in by_name[name].needs), default=0)
    return sorted(nodes, key=lambda node: depth[node.name])


class Failure(NamedTuple):
    """Why an attempt of a stage failed."""

    message: str
    exit_code: int
    can_pass: bool  # whether a retry may help

    @property
    def line(self) -> str:
        """The message shortened to one line."""
        first = self.message.strip().partition("\n")[0]
        return first if len(first) <= MAX_LINE_CHARS else f"{first[: MAX_LINE_CHARS - 1]}…"


class Running(Protocol):
    """An attempt of a stage that is running."""

    def poll(self) -> StageResult | Failure | None:
        """Return how it ended; None while it runs."""

    def ask_to_stop(self) -> None:
        """Request a stop and return at once."""

    def wait_until_stopped(self) -> None:
        """Wait for the end after the request; kill what does not end in time."""


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    REUSED = "reused"
    FAILED = "failed"
    BLOCKED = "blocked"  # a stage that it needs failed
    CANCELLED = "cancelled"


ENDED_WELL = (State.DONE, State.REUSED)


@dataclass
class StageRun:
    """The state and outcome of a stage in a run of the pipeline."""

    node: Node
    state: State = State.WAITING
    result: StageResult | None = None
    failure: Failure | None = None
    tries: int = 0
    seconds: float = 0.0
    _not_before_s: float = 0.0
    _started_at_s: float = 0.0
    _running: Running | None = field(default=None, repr=False)


class Capacity(NamedTuple):
    cpus: float
    gpus: float = 0.0


Start = Callable[[Node, Mapping[str, StageResult]], Running | StageResult]
"""Starts an attempt, given the earlier stages' results; or returns an existing result at once."""


def execute(
    nodes: Sequence[Node],
    start: Start,
    *,
    capacity: Capacity,
    notify: Callable[[StageRun], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, StageRun]:
    """Run each stage once those that it needs are done, as many at a time as there is room for.

    A stage that fails blocks the stages that need it; the others continue. A failure that may be
    temporary is retried after a pause that doubles, with full jitter (Brooker 2015,
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Args:
        nodes: In an order in which each comes after what it needs.
        start: See `Start`.
        capacity: A stage that asks for more than all of it runs alone.
        notify: Called for each change of state.
        clock: Returns seconds, for time limits and pauses.
        sleep: Waits between checks of the running stages.

    Raises:
        BaseException: Whatever interrupts it, such as KeyboardInterrupt, after all running stages
            were stopped.
    """
    runs = {node.name: StageRun(node) for node in nodes}
    try:
        while any(run.state in (State.WAITING, State.RUNNING) for run in runs.values()):
            changed = [run for run in runs.values() if _advance(run, runs, start, capacity, clock)]
            for run in changed:
                notify(run)
            if not changed:
                sleep(POLL_S)
    except BaseException:
        # All are asked before waiting for the first, because our own time to stop may be short.
        running = [run for run in runs.values() if run.state is State.RUNNING]
        tries = [run._running for run in running if run._running is not None]
        for each in tries:
            each.ask_to_stop()
        for run in running:
            run.state = State.CANCELLED
            notify(run)
        for each in tries:
            each.wait_until_stopped()
        raise
    return runs


def _advance(
    run: StageRun,
    runs: Mapping[str, StageRun],
    start: Start,
    capacity: Capacity,
    clock: Callable[[], float],
) -> bool:
    """Advance a stage to its next state if possible; return whether its state changed."""
    if run.state is State.RUNNING:
        return _look_after(run, clock)
    if run.state is not State.WAITING:
        return False
    before = [runs[need] for need in run.node.needs]
    failed = [r.node.name for r in before if r.state in (State.FAILED, State.BLOCKED)]
    if failed:
        run.state = State.BLOCKED
        run.failure = Failure(f"needs {', '.join(failed)}", 0, can_pass=False)
        return True
    if any(r.state not in ENDED_WELL for r in before) or clock() < run._not_before_s:
        return False
    if not _has_room(
        run.node, [r.node for r in runs.values() if r.state is State.RUNNING], capacity
    ):
        return False
    results = {r.node.name: r.result for r in before if r.result is not None}
    run.tries += 1
    run._started_at_s = clock()
    try:
        started = start(run.node, results)
    except Exception as error:  # the other stages continue
        run.state = State.FAILED
        run.failure = Failure(f"{type(error).__name__}: {error}", 1, can_pass=False)
        return True
    if isinstance(started, StageResult):
        _finish(run, started)
    else:
        # What an earlier attempt failed by is not why this one may be cancelled.
        run.state, run._running, run.failure = State.RUNNING, started, None
    return True


def _has_room(node: Node, running: Sequence[Node], capacity: Capacity) -> bool:
    cpus = sum(other.cpus for other in running) + node.cpus
    gpus = sum(other.gpus for other in running) + node.gpus
    return not running or (cpus <= capacity.cpus and gpus <= capacity.gpus)


def _look_after(run: StageRun, clock: Callable[[], float]) -> bool:
    assert run._running is not None
    ended = run._running.poll()
    elapsed_s = clock() - run._started_at_s
    if ended is None:
        limit_s = run.node.timeout_s
        if limit_s is None or elapsed_s < limit_s:
            return False
        run._running.ask_to_stop()
        run._running.wait_until_stopped()
        ended = Failure(
            f"took longer than timeout_s={limit_s:g}; the same command resumes it", 5, False
        )
    run.seconds += elapsed_s
    run._running = None
    if isinstance(ended, StageResult):
        _finish(run, ended)
        return True
    run.failure = ended
    if ended.can_pass and run.tries <= run.node.retries:
        run.state = State.WAITING
        run._not_before_s = clock() + random.uniform(0, min(MAX_BACKOFF_S, 2.0**run.tries))
    else:
        run.state = State.FAILED
    return True


def _finish(run: StageRun, result: StageResult) -> None:
    run.state = State.REUSED if result.status == "reused" else State.DONE
    run.result, run.failure = result, None
