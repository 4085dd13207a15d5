"""The file of schedules: which pipeline runs when, or on what data.

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

NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"  # Kubernetes' and Ray's names begin with it
CRON_HINT = "minute hour day month weekday, such as '30 2 * * *' or '*/15 8-18 * * MON-FRI'"
TICK_WORDS = ("{tick}", "{tick_date}")
_ANY_TIME = datetime(2027, 1, 1, tzinfo=UTC)


class NewDataConfig(StrictConfig):
    path: str
    """Folder or s3://bucket/prefix to watch, with all below it."""
    settle_s: float = Field(default=300.0, ge=0)
    """It fires when the files have stayed as they are for so long."""
    poll_s: float = Field(default=60.0, gt=0)
    """Time between two looks."""

    @field_validator("path")
    @classmethod
    def _is_a_place(cls, path: str) -> str:
        storage.absolute(path)
        return path


class Schedule(StrictConfig):
    name: str = Field(pattern=NAME_PATTERN, max_length=35)
    """Starts the ids of its runs: a-z, 0-9 and -."""
    chain: str
    """The pipeline's file, as for `mae run`."""
    words: tuple[str, ...] = ()
    """Further words of `mae run`, such as pretrain.optim.epochs=5. `{tick}` becomes the time of
    the tick (2027-03-28T01:00:00Z), `{tick_date}` its day in `time_zone` (2027-03-28)."""
    cron: str | None = None
    """Minute, hour, day of the month, month, day of the week."""
    time_zone: str = "UTC"
    """Where `cron`'s clock hangs, such as Europe/Berlin."""
    new_data: NewDataConfig | None = None
    """Instead of `cron`: run when there is new data."""
    overlap: Literal["skip", "queue", "replace"] = "skip"
    """What a tick does while the run before it still goes on: nothing, wait, or stop that run."""
    catch_up: Literal["none", "latest", "all"] = "latest"
    """Which of the ticks that passed while no scheduler ran are run: none, the last, or all, one
    after another."""
    jitter_s: int = Field(default=0, ge=0, le=3600)
    """A tick waits up to so long, the same time whoever asks, so that not all start at once."""
    enabled: bool = True
    """Whether it fires."""

    @field_validator("words")
    @classmethod
    def _hold_no_secret(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse a password: words are arguments of a process, which all users can list."""
        for number, word in enumerate(words):
            if (shown := redact(word)) != word:
                raise ValueError(
                    f"word {number + 1} ({shown}) holds a password, which everyone on the machine "
                    "would see; give it by the environment, such as MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD"
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
        """What ticks follow from: when it changes, those before do not count."""
        on = f"{self.cron} {self.time_zone}" if self.new_data is None else self.new_data.path
        return on if self.enabled else f"off: {on}"


class ScheduleFile(StrictConfig):
    """What the file holds."""

    schedules: tuple[Schedule, ...]
    """Each with a name of its own."""


def check_cron(cron: str) -> None:
    """Raises: ValueError: not five fields of cron."""
    if len(cron.split()) != 5:
        raise ValueError(f"has {len(cron.split())} fields, not 5: {CRON_HINT}")
    try:
        CronSim(cron, _ANY_TIME)
    except CronSimError as error:
        raise ValueError(f"{error}; write {CRON_HINT}") from error


def load_schedules(file: Path) -> list[Schedule]:
    """Read the file, and look that the pipelines' files are there.

    Raises:
        ConfigError: names file, line, schedule and key of each mistake, and what to write.
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
    mistakes += [f"{file}: two schedules are called {name}; rename one" for name in twice]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return schedules


def find_schedule(schedules: list[Schedule], name: str) -> Schedule:
    """Raises: ConfigError: there is none of that name."""
    for schedule in schedules:
        if schedule.name == name:
            return schedule
    names = [schedule.name for schedule in schedules]
    there = f"there are {', '.join(names)}" if names else "the file has none"
    raise ConfigError(f"there is no schedule {name!r}{did_you_mean(name, names) or f'; {there}'}")


def _read_entries(file: Path) -> tuple[list[Any], list[int]]:
    """The entries below `schedules:`, and the line of each."""
    if not file.exists():
        raise ConfigError(
            f"{file}: no such file; write one as configs/schedules.yaml, or give --file FILE"
        )
    values, lines = read_config_file(file)
    if list(values) != ["schedules"]:
        raise ConfigError(f"{file}: has not one key, `schedules:`, with a list below it")
    entries = values["schedules"]
    if not isinstance(entries, list):
        raise ConfigError(f"{file} schedules: is no list; begin each with `- name: ...`")
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
