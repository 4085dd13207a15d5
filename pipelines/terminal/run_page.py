"""Where a person finds the page of a run."""

import sys

from infra import tracking


def say_run_page(config: object, run_id: str | None) -> None:
    """Tell a person at a terminal how to open the run's page, as the last line of a command."""
    track = getattr(config, "tracking", None)
    if track is not None and run_id is not None and sys.stdout.isatty():
        sys.stderr.write(f"the run's page: {tracking.how_to_open(track.uri, run_id)}\n")
