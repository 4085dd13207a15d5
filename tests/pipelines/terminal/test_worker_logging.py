"""What Ray's processes log: our own messages in full, and of Ray only what matters."""

import logging
import logging.config
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import redaction
from pipelines.terminal import worker_logging

NAMES = ("mae_core", "infra", "pipelines", "ray", "ray.data", "ray.train", "ray.tune")
BARS = "ray.data._internal.progress"
AUTOSCALER = "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Name the file of the workers' lines; the loggers are as before afterwards."""
    loggers = [logging.getLogger(name) for name in (*NAMES, BARS, AUTOSCALER)]
    before = [(one, [*one.handlers], one.propagate, one.level) for one in loggers]
    filters = [[*one.filters] for one in loggers]
    monkeypatch.setenv("MAE_WORKER_LOG", str(tmp_path / "workers.log"))
    yield tmp_path / "workers.log"
    for one, handlers, propagate, level in before:
        for handler in one.handlers:
            if handler not in handlers:
                handler.close()
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)
    for one, own_filters in zip(loggers, filters, strict=True):
        one.filters = own_filters


def test_our_messages_go_to_the_drivers_file(log: Path) -> None:
    worker_logging.set_up()
    logging.getLogger("pipelines.x").info("step 1")
    logging.getLogger("mae_core.y").debug("a detail")
    assert log.read_text() == "step 1\n"
    assert not logging.getLogger("pipelines").propagate  # Ray's handlers would repeat it


def test_of_ray_only_warnings_are_shown(log: Path) -> None:
    worker_logging.set_up()
    shown = {name: logging.getLogger(name).level for name in NAMES if name.startswith("ray")}
    assert set(shown.values()) == {logging.WARNING}


def test_ray_data_that_is_imported_later_shows_only_warnings(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_DATA_LOG_LEVEL", "")
    monkeypatch.delenv("RAY_DATA_LOG_LEVEL")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        worker_logging.set_up()
        for module in ("ray.data._internal.x", "pipelines.x"):
            warnings.warn_explicit("old", DeprecationWarning, f"{module}.py", 1, module)
    assert [warning.filename for warning in seen] == ["pipelines.x.py"]
    assert os.environ["RAY_DATA_LOG_LEVEL"] == "WARNING"


@pytest.mark.parametrize("name", [BARS, AUTOSCALER])
def test_warnings_of_what_passes_by_itself_are_not_shown(log: Path, name: str) -> None:
    worker_logging.set_up()
    shown: list[str] = []
    handler = logging.StreamHandler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    # As Ray Train's processes do later, which forgets the levels of the loggers below.
    level = {"ray": {"level": "DEBUG"}, "ray.data": {"level": "DEBUG"}}
    level["ray.train"] = {"level": "DEBUG"}
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "loggers": level})
    library = logging.getLogger(".".join(name.split(".")[:2]))
    library.handlers, library.propagate = [handler], False
    logging.getLogger(name).warning("passes")
    logging.getLogger(name).error("stays")
    assert shown == ["stays"]


def test_a_secret_is_not_logged(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-1")
    redaction.redact_logs()
    worker_logging.set_up()
    logging.getLogger("infra.z").info("key planted-secret-1")
    assert log.read_text() == "key ***\n"


def test_lines_are_passed_on_as_they_come_and_the_last_is_not_lost(tmp_path: Path) -> None:
    file, written = tmp_path / "workers.log", list[str]()
    before = worker_logging.num_lines_shown()
    with worker_logging.shown(file, written.append):
        for word in ("early", "late"):
            with file.open("a") as stream:
                stream.write(f"{word}\n")
            deadline_s = time.monotonic() + 20
            while word == "early" and not written:
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
    assert "".join(written) == "early\nlate\n"
    assert worker_logging.num_lines_shown() == before + 2


@pytest.mark.parametrize(
    ("name", "level", "place", "is_shown"),
    [
        ("matplotlib.font_manager", logging.INFO, "/venv/site-packages/matplotlib/x.py", False),
        ("matplotlib.font_manager", logging.WARNING, "/venv/site-packages/matplotlib/x.py", True),
        ("pipelines.embed", logging.INFO, "/venv/site-packages/pipelines/embed.py", True),
        ("mae_stage_count", logging.INFO, "/home/me/my_stages/count.py", True),
        ("root", logging.INFO, "/home/me/my_stages/count.py", True),
    ],
)
def test_the_news_of_libraries_is_not_for_the_user(
    monkeypatch: pytest.MonkeyPatch, name: str, level: int, place: str, is_shown: bool
) -> None:
    shown: list[str] = []
    handler = logging.StreamHandler()
    monkeypatch.setattr(handler, "emit", lambda record: shown.append(record.name))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    worker_logging.hide_libraries()
    handler.handle(logging.LogRecord(name, level, place, 1, "generated new x", None, None))
    assert shown == ([name] if is_shown else [])
