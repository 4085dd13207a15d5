"""How a run of a pipeline is named in MLflow, and what the last line says about it."""

import pytest

from pipelines.chain import run

NAME = "2026-11-27T101703.123Z"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({}, "11-27 10:17 demo"),
        ({"pretrain.masking.mask_ratio": "0.5"}, "mask_ratio=0.5 11-27 10:17 demo"),
        ({"a.x": "1", "a.y": "2"}, "x=1 y=2 11-27 10:17 demo"),
    ],
)
def test_what_differs_between_runs_is_at_the_beginning_of_the_name(
    given: dict[str, str], shown: str
) -> None:
    assert run._shown_name("demo", NAME, given) == shown


def test_the_name_of_a_run_sorts_by_time_and_has_milliseconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run.time, "time", lambda: 1795774623.0625)
    assert run._name_of_now() == "2026-11-27T101703.062Z"
