"""No command is silent for long: a bar on a terminal, occasional lines elsewhere."""

import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from infra.redaction import RedactionFilter
from pipelines import prepare, validate
from pipelines.config.prepare import PrepareConfig
from pipelines.config.validate import ValidateConfig
from pipelines.packing import existing as existing_shards
from pipelines.terminal import progress, worker_logging
from pipelines.terminal.progress import Progress
from tests.pipelines.packed_sets import pack, write_image


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def wait_for(text: str, stream: io.StringIO) -> None:
    deadline_s = time.monotonic() + 20
    while text not in stream.getvalue():
        assert time.monotonic() < deadline_s, stream.getvalue()
        time.sleep(0.02)


@contextmanager
def seen_on_a_terminal() -> Iterator[Terminal]:
    """Make stderr a terminal that gets our logs. Not a fixture: pytest sets stderr after those."""
    stream, ours = Terminal(), logging.getLogger("pipelines")
    handler = logging.StreamHandler(stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.sys, "stderr", stream)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(ours, "handlers", [handler])
        patch.setattr(ours, "level", logging.INFO)
        yield stream


def test_a_terminal_gets_a_bar_and_what_is_said_comes_above_it() -> None:
    state = Progress("training", 40, 80, "loss=0.5 eta=0m25s")
    with seen_on_a_terminal() as terminal, progress.doing("starting", lambda: state):
        wait_for("training  50%|", terminal)
        logging.getLogger("pipelines.x").info("a line")
        wait_for("a line\n", terminal)
    assert "40/80, loss=0.5 eta=0m25s" in terminal.getvalue()
    assert "still" not in terminal.getvalue()


def test_a_line_above_the_bar_comes_once_and_redacted(caplog: pytest.LogCaptureFixture) -> None:
    root, ours = logging.getLogger(), logging.getLogger("pipelines")
    caplog.set_level(logging.INFO, logger="pipelines")
    with seen_on_a_terminal() as terminal, pytest.MonkeyPatch.context() as patch:
        handler = logging.StreamHandler(terminal)
        handler.addFilter(RedactionFilter())
        patch.setattr(root, "handlers", [handler])  # as in a command that has started no Ray
        patch.setattr(ours, "handlers", [])
        patch.setattr(ours, "propagate", True)
        with progress.doing("packing"):
            logging.getLogger("pipelines.x").info("store s3://me:geheim@host/x")
    told = [line for line in terminal.getvalue().splitlines() if "host/x" in line]
    assert [line.strip() for line in told] == ["store s3://***@host/x"]


def test_what_can_not_be_counted_is_told_with_its_time() -> None:
    with seen_on_a_terminal() as terminal, progress.doing("starting Ray"):
        wait_for("starting Ray ... 0m00s", terminal)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "silence_limit_s", lambda _: 0.0)
    monkeypatch.setattr(progress, "DRAW_EVERY_S", 0.01)


def wait_for_line(text: str, caplog: pytest.LogCaptureFixture) -> None:
    deadline_s = time.monotonic() + 20
    while not any(text in line for line in caplog.messages):
        assert time.monotonic() < deadline_s, caplog.messages
        time.sleep(0.01)


@pytest.mark.usefixtures("impatient")
def test_a_pipe_gets_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    state = Progress("kNN evaluation", 3, 12)
    with progress.doing("starting the workers", lambda: state):
        wait_for_line("still kNN evaluation, 3 of 12, after 0m00s", caplog)
    assert caplog.messages[0] == "starting the workers ..."


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("module", "slow", "told"),
    [
        (prepare, "_pack_shards", "still packing shards, 0 of 2, images=0, after 0m00s"),
        (existing_shards, "_index_all", "still indexing tars, 0 of 2, after 0m00s"),
        (validate, "_look_at", "still checking images, 0 of 8, after 0m00s"),
    ],
)
def test_what_reads_many_images_tells_how_far_it_is(
    module: ModuleType,
    slow: str,
    told: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    at_once = getattr(module, slow)

    def slowly(*arguments: object) -> Iterator[object]:
        wait_for_line(told, caplog)
        yield from at_once(*arguments)

    monkeypatch.setattr(module, slow, slowly)
    source, output = tmp_path / "source", tmp_path / "out"
    for i in range(8):
        write_image(source / f"{i}.png", np.full((8, 8, 3), i, np.uint8))
    pack(source, output, samples_per_shard=4)
    prepare.run(PrepareConfig(existing="index", output=str(output), workers=1), fresh=True)
    validate.run(
        ValidateConfig.model_validate(
            {"data": str(output), "storage": {"root": str(tmp_path / "runs")}}
        ),
        fresh=False,
    )


@pytest.mark.usefixtures("impatient")
def test_what_workers_say_is_no_silence(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "silence_limit_s", lambda _: 1000.0)
    lines = progress._Lines("training")
    lines._since_s -= 999.9
    monkeypatch.setattr(worker_logging, "num_lines_shown", lambda: 7)
    lines.show(Progress("training"))
    lines._since_s -= 999.9
    lines.show(Progress("training"))
    assert caplog.messages == ["training ..."]
    lines._since_s -= 999.9
    lines.show(Progress("training"))
    assert caplog.messages[-1].startswith("still training")


def test_long_runs_need_fewer_lines() -> None:
    limits = [progress.silence_limit_s(elapsed_s) for elapsed_s in (0, 30, 100, 86400)]
    assert limits == [4.0, 4.0, 10.0, 60.0]


def test_no_bar_is_drawn_where_other_machines_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    with seen_on_a_terminal():
        assert progress.shows_bar()
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
        assert not progress.shows_bar()


def test_seconds_are_told_in_minutes_and_hours() -> None:
    shown = [progress.format_seconds(s) for s in (0.4, 59.6, 3599, 3600, 90061)]
    assert shown == ["0m00s", "1m00s", "59m59s", "1h00m", "25h01m"]
