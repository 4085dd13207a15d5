"""`mae schedule`: its words, its passes, and two schedulers at once."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.own_files import DamagedFileError
from infra.storage import StorageError
from pipelines.outcome import ConfigError
from pipelines.schedule import command as schedule
from pipelines.schedule import passes as schedule_pass
from pipelines.schedule import runs as schedule_runs
from pipelines.schedule.config import Schedule, load_schedules
from pipelines.schedule.passes import once, others_of, run_pass
from pipelines.schedule.runs import read_pause, read_state

ROOT = Path(__file__).parents[3]
NOW = datetime(2027, 3, 28, 12, 0, 5, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "MAE__STORAGE__ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text("name: demo\n")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace `mae run` by a command that writes its tick into a file."""
    text = "import os; print(os.environ['MAE_SCHEDULE_TICK'], file=open('ran.txt', 'a'))"
    monkeypatch.setattr(schedule_runs, "_command", lambda _schedule, _tick: ["-c", text])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    def set_to(now: datetime) -> None:
        for module in (schedule, schedule_pass):
            monkeypatch.setattr(module, "now_utc", lambda: now)

    set_to(NOW)
    return set_to


def write(*entries: dict[str, Any]) -> Path:
    full = [{"name": "nightly", "chain": "demo.yaml", **entry} for entry in entries]
    Path("s.yaml").write_text(yaml.safe_dump({"schedules": full}))
    return Path("s.yaml")


def hourly(**fields: Any) -> Schedule:
    return Schedule(name="nightly", chain="demo.yaml", cron="0 * * * *", **fields)


def ran() -> list[str]:
    return Path("ran.txt").read_text().split() if Path("ran.txt").exists() else []


def settle(root: str = "runs") -> None:
    """Wait for the active run to end."""
    state = read_state(root, "nightly")
    if state is not None and state.running is not None:
        while schedule_runs.status(root, "nightly", state.running) == "running":
            time.sleep(0.02)


@pytest.mark.usefixtures("stub")
def test_passes_fire_and_tell_how_runs_end() -> None:
    assert run_pass("runs", hourly(), NOW - HOUR)[1] == []
    _, lines = run_pass("runs", hourly(), NOW)
    log = Path("runs/schedules/nightly/runs/nightly-20270328T120000Z.log").absolute()
    assert lines == [f"nightly-20270328T120000Z: fire, it is time; {log}"]
    settle()
    _, lines = run_pass("runs", hourly(), NOW + timedelta(seconds=15))
    assert lines == ["nightly-20270328T120000Z: done"]
    assert run_pass("runs", hourly(), NOW + timedelta(seconds=30))[1] == []
    assert ran() == ["nightly-20270328T120000Z"]


@pytest.mark.usefixtures("stub")
def test_a_scheduler_that_lost_its_state_does_not_run_a_tick_again() -> None:
    run_pass("runs", hourly(), NOW - HOUR)
    run_pass("runs", hourly(), NOW)
    settle()
    Path("runs/schedules/nightly/state.json").unlink()
    _, lines = run_pass("runs", hourly(), NOW, on_time=timedelta(minutes=5))
    assert lines == ["nightly-20270328T120000Z: fire, it is time; it was started before"]
    assert ran() == ["nightly-20270328T120000Z"]


def test_replace_stops_the_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import time; time.sleep(60)"
    monkeypatch.setattr(schedule_runs, "_command", lambda _schedule, _tick: ["-c", text])
    replacing = hourly(overlap="replace")
    run_pass("runs", replacing, NOW - HOUR)
    run_pass("runs", replacing, NOW)
    _, lines = run_pass("runs", replacing, NOW + HOUR)
    assert "nightly-20270328T130000Z: replace, a run is active, overlap is replace" in lines[0]
    assert schedule_runs.status("runs", "nightly", "nightly-20270328T120000Z") == "failed"
    assert schedule_runs.status("runs", "nightly", "nightly-20270328T130000Z") == "running"
    schedule_runs.stop("runs", "nightly", "nightly-20270328T130000Z")


@pytest.mark.usefixtures("stub")
def test_what_was_done_before_a_fault_is_kept_and_the_rest_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_pass("runs", hourly(), NOW - 3 * HOUR)
    with monkeypatch.context() as patch:
        patch.setattr(schedule_pass, "submit", _refuse)
        with pytest.raises(StorageError):
            run_pass("runs", hourly(), NOW)
    state = read_state("runs", "nightly")
    assert state is not None
    assert state.handled_until == datetime(2027, 3, 28, 11, tzinfo=UTC)  # those that were missed
    _, lines = run_pass("runs", hourly(), NOW)
    assert len(lines) == 1
    settle()
    assert ran() == ["nightly-20270328T120000Z"]


def _refuse(*_: object) -> None:
    raise StorageError("the cluster is down")


@pytest.mark.usefixtures("stub")
def test_new_data_fires_when_it_has_settled_and_the_same_data_never_again() -> None:
    watching = Schedule.model_validate(
        {"name": "nightly", "chain": "demo.yaml", "new_data": {"path": "in", "settle_s": 60}}
    )
    minutes = iter(range(100))

    def look() -> list[str]:
        return run_pass("runs", watching, NOW + timedelta(minutes=next(minutes)))[1]

    Path("in/sub").mkdir(parents=True)
    assert look() == []
    Path("in/sub/a.tar").write_bytes(b"a")
    os.utime("in/sub/a.tar", (1, 1))
    assert look() == []
    (line,) = look()
    tick_id = line.split(":")[0]
    settle()
    assert [x.split(": ")[1] for x in look()] == ["done"]
    Path("in/sub/a.tar").unlink()
    assert look() + look() == []
    Path("in/sub/b.tar").write_bytes(b"a")
    assert look() == []
    assert len(look()) == 1
    settle()
    Path("in/sub/b.tar").unlink()
    Path("in/sub/a.tar").write_bytes(b"a")
    os.utime("in/sub/a.tar", (1, 1))
    look()
    assert look() == [f"{tick_id}: fire, there is new data; it was started before"]
    assert len(ran()) == len(set(ran())) == 2


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("overlap", ["queue", "skip"])
def test_two_schedulers_run_each_tick_once(overlap: str) -> None:
    """Run at full speed through three days of an hourly schedule."""
    together = hourly(overlap=overlap, catch_up="all")
    run_pass("runs", together, NOW)
    both_ready = threading.Barrier(2)
    faults: list[BaseException] = []

    def serve() -> None:
        try:
            for i in range(1, 9):
                both_ready.wait(timeout=60)
                run_pass("runs", together, NOW + i * HOUR)
                run_pass("runs", together, NOW + i * HOUR)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    settle()
    while (state := read_state("runs", "nightly")) and state.queued:
        run_pass("runs", together, NOW + 8 * HOUR)
        settle()
    expected = [f"nightly-{NOW + i * HOUR:%Y%m%dT%H}0000Z" for i in range(1, 9)]
    assert len(ran()) == len(set(ran()))
    if overlap == "queue":
        assert sorted(ran()) == expected
    assert set(ran()) <= set(expected)


def test_two_schedules_of_one_pipeline_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "import time; time.sleep(60)"
    monkeypatch.setattr(schedule_runs, "_command", lambda _schedule, _tick: ["-c", text])
    Path("second.yaml").write_text("name: second\n")
    names = ("nightly", "same", "other")
    chains = ("demo.yaml", "./demo.yaml", "second.yaml")
    three = [
        Schedule(name=name, chain=chain, cron="0 * * * *", overlap="queue")
        for name, chain in zip(names, chains, strict=True)
    ]
    assert [others_of(one, three) for one in three] == [["same"], ["nightly"], []]
    lines = []
    for now in (NOW - HOUR, NOW):
        for one in three:
            lines += run_pass("runs", one, now, others=others_of(one, three))[1]
    assert [line.split(",")[0] for line in lines] == [
        "nightly-20270328T120000Z: fire",
        "same-20270328T120000Z: queue",
        "other-20270328T120000Z: fire",
    ]
    schedule_runs.stop("runs", "other", "other-20270328T120000Z")
    schedule_runs.stop("runs", "nightly", "nightly-20270328T120000Z")
    _, lines = run_pass("runs", three[1], NOW, others=["nightly"])
    assert lines[0].startswith("same-20270328T120000Z: fire, it waited")
    schedule_runs.stop("runs", "same", "same-20270328T120000Z")


def command(*words: str) -> int:
    return schedule.command([*words, "--file", "s.yaml"])


@pytest.mark.usefixtures("clock")
def test_next_tells_both_times(capsys: pytest.CaptureFixture[str]) -> None:
    berlin = {"cron": "30 2 * * *", "time_zone": "Europe/Berlin"}
    write(berlin, {"name": "watch", "new_data": {"path": "in"}})
    assert command("next", "-n", "2") == 0
    assert capsys.readouterr().out == (
        "schedule  local                          UTC\n"
        "nightly   Mon 2027-03-29 02:30:00 +0200  2027-03-29T00:30:00Z\n"
        "nightly   Tue 2027-03-30 02:30:00 +0200  2027-03-30T00:30:00Z\n"
        "watch     when there is new data in in\n"
    )


def test_pause_and_resume_are_kept_and_shown(
    clock: Callable[[datetime], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write({"cron": "0 * * * *"})
    assert command("pause", "nightly", "--root", "elsewhere") == 0
    assert read_pause("elsewhere", "nightly").is_paused
    assert not read_pause("runs", "nightly").is_paused
    command("list", "--root", "elsewhere")
    assert "paused since 2027-03-28T12:00:05Z" in capsys.readouterr().out
    clock(NOW + HOUR)
    assert command("resume", "nightly", "--root", "elsewhere") == 0
    assert read_pause("elsewhere", "nightly").at == NOW + HOUR
    command("list", "--root", "elsewhere")
    assert "paused" not in capsys.readouterr().out


@pytest.mark.usefixtures("clock")
def test_resume_does_not_say_that_a_schedule_fires_that_is_off(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write({"cron": "0 * * * *", "enabled": False})
    assert command("pause", "nightly") == 0
    assert command("resume", "nightly") == 0
    assert capsys.readouterr().out == (
        "nightly is paused; it is also off (enabled: false)\n"
        "nightly is no longer paused, but it is off (enabled: false)\n"
    )


@pytest.mark.usefixtures("stub")
def test_once_fires_what_is_due_and_list_shows_it(
    clock: Callable[[datetime], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write({"cron": "0 * * * *"}, {"name": "other", "cron": "0 * * * *"})
    assert command("once", "--name", "nightly") == 0  # 5 s after the tick, for the first time
    assert "nightly-20270328T120000Z: fire" in capsys.readouterr().out
    settle()
    assert ran() == ["nightly-20270328T120000Z"]
    assert command("list") == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == [
        *["nightly", "0", "*", "*", "*", "*", "UTC", "on"],
        *["nightly-20270328T120000Z", "done", "demo.yaml"],
    ]
    clock(NOW + HOUR)
    command("once", "--name", "nightly")
    assert "nightly-20270328T130000Z: fire" in capsys.readouterr().out
    settle()


@pytest.mark.usefixtures("stub")
def test_once_says_that_nothing_is_due_and_why(
    clock: Callable[[datetime], None], caplog: pytest.LogCaptureFixture
) -> None:
    write(
        {"cron": "0 13 * * *"},
        {"name": "weekly", "cron": "0 14 * * *", "enabled": False},
        {"name": "yearly", "cron": "0 15 * * *", "enabled": False},
        {"name": "later", "cron": "0 16 * * *"},
    )
    clock(NOW)
    command("pause", "later")
    with caplog.at_level(logging.INFO):
        assert command("once") == 0
    assert caplog.messages == [
        "nothing due; 2 schedules are off; 1 schedule is paused; "
        "next is nightly at 2027-03-28T13:00:00Z"
    ]


@pytest.mark.usefixtures("stub")
def test_once_with_wait_stays_until_nothing_waits(
    clock: Callable[[datetime], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule_pass, "ONCE_POLL_S", 0.05)
    write({"cron": "0 * * * *", "catch_up": "all"})
    command("once")
    settle()
    clock(NOW + 3.2 * HOUR)
    command("once", "--wait")
    settle()
    assert [x[-7:] for x in ran()] == ["120000Z", "130000Z", "140000Z", "150000Z"]


@pytest.mark.parametrize("fault", [StorageError, DamagedFileError])
def test_a_fault_of_one_schedule_does_not_keep_the_others_from_their_turn(
    monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    turns: list[str] = []

    def run_pass_(_root: str, one: Schedule, *_: object, **__: object) -> None:
        turns.append(one.name)
        raise fault("down")

    monkeypatch.setattr(schedule_pass, "run_pass", run_pass_)
    write({"cron": "0 * * * *"}, {"name": "other", "cron": "0 * * * *"})
    with pytest.raises(StorageError, match="nightly: down\nother: down"):
        list(once(load_schedules(Path("s.yaml")), "runs", is_patient=True))
    assert turns == ["nightly", "other"]


@pytest.mark.usefixtures("stub", "clock")
def test_backfill_runs_ticks_of_the_past_in_order_and_leaves_out_those_that_ran(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "BACKFILL_POLL_S", 0.02)
    write({"cron": "0 */8 * * *", "time_zone": "Asia/Tokyo"})
    days = ("--from", "2027-03-26", "--to", "2027-03-26")
    assert command("backfill", "nightly", *days) == 0
    expected = ["20270325T150000Z", "20270325T230000Z", "20270326T070000Z"]
    assert ran() == [f"nightly-{x}" for x in expected]
    capsys.readouterr()
    assert command("backfill", "nightly", "--from", "2027-03-26", "--to", "2027-03-27") == 0
    assert ran()[3:] == [
        f"nightly-{x}" for x in ("20270326T150000Z", "20270326T230000Z", "20270327T070000Z")
    ]
    assert capsys.readouterr().out.splitlines()[:2] == [
        "nightly-20270325T150000Z: ran before, done",
        "nightly-20270325T230000Z: ran before, done",
    ]


@pytest.mark.usefixtures("clock")
def test_a_backfill_ends_at_now_and_tells_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule, "BACKFILL_POLL_S", 0.02)
    monkeypatch.setattr(schedule_runs, "_command", lambda *_: ["-c", "raise SystemExit(4)"])
    write({"cron": "0 12 * * *"})
    assert command("backfill", "nightly", "--from", "2027-03-28", "--to", "2028-01-01") == 1
    assert capsys.readouterr().out.startswith("nightly-20270328T120000Z: failed; ")
    assert len(list(Path("runs/schedules/nightly/ticks").iterdir())) == 1
    assert command("backfill", "nightly", "--from", "2028-01-01", "--to", "2028-01-02") == 0
    told = "nightly has no ticks from 2028-01-01 to 2028-01-02 that have passed\n"
    assert capsys.readouterr().out == told
    with pytest.raises(ConfigError, match="--from 2028-01-02 is after --to 2028-01-01"):
        command("backfill", "nightly", "--from", "2028-01-02", "--to", "2028-01-01")


def test_a_root_of_another_kind_is_refused() -> None:
    write({"cron": "0 * * * *"})
    with pytest.raises(ConfigError, match="--root: 'gs://x': only local paths and s3://"):
        command("list", "--root", "gs://x")


SERVE = """
import logging, sys
from datetime import UTC, datetime, timedelta
from pipelines.schedule import command as schedule
from pipelines.schedule import passes as schedule_pass
from pipelines.schedule import runs as schedule_runs
start = datetime.now(UTC)
# Each second of this process is a minute of the schedules.
schedule_pass.now_utc = lambda: start + 60 * (datetime.now(UTC) - start)
schedule_pass.PASS_S = 0.2
text = "import os; print(os.environ['MAE_SCHEDULE_TICK'], file=open('ran.txt', 'a'))"
schedule_runs._command = lambda _schedule, _tick: ["-c", text]
logging.basicConfig(level=logging.INFO, format="%(message)s")
sys.exit(schedule.command(["serve", "--file", "s.yaml"]))
"""


class Server:
    """`mae schedule serve` in its own process, with a clock that runs 60 times as fast."""

    def __init__(self, name: str) -> None:
        self.log = Path(f"{name}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE],
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 60
        while not is_so():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


def test_serve_survives_a_broken_file_and_a_restart_and_ends_on_sigterm() -> None:
    write({"cron": "* * * * *", "overlap": "queue"})
    servers = [Server("one"), Server("two")]
    try:
        servers[0].wait_for(lambda: len(ran()) >= 2)
        Path("s.yaml").write_text("schedules: [\n")
        servers[0].wait_for(lambda: "previous schedules stay in use" in servers[0].log.read_text())
        count = len(ran())
        servers[0].wait_for(lambda: len(ran()) >= count + 2)
        write({"cron": "0 0 1 1 *"}, {"name": "b", "cron": "* * * * *"})
        servers[0].wait_for(lambda: any(x.startswith("b-") for x in ran()))
    finally:
        codes = [server.stop() for server in servers]
    assert codes == [0, 0]
    assert servers[0].log.read_text().endswith("stopped; active runs continue\n")
    assert len(ran()) == len(set(ran()))  # two servers, and each tick once
