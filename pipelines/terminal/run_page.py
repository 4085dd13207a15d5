"""Tell a person how to find the page of a run."""

import shlex
import sys

from infra import tracking
from infra.mlflow_client import SQLITE_SCHEME

LOCAL_UI = "http://127.0.0.1:5000"  # where `mlflow ui` serves by default


def say_run_page(config: object, run_id: str | None) -> None:
    """Tell a person at a terminal how to open the run's page, as the last line of a command."""
    track = getattr(config, "tracking", None)
    if track is not None and run_id is not None and sys.stdout.isatty():
        sys.stderr.write(f"{how_to_see(track.uri, run_id)}\n")


def how_to_see(uri: str, run_id: str) -> str:
    """Return a line that says how to see a run, and compare it with others."""
    return f"to see this run and compare it with others: {how_to_open(uri, run_id)}"


def how_to_open(uri: str, run_id: str) -> str:
    """Return the address of a run's page, or the command that serves it, then the address."""
    link = tracking.run_link(uri, run_id)
    if not uri.startswith(SQLITE_SCHEME):
        return f"open {uri.rstrip('/')}/{link}"
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}, then open {LOCAL_UI}/{link}"
