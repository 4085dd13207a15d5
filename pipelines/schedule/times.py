"""Decide when a schedule fires: what is due, missed, or has to wait. Uses no clock and no files.

A scheduler's pass is `look`, then `ended` if the run has ended, `decide`, and `advance` for each
decision that was carried out. All times are in UTC. Fixed times of a day fire once a day through
both clock changes (cronsim, like Debian's cron). With `*` in minute or hour, the local clock
counts: each hour that it shows fires, and the hour that it shows twice fires twice.
"""

import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

from cronsim import CronSim

from infra.storage import FileFacts
from mae_core.config import StrictConfig
from pipelines.schedule.config import Schedule

# A tick found later than this was missed: no scheduler ran, or submitting failed.
LATE = timedelta(minutes=5)
# Number of ticks after a long downtime that `catch_up: all` runs; of more, the latest.
MAX_QUEUED = 1000
ID_CHARS = 12  # length of a fingerprint in an id


class Tick(NamedTuple):
    id: str
    at: datetime | None  # None for new data


Kind = Literal["fire", "replace", "queue", "skip", "miss"]


class TickDecision(NamedTuple):
    kind: Kind
    tick: Tick
    why: str


class Pause(StrictConfig):
    """The last `mae schedule pause` or `resume`."""

    is_paused: bool = False
    at: datetime = datetime.min.replace(tzinfo=UTC)


class ScheduleState(StrictConfig):
    """What a scheduler knows about a schedule."""

    trigger: str
    handled_until: datetime
    queued: tuple[datetime, ...] = ()
    running: str | None = None
    """Id of the active run, as far as is known."""
    last: str = ""
    """Id of the last run that ended, and how."""
    seen: str = ""
    """Fingerprint of the data that was seen last; `seen_at` is when it appeared."""
    seen_at: datetime = datetime.min.replace(tzinfo=UTC)
    fired: str = ""
    """Fingerprint for which the last run was started."""


def look(
    schedule: Schedule,
    state: ScheduleState | None,
    pause: Pause,
    now: datetime,
    *,
    seen: str = "",
    on_time: timedelta = timedelta(),
) -> ScheduleState:
    """Return the state to pass to `decide_ticks`; `seen` is the fingerprint of the current data.

    Ticks never fire if they passed before the schedule was first seen (except within `on_time`),
    while it was off, or while it was paused.
    """
    is_new = state is None or state.trigger != schedule.trigger
    if state is None or is_new:
        new = ScheduleState(trigger=schedule.trigger, handled_until=now - on_time)
        state = new if state is None else _changed(new, running=state.running, last=state.last)
    if seen != state.seen:
        state = _changed(state, seen=seen, seen_at=now)
    if pause.at > state.handled_until:
        is_new = True
        queued = tuple(at for at in state.queued if at > pause.at)
        state = _changed(state, handled_until=pause.at, queued=queued)
    return _changed(state, fired=seen) if is_new else state


def decide_ticks(
    schedule: Schedule, state: ScheduleState, pause: Pause, now: datetime, *, is_taken: bool = False
) -> list[TickDecision]:
    """Decide what to do now, in order; at most one run is started.

    `is_taken` means that another schedule runs the same pipeline, whose run we must not stop.
    """
    if pause.is_paused or not schedule.enabled:
        return []
    if schedule.new_data is not None:
        return _decide_data(schedule, state, now, is_taken=is_taken)
    due = due_ticks(schedule, state.handled_until, now)
    late = list(takewhile(lambda at: now - at - jitter(schedule, at) > LATE, due))
    on_time = due[len(late) :]
    made_up = {"none": [], "latest": [] if on_time else late[-1:], "all": late[-MAX_QUEUED:]}
    # Ticks of one pass count as one, unless each counts.
    wanted = [*made_up[schedule.catch_up], *on_time[0 if schedule.catch_up == "all" else -1 :]]
    missed = due[: len(due) - len(wanted)]
    decisions = []
    if missed:
        why = f"{len(missed)} ticks were missed, catch_up is {schedule.catch_up}"
        decisions.append(TickDecision("miss", tick_of(schedule, missed[-1]), why))
    waiting = list(state.queued)
    is_busy = is_taken or state.running is not None
    if waiting and not is_busy:
        decisions.append(TickDecision("fire", tick_of(schedule, waiting.pop(0)), "it waited"))
        is_busy = True
    for at in wanted:
        kind: Kind = "fire"
        if is_busy or waiting:
            is_made_up = at in made_up[schedule.catch_up]
            kind = _kind_of_busy(schedule, state, is_made_up=is_made_up)
        why = "it is time" if kind == "fire" else f"a run is active, overlap is {schedule.overlap}"
        decisions.append(TickDecision(kind, tick_of(schedule, at), why))
        is_busy = True
        if kind == "queue":
            waiting.append(at)
        elif kind == "replace":
            waiting = []
    return decisions


def _kind_of_busy(schedule: Schedule, state: ScheduleState, *, is_made_up: bool) -> Kind:
    # Ticks that are caught up wait for one another.
    if is_made_up and schedule.catch_up == "all":
        return "queue"
    # A schedule may stop only its own run.
    return "queue" if schedule.overlap == "replace" and not state.running else schedule.overlap


def _decide_data(
    schedule: Schedule, state: ScheduleState, now: datetime, *, is_taken: bool
) -> list[TickDecision]:
    assert schedule.new_data is not None
    settle = timedelta(seconds=schedule.new_data.settle_s)
    if state.seen in ("", state.fired) or now - state.seen_at < settle:
        return []
    tick = Tick(f"{schedule.name}-{state.seen[:ID_CHARS]}", None)
    if state.running is None and not is_taken:
        return [TickDecision("fire", tick, "there is new data")]
    if schedule.overlap == "replace" and state.running is not None:
        return [TickDecision("replace", tick, "there is new data, overlap is replace")]
    return []  # the data stays: whatever exists when the run ends fires then


def advance(state: ScheduleState, decision: TickDecision) -> ScheduleState:
    """Return the state after a decision was carried out."""
    at = decision.tick.at
    if at is None:
        return _changed(state, fired=state.seen, running=decision.tick.id)
    queued = tuple(x for x in state.queued if x != at)
    if decision.kind == "queue":
        queued = (*queued, at)
    elif decision.kind == "replace":
        queued = ()
    has_run = decision.kind in ("fire", "replace")
    return _changed(
        state,
        handled_until=max(state.handled_until, at),
        queued=queued,
        running=decision.tick.id if has_run else state.running,
    )


def ended(state: ScheduleState, how: str) -> ScheduleState:
    """Return the state after the active run has ended."""
    return _changed(state, running=None, last=f"{state.running} {how}")


def _changed(state: ScheduleState, **values: object) -> ScheduleState:
    return state.model_copy(update=values)


def due_ticks(schedule: Schedule, after: datetime, now: datetime) -> list[datetime]:
    """Return the ticks after `after` whose time, including jitter, has come."""
    ticks = ticks_between(schedule, after, now)
    return list(takewhile(lambda at: at + jitter(schedule, at) <= now, ticks))


def ticks_between(schedule: Schedule, after: datetime, until: datetime) -> Iterator[datetime]:
    """Yield the ticks of a cron schedule in (after, until]."""
    return takewhile(lambda at: at <= until, _ticks(schedule, after))


def next_ticks(schedule: Schedule, after: datetime, count: int) -> list[datetime]:
    return list(islice(_ticks(schedule, after), count))


def _ticks(schedule: Schedule, after: datetime) -> Iterator[datetime]:
    assert schedule.cron is not None
    for local in CronSim(schedule.cron, after.astimezone(ZoneInfo(schedule.time_zone))):
        at = local.astimezone(UTC)
        # In the hour that the clock shows twice, cronsim starts with the first of the two.
        if at > after:
            yield at


def jitter(schedule: Schedule, at: datetime) -> timedelta:
    """Return a tick's delay, the same for all schedulers and for each call."""
    digest = hashlib.sha256(f"{schedule.name} {at.isoformat()}".encode()).digest()
    return timedelta(seconds=int.from_bytes(digest[:8]) % (schedule.jitter_s + 1))


def next_wake(schedule: Schedule, now: datetime) -> datetime | None:
    """Return when the next tick fires."""
    if schedule.cron is None or not schedule.enabled:
        return None
    # A tick that has passed may still be waiting for its jitter.
    ticks = _ticks(schedule, now - timedelta(seconds=schedule.jitter_s))
    times = (at + jitter(schedule, at) for at in ticks)
    return next((fires_at for fires_at in times if fires_at > now), None)


def tick_of(schedule: Schedule, at: datetime) -> Tick:
    return Tick(f"{schedule.name}-{at.astimezone(UTC):%Y%m%dT%H%M%SZ}", at)


def files_fingerprint(files: Mapping[str, FileFacts]) -> str:
    """Hash names, sizes and times of change; "" if there are no files."""
    lines = [f"{name}\t{facts.num_bytes}\t{facts.changed_at_ns}" for name, facts in files.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() if lines else ""
