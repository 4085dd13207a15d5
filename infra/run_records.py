"""Read how a run ended according to MLflow, without loading MLflow if its store is a SQLite file.

The plan of a pipeline needs this for each existing result, and loading MLflow takes seconds.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote

SQLITE_SCHEME = "sqlite:///"
_STATES = ("FINISHED", "FAILED", "KILLED", "RUNNING", "SCHEDULED")


def run_status(uri: str, run_id: str | None) -> str:
    """Return how a run ended, as `infra.tracking.run_status` does."""
    if run_id is None:
        return "MISSING"
    if uri.startswith(SQLITE_SCHEME):
        place = unquote(uri.removeprefix(SQLITE_SCHEME).partition("?")[0])
        status = _read_status(Path(place), run_id)
        if status is not None:
            return status
    # Imported here, because it loads MLflow.
    from infra import tracking

    return tracking.run_status(uri, run_id)


def _read_status(file: Path, run_id: str) -> str | None:
    """Read a run's status from MLflow's tables; None if they are not as we know them."""
    if not file.is_file():
        return None
    place = f"file:{quote(str(file.absolute()))}?mode=ro"
    query = "SELECT status, lifecycle_stage FROM runs WHERE run_uuid = ?"
    try:
        with closing(sqlite3.connect(place, uri=True, timeout=5)) as store:
            found = store.execute(query, (run_id,)).fetchone()
    except sqlite3.Error:
        return None
    if found is None:
        return "MISSING"
    status, lifecycle = found
    if lifecycle == "deleted":
        return "MISSING"
    return status if lifecycle == "active" and status in _STATES else None
