"""The file of schedules: which pipeline runs when, or for which new data.

Imports no torch, Ray or MLflow.
"""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self
from zoneinfo import available_timezones

from cronsim import CronSim, CronSimError
from pydantic import Field, ValidationError, field_validator, model_validator

from infra import storage
from infra.redaction import redact
from infra.typed_text import typed
from infra.yaml_files import YamlFileError
from mae_core.config import StrictConfig
from pipelines.config.fields import did_you_mean
from pipelines.config.loading import near_file, read_config_file, shown
from pipelines.outcome import ConfigError

SCHEDULE_NAME_PATTERN = (
    r"^[a-z]([-a-z0-9]*[a-z0-9])?$"  # becomes a prefix of Kubernetes and Ray names
)
CRON_HINT = "minute hour day month weekday, such as '30 2 * * *' or '*/15 8-18 * * MON-FRI'"
TICK_WORDS = ("{tick}", "{tick_date}")
_ANY_TIME = datetime(2027, 1, 1, tzinfo=UTC)


class NewDataConfig(StrictConfig):
    path: str
    """Folder or s3://bucket/prefix to watch, including subfolders."""
    settle_s: float = Field(default=300.0, ge=0)
    """Seconds for which the files must be unchanged before it fires."""
    poll_s: float = Field(default=60.0, gt=0)
    """Seconds between two checks."""

    @field_validator("path")
    @classmethod
    def _is_a_place(cls, path: str) -> str:
        storage.absolute(path)
        return path


class Schedule(StrictConfig):
    name: str = Field(pattern=SCHEDULE_NAME_PATTERN, max_length=35)
    """Prefix of the ids of its runs: a-z, 0-9 and -."""
    chain: str
    """The pipeline's file, as for `mae run`."""
    words: tuple[str, ...] = ()
    """Additional words of `mae run`, such as pretrain.optim.epochs=5. `{tick}` is replaced by the
    time of the tick (2027-03-28T01:00:00Z), `{tick_date}` by its day in `time_zone`
    (2027-03-28)."""
    cron: str | None = None
    """Minute, hour, day of the month, month, day of the week."""
    time_zone: str = "UTC"
    """Time zone of `cron`, such as Europe/Berlin."""
    new_data: NewDataConfig | None = None
    """Instead of `cron`: run when there is new data."""
    overlap: Literal["skip", "queue", "replace"] = "skip"
    """What a tick does while the previous run is still active: nothing, wait, or stop that run."""
    catch_up: Literal["none", "latest", "all"] = "latest"
    """Which of the ticks that passed while no scheduler ran are run: none, the latest, or all, one
    after another."""
    jitter_s: int = Field(default=0, ge=0, le=3600)
    """Longest delay of a tick in seconds, fixed for each tick, so that not all start at once."""
    enabled: bool = True
    """Whether the schedule fires."""

    @field_validator("words")
    @classmethod
    def _hold_no_secret(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse a password: words are a process's arguments, which all users can list."""
        for number, word in enumerate(words):
            if (shown := redact(word)) != word:
                raise ValueError(
                    f"word {number + 1} ({shown}) contains a password, which everyone on the "
                    "machine would see; set it in the environment, such as "
                    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
                )
        return words

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, cron: str | None) -> str | None:
        if cron is not None:
            check_cron(cron)
        return cron

    @field_validator("time_zone")
    @classmethod
    def _is_time_zone(cls, name: str) -> str:
        names = available_timezones()
        if name not in names:
            raise ValueError(f"no such time zone{did_you_mean(name, names)}")
        return name

    @model_validator(mode="after")
    def _one_trigger(self) -> Self:
        if (self.cron is None) == (self.new_data is None):
            raise ValueError(f"give one of cron ({CRON_HINT}) and new_data (path: FOLDER)")
        if self.new_data is not None:
            if any(mark in word for word in self.words for mark in TICK_WORDS):
                raise ValueError("words: {tick} is a time, and new_data has none; use cron")
            if self.jitter_s:
                raise ValueError("jitter_s: needs cron; new_data has settle_s")
        return self

    @property
    def trigger(self) -> str:
        """Determines the ticks: when it changes, earlier ticks do not count."""
        on = f"{self.cron} {self.time_zone}" if self.new_data is None else self.new_data.path
        return on if self.enabled else f"off: {on}"


class ScheduleFile(StrictConfig):
    """The content of the file."""

    schedules: tuple[Schedule, ...]
    """The schedules, each with a unique name."""


def check_cron(cron: str) -> None:
    """Raise a ValueError if the text is not five cron fields."""
    if len(cron.split()) != 5:
        raise ValueError(f"has {len(cron.split())} fields, not 5: {CRON_HINT}")
    try:
        CronSim(cron, _ANY_TIME)
    except CronSimError as error:
        raise ValueError(f"{error}; write {CRON_HINT}") from error


def load_schedules(file: Path) -> list[Schedule]:
    """Read the file, and check that the pipelines' files exist.

    Raises:
        ConfigError: Names file, line, schedule and key of each mistake, and what to write.
    """
    entries, lines = _read_entries(file)
    mistakes: list[str] = []
    schedules: list[Schedule] = []
    for entry, line in zip(entries, lines, strict=True):
        name = entry.get("name", "?") if isinstance(entry, dict) else "?"
        place = f"{file}:{line} schedule {name}"
        try:
            schedule = Schedule.model_validate(typed(Schedule, entry))
        except YamlFileError as error:
            mistakes.append(str(error))
            continue
        except ValidationError as error:
            mistakes += [f"{place}: {_explain(dict(e))}" for e in error.errors()]
            continue
        if not Path(schedule.chain).is_file():
            near = near_file(Path(schedule.chain))
            mistakes.append(f"{place}: chain: no such file {schedule.chain}{near}")
        schedules.append(schedule)
    twice = [name for name, count in Counter(x.name for x in schedules).items() if count > 1]
    mistakes += [f"{file}: two schedules have the name {name}; rename one" for name in twice]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return schedules


def find_schedule(schedules: list[Schedule], name: str) -> Schedule:
    """Return the schedule with a name, or raise a ConfigError if there is none."""
    for schedule in schedules:
        if schedule.name == name:
            return schedule
    names = [schedule.name for schedule in schedules]
    there = f"there are {', '.join(names)}" if names else "the file has none"
    raise ConfigError(f"there is no schedule {name!r}{did_you_mean(name, names) or f'; {there}'}")


def _read_entries(file: Path) -> tuple[list[Any], list[int]]:
    """Return the entries below `schedules:`, and the line of each."""
    if not file.exists():
        raise ConfigError(
            f"{file}: no such file; write one like configs/schedules.yaml, or give --file FILE"
        )
    values, lines = read_config_file(file)
    if list(values) != ["schedules"]:
        raise ConfigError(f"{file}: needs exactly one key, `schedules:`, with a list below it")
    entries = values["schedules"]
    if not isinstance(entries, list):
        raise ConfigError(f"{file} schedules: is not a list; begin each with `- name: ...`")
    return entries, [lines[f"schedules.{number}"] for number in range(len(entries))]


def _explain(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    place = f"{key}: " if key else ""
    if error["type"] == "extra_forbidden":
        owner = NewDataConfig if key.startswith("new_data.") else Schedule
        last = str(error["loc"][-1])
        near = did_you_mean(last, owner.model_fields)
        there = ", ".join(owner.model_fields)
        return f"{place}no such key{near or f'; there are: {there}'}"
    if error["type"] == "missing":
        return f"{place}is needed"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}{message}{shown(error.get('input'))}"
