"""How a stage's process ended is told by its exit code and its last line."""

import time

import pytest

from pipelines.chain.execute import Failure
from pipelines.chain.process import StageProcess
from pipelines.outcome import StageResult


def ended(*words: str) -> StageResult | Failure:
    """Run `mae WORDS` and wait until it has ended."""
    process = StageProcess("a", list(words))
    deadline_s = time.monotonic() + 60
    while (found := process.poll()) is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return found


def failure(exit_code: int, **fields: object) -> Failure:
    process = StageProcess("a", ["--version"])
    process.wait_until_stopped()
    process._tail.extend(["first", "last"])
    return process._failure(exit_code, fields)


def test_an_error_of_the_stage_is_told_in_its_words() -> None:
    assert ended("pretrain", "optim.epohcs=1", "data.train=/d") == Failure(
        "command line optim.epohcs: no such key; did you mean optim.epochs?", 2, can_pass=False
    )


@pytest.mark.parametrize(
    ("exit_code", "fields", "expected"),
    [
        (-9, {}, Failure("its process was killed by SIGKILL", 5, can_pass=True)),
        (130, {"can_pass": True}, Failure("it was stopped from outside", 130, can_pass=False)),
        (143, {"can_pass": True}, Failure("it was stopped from outside", 143, can_pass=False)),
        (5, {"error": "down", "can_pass": True}, Failure("down", 5, can_pass=True)),
        (1, {}, Failure("first\nlast", 1, can_pass=False)),
    ],
)
def test_how_it_ended_decides_whether_it_is_tried_again(
    exit_code: int, fields: dict[str, object], expected: Failure
) -> None:
    assert failure(exit_code, **fields) == expected


def test_an_end_without_a_result_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ended("--version")
    assert isinstance(found, Failure)
    assert found.exit_code == 0
