"""Where this process runs: which sources, in which Ray job, and which cluster it joins."""

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


JOB_STOP_WAIT_S = 3.0  # Ray's own default


JOB_STOP_MARGIN_S = 1.0  # in which the end is told


def ray_job_id() -> str | None:
    """The submission id of the Ray job that this process is the driver of."""
    raw = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return json.loads(raw).get("metadata", {}).get("job_submission_id") if raw else None


def cluster_address() -> str | None:
    """Return the address of the cluster to join, or None where a run starts a Ray of its own."""
    address = os.environ.get("RAY_ADDRESS")
    # Ray's own word for a new Ray on this machine, which must be a guarded one, too.
    return None if address in (None, "", "local") else address


def grace_s(wanted_s: float) -> float:
    """How long a stopped run may take: as wanted, or what `ray job stop` leaves it."""
    if ray_job_id() is None:
        return wanted_s
    try:
        given_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", ""))
    except ValueError:
        given_s = JOB_STOP_WAIT_S
    return min(wanted_s, max(given_s - JOB_STOP_MARGIN_S, 0.0))
