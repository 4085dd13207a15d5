"""The passes of a scheduler over its schedules, once or repeatedly."""

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from infra import storage
from infra.own_files import DamagedFileError
from pipelines.outcome import ConfigError
from pipelines.schedule.config import Schedule, load_schedules
from pipelines.schedule.runs import read_pause, read_state, status, stop, submit, write_state
from pipelines.schedule.times import (
    LATE,
    ScheduleState,
    TickDecision,
    advance,
    decide_ticks,
    ended,
    files_fingerprint,
    look,
    next_wake,
    ticks_between,
)

logger = logging.getLogger(__name__)

# Longest time between two passes, in which an edit, a pause or the end of a run is noticed.
PASS_S = 15.0
SHORTEST_WAIT_S = 0.2
ONCE_POLL_S = 2.0


def now_utc() -> datetime:
    return datetime.now(UTC)


def run_pass(
    root: str,
    schedule: Schedule,
    now: datetime,
    on_time: timedelta = timedelta(),
    others: Sequence[str] = (),
) -> tuple[ScheduleState, list[str]]:
    """Do what is due; return the new state, and a line for each action.

    `others` are schedules of the same pipeline, of which only one run can be active at a time.

    Raises:
        StorageError: Something failed; what was done before is kept.
    """
    pause, before = read_pause(root, schedule.name), read_state(root, schedule.name)
    seen = ""
    if schedule.new_data is not None:
        seen = files_fingerprint(storage.list_tree(schedule.new_data.path))
    state = look(schedule, before, pause, now, seen=seen, on_time=on_time)
    lines: list[str] = []
    try:
        if state.running is not None:
            how = status(root, schedule.name, state.running)
            if how != "running":
                lines.append(f"{state.running}: {how}")
                state = ended(state, how)
        decisions = decide_ticks(schedule, state, pause, now)
        if decisions and any(_is_running(root, name) for name in others):
            decisions = decide_ticks(schedule, state, pause, now, is_taken=True)
        for decision in decisions:
            lines.append(_carry_out(root, schedule, state, decision))
            state = advance(state, decision)
    except BaseException:
        _log(lines)
        raise
    finally:
        if state != before:
            write_state(root, schedule.name, state)
    return state, lines


def _log(lines: Iterable[str]) -> None:
    for line in lines:
        logger.info("%s", line)


def _is_running(root: str, name: str) -> bool:
    state = read_state(root, name)
    return (
        state is not None
        and state.running is not None
        and status(root, name, state.running) == "running"
    )


def others_of(schedule: Schedule, schedules: Iterable[Schedule]) -> list[str]:
    """Return the names of the other schedules of the same pipeline."""
    same = (x for x in schedules if Path(x.chain).resolve() == Path(schedule.chain).resolve())
    return [x.name for x in same if x.name != schedule.name]


def _carry_out(root: str, schedule: Schedule, state: ScheduleState, decision: TickDecision) -> str:
    told = f"{decision.tick.id}: {decision.kind}, {decision.why}"
    if decision.kind == "replace" and state.running is not None:
        stop(root, schedule.name, state.running)
    if decision.kind in ("fire", "replace"):
        submission = submit(root, schedule, decision.tick)
        return f"{told}; {submission.log}" if submission else f"{told}; it was started before"
    return told


def serve(file: Path, root: str) -> int:
    """Make passes over a file's schedules, rereading it each time, until SIGTERM or Ctrl-C."""
    schedules, begin = load_schedules(file), now_utc()
    told: dict[str, str] = {}
    wakes: dict[str, datetime] = {}  # when each schedule is checked next
    with _until_signal() as stopped:
        logger.info("serving %d schedules of %s, state in %s", len(schedules), file, root)
        while not stopped.is_set():
            schedules = _reload(file, schedules, told)
            for schedule in schedules:
                if not stopped.is_set() and now_utc() >= wakes.setdefault(schedule.name, begin):
                    others = others_of(schedule, schedules)
                    wakes[schedule.name] = _pass_and_wake(root, schedule, others, told)
            wait_s = min(
                ((wakes[x.name] - now_utc()).total_seconds() for x in schedules), default=PASS_S
            )
            stopped.wait(min(max(wait_s, SHORTEST_WAIT_S), PASS_S))
    logger.info("stopped; active runs continue")
    return 0


@contextmanager
def _until_signal() -> Iterator[threading.Event]:
    """Yield an event that is set by SIGTERM and Ctrl-C."""
    stopped = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reload(file: Path, last: list[Schedule], told: dict[str, str]) -> list[Schedule]:
    try:
        schedules = load_schedules(file)
    except ConfigError as error:
        _tell_once(told, "", f"{error}\nthe previous schedules stay in use until it is corrected")
        return last
    told.pop("", None)
    return schedules


def _pass_and_wake(
    root: str, schedule: Schedule, others: Sequence[str], told: dict[str, str]
) -> datetime:
    """Make one pass; return when the next is due. An error is logged, and tried again."""
    now = now_utc()
    try:
        _log(run_pass(root, schedule, now, others=others)[1])
    except (storage.StorageError, DamagedFileError, OSError) as error:
        _tell_once(told, schedule.name, str(error))
        return now + timedelta(seconds=PASS_S)
    told.pop(schedule.name, None)
    if schedule.new_data is not None:
        return now + timedelta(seconds=schedule.new_data.poll_s)
    latest = now + timedelta(seconds=PASS_S)
    return min(next_wake(schedule, now) or latest, latest)


def _tell_once(told: dict[str, str], about: str, text: str) -> None:
    if told.get(about) != text:
        told[about] = text
        logger.error("%s", text)


def once(
    schedules: Sequence[Schedule], root: str, name: str | None = None, *, is_patient: bool
) -> Iterator[str]:
    """Make a pass over each schedule; yield a line for each action.

    A schedule seen for the first time counts what is just due, because Kubernetes calls at the
    tick.

    Args:
        schedules: An error in one does not affect the others.
        root: Root of the storage.
        name: The only schedule to check; None for all.
        is_patient: Continue until no tick waits for another or for its jitter.

    Raises:
        StorageError: Something failed.
    """
    waiting = [schedule for schedule in schedules if name in (None, schedule.name)]
    while waiting:
        still, faults = [], []
        is_lasting = False
        for schedule in waiting:
            now = now_utc()
            try:
                others = others_of(schedule, schedules)
                state, lines = run_pass(root, schedule, now, LATE, others)
            except (storage.StorageError, DamagedFileError) as error:
                faults.append(f"{schedule.name}: {error}")
                is_lasting |= isinstance(error, DamagedFileError)
                continue
            yield from lines
            if state.queued or _has_tick_in_jitter(schedule, state, now):
                still.append(schedule)
        if faults:
            raise storage.StorageError("\n".join(faults), is_lasting=is_lasting)
        waiting = still if is_patient else []
        if waiting:
            time.sleep(ONCE_POLL_S)


def _has_tick_in_jitter(schedule: Schedule, state: ScheduleState, now: datetime) -> bool:
    is_cron = schedule.new_data is None and schedule.enabled
    return is_cron and any(ticks_between(schedule, state.handled_until, now))
