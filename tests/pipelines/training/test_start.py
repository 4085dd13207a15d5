"""How the workers of a run are started."""

from typing import Any

import pytest

from mae_core.data.samples import DataError
from pipelines.training import start
from pipelines.training.checkpoints import StartAgainError


def test_workers_that_set_a_checkpoint_aside_start_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where Ray may not start them again, or wraps what they raised."""
    wrapped = RuntimeError("two")
    wrapped.__cause__ = StartAgainError("two")
    ends: list[Exception | None] = [StartAgainError("one"), wrapped, None]

    def end(*_: object) -> None:
        if (error := ends.pop(0)) is not None:
            raise error

    monkeypatch.setattr(start, "_fit_once", end)
    job: Any = None
    start.fit(job, None)
    assert ends == []
    ends.append(DataError("a label is wrong"))
    with pytest.raises(DataError):
        start.fit(job, None)
