"""A person at a terminal is told where the run's page is; a program is not."""

import pytest

from infra.config import TrackingConfig
from pipelines.terminal import run_page


class Config:
    tracking = TrackingConfig(uri="http://h:5000")


@pytest.mark.parametrize(
    ("is_terminal", "run_id", "said"),
    [(True, "r1", "the run's page: http://h:5000 r1\n"), (False, "r1", ""), (True, None, "")],
)
def test_the_page_is_named_for_a_person(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
    run_id: str | None,
    said: str,
) -> None:
    monkeypatch.setattr(run_page.tracking, "how_to_open", lambda uri, run: f"{uri} {run}")
    monkeypatch.setattr(run_page.sys.stdout, "isatty", lambda: is_terminal)
    run_page.say_run_page(Config(), run_id)
    assert capsys.readouterr().err == said
