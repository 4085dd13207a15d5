"""A year on a fake clock: which ticks fire, and which do not."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.storage import FileFacts
from pipelines.schedule.config import NewDataConfig, Schedule
from pipelines.schedule.times import (
    Pause,
    ScheduleState,
    TickDecision,
    advance,
    decide_ticks,
    ended,
    files_fingerprint,
    jitter,
    look,
    next_ticks,
    next_wake,
    ticks_between,
)

YEAR = datetime(2027, 1, 1, tzinfo=UTC)
NEXT_YEAR = datetime(2028, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
INSTANT = timedelta(seconds=1)
NEVER = Pause()


def make(cron: str | None = "0 * * * *", **fields: Any) -> Schedule:
    return Schedule(name="nightly", chain="c.yaml", cron=cron, **fields)


def make_data(**fields: Any) -> Schedule:
    return make(None, new_data=NewDataConfig(path="in", settle_s=300), **fields)


class FakeScheduler:
    """Simulates the passes of a scheduler whose runs take `run_time`."""

    def __init__(self, schedule: Schedule, run_time: timedelta = timedelta()) -> None:
        self.schedule = schedule
        self.run_time = run_time
        self.state: ScheduleState | None = None
        self.pause = NEVER
        self.seen = ""
        self.ends_at = YEAR
        self.done: list[tuple[str, str]] = []  # kind and tick

    def at(self, now: datetime) -> list[TickDecision]:
        state = look(self.schedule, self.state, self.pause, now, seen=self.seen)
        if state.running is not None and now >= self.ends_at:
            state = ended(state, "done")
        decisions = decide_ticks(self.schedule, state, self.pause, now)
        for decision in decisions:
            state = advance(state, decision)
            if decision.kind in ("fire", "replace"):
                self.ends_at = now + self.run_time
        self.state = state
        self.done += [(x.kind, x.tick.id.removeprefix("nightly-")) for x in decisions]
        return decisions

    def every(self, step: timedelta, start: datetime, end: datetime) -> "FakeScheduler":
        while start <= end:
            self.at(start)
            start += step
        return self

    @property
    def fired(self) -> list[str]:
        return [tick for kind, tick in self.done if kind in ("fire", "replace")]


def local_days(zone: str, *days: tuple[int, int]) -> Iterator[tuple[datetime, datetime]]:
    for month, day in days:
        start = datetime(2027, month, day, tzinfo=ZoneInfo(zone))
        yield start.astimezone(UTC), (start + timedelta(days=1)).astimezone(UTC)


@pytest.mark.parametrize(
    ("zone", "days", "expected"),
    [
        (
            "Europe/Berlin",
            [(3, 27), (3, 28), (3, 29), (10, 30), (10, 31), (11, 1)],
            [
                "20270327T013000Z",
                "20270328T010000Z",  # 02:30 was skipped: the first moment after it, 03:00
                "20270329T003000Z",
                "20271030T003000Z",
                "20271031T003000Z",  # 02:30 came twice: the first
                "20271101T013000Z",
            ],
        ),
        (
            "America/New_York",
            [(3, 13), (3, 14), (3, 15), (11, 6), (11, 7), (11, 8)],
            [
                "20270313T073000Z",
                "20270314T070000Z",
                "20270315T063000Z",
                "20271106T063000Z",
                "20271107T073000Z",
                "20271108T073000Z",
            ],
        ),
    ],
)
def test_a_night_has_one_run_through_both_clock_changes(
    zone: str, days: list[tuple[int, int]], expected: list[str]
) -> None:
    scheduler = FakeScheduler(make("30 2 * * *", time_zone=zone))
    scheduler.every(30 * MINUTE, YEAR, NEXT_YEAR)
    assert len(scheduler.fired) == len(set(scheduler.fired)) == 365
    spans = list(local_days(zone, *days))
    stamps = [datetime.strptime(x, "%Y%m%dT%H%M%S%z") for x in scheduler.fired]
    near = [
        text
        for text, at in zip(scheduler.fired, stamps, strict=True)
        if any(start <= at < end for start, end in spans)
    ]
    assert near == expected
    assert {kind for kind, _ in scheduler.done} == {"fire"}


def test_the_hour_that_new_york_shows_twice_has_one_run_at_1_30() -> None:
    schedule = make("30 1 * * *", time_zone="America/New_York")
    ((start, end),) = local_days("America/New_York", (11, 7))
    assert list(ticks_between(schedule, start, end)) == [datetime(2027, 11, 7, 5, 30, tzinfo=UTC)]
    # Nor again for who looks first in that hour's second pass.
    assert next_ticks(schedule, datetime(2027, 11, 7, 6, 10, tzinfo=UTC), 1) == [
        datetime(2027, 11, 8, 6, 30, tzinfo=UTC)
    ]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "UTC"])
def test_each_hour_of_the_year_has_one_run(zone: str) -> None:
    scheduler = FakeScheduler(make("0 * * * *", time_zone=zone))
    scheduler.every(20 * MINUTE, YEAR, NEXT_YEAR)
    assert len(scheduler.fired) == len(set(scheduler.fired)) == 365 * 24


@settings(max_examples=20)
@given(
    cron=st.sampled_from(["30 2 * * *", "*/7 1-3 * * *", "15 2,3 * * *", "0 0 * * MON#1"]),
    zone=st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe"]),
    cuts=st.lists(st.integers(0, 365 * 24 * 60), max_size=12),
)
def test_ticks_do_not_depend_on_when_one_asks(cron: str, zone: str, cuts: list[int]) -> None:
    """Test that a scheduler that starts at any moment continues with the same ticks."""
    schedule = make(cron, time_zone=zone)
    moments = [YEAR, *(YEAR + cut * MINUTE for cut in sorted(cuts)), NEXT_YEAR]
    pieces = [at for start, end in pairwise(moments) for at in ticks_between(schedule, start, end)]
    whole = list(ticks_between(schedule, YEAR, NEXT_YEAR))
    assert pieces == whole == sorted(set(whole))


def test_a_first_look_fires_nothing_of_the_past() -> None:
    scheduler = FakeScheduler(make())
    scheduler.at(YEAR + 30 * MINUTE)
    assert scheduler.done == []
    scheduler.at(YEAR + 61 * MINUTE)
    assert scheduler.done == [("fire", "20270101T010000Z")]


def test_a_first_look_may_count_what_is_just_due() -> None:
    state = look(make(), None, NEVER, YEAR + 2 * MINUTE, on_time=5 * MINUTE)
    decisions = decide_ticks(make(), state, NEVER, YEAR + 2 * MINUTE)
    assert [(x.kind, x.tick.id) for x in decisions] == [("fire", "nightly-20270101T000000Z")]


# Down from 09:00:30 to 12:00:30, or to 12:20: the ticks of 10, 11 and 12 o'clock.
@pytest.mark.parametrize(
    ("catch_up", "minutes", "expected"),
    [
        ("none", 0, [("miss", "11"), ("fire", "12")]),
        ("none", 20, [("miss", "12")]),
        ("latest", 0, [("miss", "11"), ("fire", "12")]),
        ("latest", 20, [("miss", "11"), ("fire", "12")]),
        ("all", 20, [("fire", "10"), ("queue", "11"), ("queue", "12")]),
    ],
)
def test_three_hours_of_downtime(
    catch_up: str, minutes: int, expected: list[tuple[str, str]]
) -> None:
    scheduler = FakeScheduler(make(catch_up=catch_up))
    scheduler.every(MINUTE, YEAR + 8.5 * HOUR, YEAR + 9 * HOUR + MINUTE / 2)
    assert scheduler.done == [("fire", "20270101T090000Z")]
    scheduler.done.clear()
    scheduler.at(YEAR + 12 * HOUR + MINUTE / 2 + minutes * MINUTE)
    assert scheduler.done == [(kind, f"20270101T{hour}0000Z") for kind, hour in expected]


def test_all_that_was_missed_runs_one_after_another_and_once() -> None:
    scheduler = FakeScheduler(make(catch_up="all"), run_time=5 * MINUTE)
    scheduler.at(YEAR + 9 * HOUR)
    scheduler.every(MINUTE, YEAR + 12.1 * HOUR, YEAR + 12.9 * HOUR)
    assert scheduler.fired == ["20270101T100000Z", "20270101T110000Z", "20270101T120000Z"]


def test_after_a_long_downtime_the_latest_thousand_are_made_up() -> None:
    scheduler = FakeScheduler(make("* * * * *", catch_up="all"))
    scheduler.at(YEAR)
    scheduler.every(MINUTE, YEAR + 2000.5 * MINUTE, YEAR + 2010 * MINUTE)
    assert scheduler.done[0][0] == "miss"
    assert scheduler.state is not None
    assert len(scheduler.state.queued) <= 1010
    # 2000 were due: 5 on time, and of the 1995 late ones the last 1000, from the 996th.
    assert scheduler.done[1] == ("fire", f"{YEAR + 996 * MINUTE:%Y%m%dT%H%M%SZ}")


# Runs of 150 minutes begin at 1, so those of 2 and 3 o'clock meet the first.
@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        (
            "skip",
            [("fire", 1), ("skip", 2), ("skip", 3), ("fire", 4), ("skip", 5), ("skip", 6)],
        ),
        (
            "queue",
            [
                *[("fire", 1), ("queue", 2), ("queue", 3), ("fire", 2)],
                *[("queue", 4), ("queue", 5), ("fire", 3), ("queue", 6)],
            ],
        ),
        ("replace", [("fire", 1), *(("replace", hour) for hour in (2, 3, 4, 5, 6))]),
    ],
)
def test_a_tick_that_meets_a_run(overlap: str, expected: list[tuple[str, int]]) -> None:
    scheduler = FakeScheduler(make(overlap=overlap), run_time=150 * MINUTE)
    scheduler.every(MINUTE, YEAR + 30 * MINUTE, YEAR + 6 * HOUR)
    assert scheduler.done == [(kind, f"20270101T{hour:02d}0000Z") for kind, hour in expected]


def test_un_pausing_fires_nothing() -> None:
    scheduler = FakeScheduler(make())
    scheduler.every(MINUTE, YEAR, YEAR + 1.5 * HOUR)
    scheduler.pause = Pause(is_paused=True, at=YEAR + 1.5 * HOUR)
    scheduler.every(MINUTE, YEAR + 1.5 * HOUR, YEAR + 4.5 * HOUR)
    scheduler.pause = Pause(is_paused=False, at=YEAR + 4.5 * HOUR)
    scheduler.every(MINUTE, YEAR + 4.5 * HOUR, YEAR + 6 * HOUR)
    assert scheduler.done == [
        ("fire", "20270101T010000Z"),
        ("fire", "20270101T050000Z"),
        ("fire", "20270101T060000Z"),
    ]


def test_un_pausing_fires_nothing_where_no_scheduler_ran_meanwhile() -> None:
    scheduler = FakeScheduler(make(catch_up="all", overlap="queue"), run_time=3 * HOUR)
    scheduler.every(MINUTE, YEAR, YEAR + 2.5 * HOUR)  # 1 runs, 2 waits
    scheduler.pause = Pause(is_paused=False, at=YEAR + 9.5 * HOUR)  # paused and resumed
    scheduler.every(MINUTE, YEAR + 9.7 * HOUR, YEAR + 10 * HOUR)
    assert scheduler.fired == ["20270101T010000Z", "20270101T100000Z"]


@pytest.mark.parametrize("change", [{"cron": "0 12 * * *"}, {"time_zone": "Asia/Tokyo"}])
def test_a_changed_schedule_does_not_fire_for_the_past(change: dict[str, str]) -> None:
    before = make("30 2 * * *")
    scheduler = FakeScheduler(before)
    scheduler.every(10 * MINUTE, YEAR, YEAR + 3 * HOUR)
    assert len(scheduler.done) == 1
    scheduler.schedule = Schedule.model_validate(before.model_dump() | change)
    scheduler.at(YEAR + 20 * HOUR)
    assert len(scheduler.done) == 1


def test_what_is_off_fires_nothing_and_nothing_when_it_is_on_again() -> None:
    scheduler = FakeScheduler(make())
    scheduler.at(YEAR)
    scheduler.schedule = make(enabled=False)
    scheduler.every(HOUR, YEAR, YEAR + 5 * HOUR)
    scheduler.schedule = make()
    scheduler.every(MINUTE, YEAR + 5.5 * HOUR, YEAR + 6 * HOUR)
    assert scheduler.fired == ["20270101T060000Z"]


def test_state_survives_a_restart() -> None:
    """Test that a scheduler restarted from its state after each pass behaves the same."""
    schedule = make("*/20 * * * *", overlap="queue", catch_up="all")
    lasting = FakeScheduler(schedule, 25 * MINUTE)
    forgetful = FakeScheduler(schedule, 25 * MINUTE)
    for i in range(500):
        now = YEAR + i * 7 * MINUTE
        lasting.at(now)
        forgetful.at(now)
        assert forgetful.state is not None
        forgetful.state = ScheduleState.model_validate_json(forgetful.state.model_dump_json())
    assert forgetful.done == lasting.done
    assert len(forgetful.fired) > 100


@settings(max_examples=30)
@given(name=st.from_regex(r"[a-z]{1,20}", fullmatch=True), jitter_s=st.integers(0, 3600))
def test_jitter_is_the_same_each_time_and_in_its_bounds(name: str, jitter_s: int) -> None:
    schedule = Schedule(name=name, chain="c", cron="0 * * * *", jitter_s=jitter_s)
    waits = [jitter(schedule, YEAR + i * HOUR) for i in range(20)]
    assert all(timedelta() <= wait <= timedelta(seconds=jitter_s) for wait in waits)
    assert waits == [jitter(schedule, YEAR + i * HOUR) for i in range(20)]


def test_jitter_differs_by_tick_and_by_name() -> None:
    schedules = [Schedule(name=x, chain="c", cron="0 * * * *", jitter_s=3600) for x in ("a", "b")]
    waits = {jitter(schedule, YEAR + i * HOUR) for schedule in schedules for i in range(20)}
    assert len(waits) > 35


def test_a_tick_waits_for_its_jitter_and_keeps_its_id() -> None:
    schedule = make("0 6 * * *", jitter_s=1800)
    tick = YEAR + 6 * HOUR
    fires_at = tick + jitter(schedule, tick)
    assert tick < fires_at < tick + timedelta(minutes=30)
    scheduler = FakeScheduler(schedule)
    scheduler.every(MINUTE, YEAR, fires_at - INSTANT)
    assert scheduler.done == []
    assert next_wake(schedule, YEAR) == next_wake(schedule, fires_at - INSTANT) == fires_at
    assert (next_wake(schedule, fires_at) or YEAR) > YEAR + 30 * HOUR
    scheduler.at(fires_at)
    assert scheduler.done == [("fire", "20270101T060000Z")]


def test_a_year_with_jitter_loses_no_tick() -> None:
    scheduler = FakeScheduler(make("0 * * * *", jitter_s=1800))
    scheduler.every(10 * MINUTE, YEAR, NEXT_YEAR + HOUR / 2)
    assert len(scheduler.fired) == len(set(scheduler.fired)) == 365 * 24


def test_new_data_fires_once_it_has_settled() -> None:
    scheduler = FakeScheduler(make_data())
    scheduler.seen = "a" * 64
    scheduler.every(MINUTE, YEAR, YEAR + HOUR)
    assert scheduler.done == []  # it was there before
    scheduler.seen = "b" * 64
    scheduler.every(MINUTE, YEAR + HOUR, YEAR + HOUR + 4 * MINUTE)
    scheduler.seen = "c" * 64  # the upload goes on
    scheduler.every(MINUTE, YEAR + HOUR + 5 * MINUTE, YEAR + HOUR + 9 * MINUTE)
    assert scheduler.done == []
    scheduler.at(YEAR + HOUR + 10 * MINUTE)
    assert scheduler.done == [("fire", "c" * 12)]
    scheduler.every(MINUTE, YEAR + 2 * HOUR, YEAR + 9 * HOUR)
    assert len(scheduler.done) == 1


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        # What the data is when the run ends counts; what it was between does not.
        ("skip", [("fire", "b" * 12), ("fire", "d" * 12)]),
        ("queue", [("fire", "b" * 12), ("fire", "d" * 12)]),
        ("replace", [("fire", "b" * 12), ("replace", "c" * 12), ("replace", "d" * 12)]),
    ],
)
def test_new_data_that_meets_a_run(overlap: str, expected: list[tuple[str, str]]) -> None:
    scheduler = FakeScheduler(make_data(overlap=overlap), run_time=5 * HOUR)
    for hour, letter in enumerate("abcd"):
        scheduler.seen = letter * 64
        scheduler.every(MINUTE, YEAR + hour * HOUR, YEAR + (hour + 1) * HOUR)
    scheduler.every(MINUTE, YEAR + 4 * HOUR, YEAR + 8 * HOUR)
    assert scheduler.done == expected


def test_data_that_came_in_a_pause_or_went_away_does_not_fire() -> None:
    scheduler = FakeScheduler(make_data())
    scheduler.seen = "a" * 64
    scheduler.at(YEAR)
    scheduler.pause = Pause(is_paused=True, at=YEAR + HOUR)
    scheduler.seen = "b" * 64
    scheduler.every(MINUTE, YEAR + HOUR, YEAR + 2 * HOUR)
    scheduler.pause = Pause(is_paused=False, at=YEAR + 2 * HOUR)
    scheduler.every(MINUTE, YEAR + 2 * HOUR, YEAR + 3 * HOUR)
    scheduler.seen = ""
    scheduler.every(MINUTE, YEAR + 3 * HOUR, YEAR + 4 * HOUR)
    assert scheduler.done == []


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files | {"c.tar": FileFacts(1, 1)},
        lambda files: {"a.tar": files["a.tar"]},
        lambda files: files | {"a.tar": FileFacts(11, 5)},
        lambda files: files | {"a.tar": FileFacts(10, 6)},
        lambda files: {"b.tar": files["a.tar"], "a.tar": files["b.tar"]},
    ],
)
def test_a_fingerprint_sees_names_sizes_and_times(
    change: Callable[[dict[str, FileFacts]], dict[str, FileFacts]],
) -> None:
    files = {"a.tar": FileFacts(10, 5), "b.tar": FileFacts(20, 5)}
    assert files_fingerprint(change(files)) != files_fingerprint(files)


def test_a_fingerprint_does_not_see_the_order() -> None:
    files = {"a.tar": FileFacts(10, 5), "b.tar": FileFacts(20, 5)}
    assert files_fingerprint(dict(reversed(files.items()))) == files_fingerprint(files)
    assert files_fingerprint({}) == ""


@pytest.mark.parametrize(
    ("overlap", "kind"), [("skip", "skip"), ("queue", "queue"), ("replace", "queue")]
)
def test_a_run_of_another_schedule_of_the_pipeline_is_waited_for_and_never_stopped(
    overlap: str, kind: str
) -> None:
    state = look(make(overlap=overlap), None, NEVER, YEAR + HOUR / 2)
    (decision,) = decide_ticks(make(overlap=overlap), state, NEVER, YEAR + HOUR, is_taken=True)
    assert (decision.kind, decision.tick.id) == (kind, "nightly-20270101T010000Z")
    queued = state.model_copy(update={"queued": (YEAR,)})
    assert decide_ticks(make(), queued, NEVER, YEAR + HOUR / 2, is_taken=True) == []
    assert len(decide_ticks(make(), queued, NEVER, YEAR + HOUR / 2)) == 1


@pytest.mark.parametrize("overlap", ["skip", "replace"])
def test_new_data_waits_for_another_schedule_of_the_pipeline(overlap: str) -> None:
    data = make_data(overlap=overlap)
    state = look(data, None, NEVER, YEAR, seen="a" * 64)
    state = look(data, state, NEVER, YEAR + HOUR, seen="b" * 64)
    assert decide_ticks(data, state, NEVER, YEAR + 2 * HOUR, is_taken=True) == []
    assert [x.kind for x in decide_ticks(data, state, NEVER, YEAR + 2 * HOUR)] == ["fire"]


def test_a_replaced_run_takes_those_that_waited_for_it_along() -> None:
    scheduler = FakeScheduler(make(overlap="replace", catch_up="all"), run_time=40 * MINUTE)
    scheduler.at(YEAR + 9 * HOUR)
    scheduler.every(MINUTE, YEAR + 12.5 * HOUR, YEAR + 15 * HOUR)
    assert [(kind, tick[9:11]) for kind, tick in scheduler.done] == [
        *[("fire", "10"), ("queue", "11"), ("queue", "12")],
        *[("replace", "13"), ("fire", "14"), ("fire", "15")],
    ]
