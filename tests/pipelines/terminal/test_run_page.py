"""A person at a terminal is told where the run's page is; a program is not."""

import pytest

from infra.config import TrackingConfig
from pipelines.terminal import run_page

SEE = "to see this run and compare it with others"


class Config:
    tracking = TrackingConfig(uri="http://h:5000")


@pytest.mark.parametrize(
    ("is_terminal", "run_id", "said"),
    [(True, "r1", f"{SEE}: open http://h:5000/#/r1\n"), (False, "r1", ""), (True, None, "")],
)
def test_the_page_is_named_for_a_person(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
    run_id: str | None,
    said: str,
) -> None:
    monkeypatch.setattr(run_page.tracking, "run_link", lambda _uri, run: f"#/{run}")
    monkeypatch.setattr(run_page.sys.stdout, "isatty", lambda: is_terminal)
    run_page.say_run_page(Config(), run_id)
    assert capsys.readouterr().err == said


def test_a_store_in_a_file_needs_the_command_that_serves_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_page.tracking, "run_link", lambda _uri, run: f"#/{run}")
    assert run_page.how_to_open("sqlite:////my runs/m.db", "r1") == (
        "mlflow ui --backend-store-uri 'sqlite:////my runs/m.db', then open http://127.0.0.1:5000/#/r1"
    )
