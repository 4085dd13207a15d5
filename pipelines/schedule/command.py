"""`mae schedule`: run pipelines at set times, or when there is new data.

serve              start due runs until it is stopped; runs continue after that
once               check once for due runs, for systemd, cron or Kubernetes
next               show the next times, local and in UTC
pause, resume      pause a schedule; ticks that pass meanwhile never fire
list               show the schedules and their states
backfill           run ticks of the past one after another, except those that ran
render             write Kubernetes manifests
"""

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from infra import storage
from infra.cluster import ClusterConfig, ClusterConfigError, load_cluster
from infra.kuberay import dump, render_cron_job, render_ray_cron_job
from infra.pods import Manifest
from infra.redaction import redact
from pipelines import driver
from pipelines.outcome import ConfigError
from pipelines.schedule.config import TICK_WORDS, Schedule, find_schedule, load_schedules
from pipelines.schedule.passes import now_utc, once, serve
from pipelines.schedule.runs import read_pause, read_state, status, submit, write_pause
from pipelines.schedule.times import Pause, jitter, next_ticks, tick_of, ticks_between

logger = logging.getLogger(__name__)

DEFAULT_FILE = Path("configs/schedules.yaml")
DEFAULT_CLUSTER = Path("configs/cluster/kuberay.yaml")
BACKFILL_POLL_S = 2.0
FAILED = 1  # exit code of a backfill in which a run failed


def command(words: Sequence[str]) -> int:
    """Run `mae schedule WORDS`; return the exit code."""
    arguments = _parse(words)
    driver.check_paths([("--root", arguments.root)])
    if arguments.action == "serve":
        return serve(arguments.file, arguments.root)
    schedules = load_schedules(arguments.file)
    name = getattr(arguments, "name", None)
    chosen = [find_schedule(schedules, name)] if name else schedules
    if arguments.action == "once":
        lines = once(schedules, arguments.root, name, is_patient=arguments.wait)
        has_done = False
        for line in lines:
            _say(line)
            has_done = True
        if not has_done:
            # Not to stdout, because cron would send a mail for each call.
            logger.info("%s", _nothing_due(chosen, arguments.root))
        return 0
    if arguments.action == "backfill":
        return _backfill(chosen[0], arguments.root, arguments.start, arguments.end)
    if arguments.action in ("pause", "resume"):
        _pause(chosen[0], arguments.root, is_paused=arguments.action == "pause")
    elif arguments.action == "next":
        _say(_table(_next_rows(chosen, arguments.root, arguments.count)))
    elif arguments.action == "list":
        _say(_table(_list_rows(chosen, arguments.root)))
    else:
        _render(chosen, arguments)
    return 0


def _parse(words: Sequence[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--file", type=Path, default=DEFAULT_FILE, help=f"default: {DEFAULT_FILE}")
    common.add_argument(
        "--root",
        default=os.environ.get("MAE__STORAGE__ROOT") or "runs",
        help="where the scheduler keeps its state; default: MAE__STORAGE__ROOT, or runs",
    )
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    parser = argparse.ArgumentParser(
        prog="mae schedule",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ("serve", "once", "next", "pause", "resume", "list", "backfill", "render")
    actions = parser.add_subparsers(dest="action", required=True, metavar=" | ".join(names))
    added = {name: actions.add_parser(name, parents=[common]) for name in names}
    for name in ("once", "next"):
        added[name].add_argument("--name", help="only this schedule")
    added["once"].add_argument(
        "--wait", action="store_true", help="continue until no tick waits for another or its jitter"
    )
    added["next"].add_argument("-n", dest="count", type=int, default=5, help="how many; default: 5")
    for name in ("pause", "resume", "backfill"):
        added[name].add_argument("name")
    for option, target in (("--from", "start"), ("--to", "end")):
        added["backfill"].add_argument(
            option, dest=target, type=_day, required=True, metavar="YYYY-MM-DD"
        )
    added["render"].add_argument("--ray-cron-job", action="store_true", help="KubeRay's, alpha")
    added["render"].add_argument("--cluster", type=Path, default=DEFAULT_CLUSTER)
    added["render"].add_argument("--out", type=Path, help="file to write instead of stdout")
    return parser.parse_args(words)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day; write 2027-03-28") from None


def _say(text: str) -> None:
    sys.stdout.write(f"{redact(text.rstrip())}\n")
    sys.stdout.flush()


def _pause(schedule: Schedule, root: str, *, is_paused: bool) -> None:
    write_pause(root, schedule.name, Pause(is_paused=is_paused, at=now_utc()))
    if schedule.enabled:
        what = "is paused" if is_paused else "fires again, except for ticks that passed meanwhile"
    else:
        what = "is paused; it is also off" if is_paused else "is no longer paused, but it is off"
        what += " (enabled: false)"
    _say(f"{schedule.name} {what}")


def _next_rows(schedules: Iterable[Schedule], root: str, count: int) -> Iterator[list[str]]:
    yield ["schedule", "local", "UTC", ""]
    for schedule in schedules:
        note = _note(schedule, read_pause(root, schedule.name))
        if schedule.new_data is not None:
            where = f"when there is new data in {schedule.new_data.path}"
            yield [schedule.name, where, "", note]
            continue
        zone = ZoneInfo(schedule.time_zone)
        for at in next_ticks(schedule, now_utc(), count):
            fires_at = at + jitter(schedule, at)
            local = fires_at.astimezone(zone)
            yield [schedule.name, f"{local:%a %Y-%m-%d %H:%M:%S %z}", _utc(fires_at), note]


def _nothing_due(schedules: Iterable[Schedule], root: str) -> str:
    """Explain why nothing was due: what is off or paused, and which schedule fires next."""
    counts: Counter[str] = Counter()
    ticks: list[tuple[datetime, str]] = []
    for schedule in schedules:
        note = _note(schedule, read_pause(root, schedule.name))
        if note:
            counts[note.split()[0]] += 1
        elif schedule.new_data is not None:
            counts["without new data"] += 1
        else:
            coming = next_ticks(schedule, now_utc(), 1)
            ticks += [(at + jitter(schedule, at), schedule.name) for at in coming]
    parts = [
        f"{count} schedule{' is' if count == 1 else 's are'} {state}"
        for state, count in counts.items()
    ]
    if ticks:
        at, name = min(ticks)
        parts.append(f"next is {name} at {_utc(at)}")
    return "; ".join(["nothing due", *parts])


def _note(schedule: Schedule, pause: Pause) -> str:
    if not schedule.enabled:
        return "off"
    return f"paused since {_utc(pause.at)}" if pause.is_paused else ""


def _utc(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _list_rows(schedules: Iterable[Schedule], root: str) -> Iterator[list[str]]:
    yield ["schedule", "when", "state", "running", "waiting", "last", "pipeline"]
    for schedule in schedules:
        state = read_state(root, schedule.name)
        running, queued, last = "", 0, ""
        if state is not None:
            running, queued, last = state.running or "", len(state.queued), state.last
        if running and (how := status(root, schedule.name, running)) != "running":
            running, last = "", f"{running} {how}"
        on = f"{schedule.cron} {schedule.time_zone}"
        when = on if schedule.new_data is None else f"new data in {schedule.new_data.path}"
        note = _note(schedule, read_pause(root, schedule.name)) or "on"
        yield [schedule.name, when, note, running, str(queued or ""), last, schedule.chain]


def _table(rows: Iterable[list[str]]) -> str:
    kept = list(rows)
    widths = [max(map(len, column)) for column in zip(*kept, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in kept)
    return "\n".join(line.rstrip() for line in lines)


def _backfill(schedule: Schedule, root: str, start: date, end: date) -> int:
    """Run the ticks from one day to another, inclusive, in the schedule's zone, up to now."""
    if schedule.cron is None:
        raise ConfigError(f"{schedule.name}: new_data has no ticks in the past; use `mae run`")
    if start > end:
        raise ConfigError(f"--from {start} is after --to {end}; exchange them")
    zone = ZoneInfo(schedule.time_zone)
    first = datetime(start.year, start.month, start.day, tzinfo=zone).astimezone(UTC)
    after_end = datetime(end.year, end.month, end.day, tzinfo=zone) + timedelta(days=1)
    before = min(after_end.astimezone(UTC), now_utc())
    instant = timedelta(microseconds=1)
    has_failed = False
    ticks = list(ticks_between(schedule, first - instant, before - instant))
    if not ticks:
        _say(f"{schedule.name} has no ticks from {start} to {end} that have passed")
    for at in ticks:
        state = read_state(root, schedule.name)
        if state is not None and state.running is not None:
            _wait_for(root, schedule.name, state.running)
        tick = tick_of(schedule, at)
        submission = submit(root, schedule, tick)
        if submission is None:
            _say(f"{tick.id}: ran before, {status(root, schedule.name, tick.id)}")
            continue
        logger.info("%s: started; %s", tick.id, submission.log)
        how = _wait_for(root, schedule.name, tick.id)
        has_failed = has_failed or how == "failed"
        _say(f"{tick.id}: {how}; {submission.log}")
    return FAILED if has_failed else 0


def _wait_for(root: str, name: str, tick_id: str) -> str:
    while (how := status(root, name, tick_id)) == "running":
        time.sleep(BACKFILL_POLL_S)
    return how


def _render(schedules: Iterable[Schedule], arguments: argparse.Namespace) -> None:
    try:
        config = load_cluster(arguments.cluster)
        rendered = [_manifest(schedule, config, arguments) for schedule in schedules]
    except ClusterConfigError as error:
        raise ConfigError(str(error)) from error
    text = dump([manifest for manifest in rendered if manifest is not None])
    if arguments.out is None:
        _say(text)
    else:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)
        _say(str(arguments.out))


def _manifest(
    schedule: Schedule, config: ClusterConfig, arguments: argparse.Namespace
) -> Manifest | None:
    """Render a schedule; one that is off and can't be rendered is left out with a warning."""
    try:
        if arguments.ray_cron_job:
            return _ray_cron_job(schedule, config)
        return _cron_job(schedule, config, arguments.file)
    except ConfigError as error:
        if schedule.enabled:
            raise
        logger.warning("%s is off and left out: %s", schedule.name, error)
        return None


def _cron_job(schedule: Schedule, config: ClusterConfig, file: Path) -> Manifest:
    """Render a CronJob whose pod makes the pass that fires; its state is in the object store."""
    if file.is_absolute():
        raise ConfigError(f"--file {file}: give it relative to the project, as the image has it")
    once = ["mae", "schedule", "once", "--name", schedule.name, "--file", file.as_posix(), "--wait"]
    cron = schedule.cron
    if cron is None:
        assert schedule.new_data is not None
        if not storage.is_remote(schedule.new_data.path):
            raise ConfigError(f"{schedule.name}: new_data.path: a pod sees s3://bucket/prefix only")
        cron = _every(schedule.new_data.poll_s)
    return render_cron_job(
        schedule.name,
        cron=cron,
        time_zone=schedule.time_zone,
        command=once,
        config=config,
        overlap=schedule.overlap,
        catch_up=schedule.catch_up,
        suspend=not schedule.enabled,
    )


def _every(seconds: float) -> str:
    """Return the nearest interval that cron can express."""
    minutes = max(1, round(seconds / 60))
    return f"*/{minutes} * * * *" if minutes < 60 else f"0 */{min(minutes // 60, 23)} * * *"


def _ray_cron_job(schedule: Schedule, config: ClusterConfig) -> Manifest:
    if schedule.cron is None:
        raise ConfigError(
            f"{schedule.name}: RayCronJob does not support new_data; leave out --ray-cron-job"
        )
    if any(mark in word for word in schedule.words for mark in TICK_WORDS):
        raise ConfigError(
            f"{schedule.name}: RayCronJob does not support {{tick}}; leave out --ray-cron-job"
        )
    return render_ray_cron_job(
        schedule.name,
        cron=schedule.cron,
        time_zone=schedule.time_zone,
        command=["mae", "run", schedule.chain, *schedule.words],
        config=config,
        suspend=not schedule.enabled,
    )
