"""Where this process runs: the sources, the Ray job, and the cluster to join."""

import json
import os
from pathlib import Path

STAGE_VARIABLE = "MAE_STAGE"  # names the stage of a pipeline that this process is
ROOT = Path(__file__).resolve().parents[1]


JOB_STOP_WAIT_S = 3.0  # Ray's default


JOB_STOP_MARGIN_S = 1.0  # time to report the end


def ray_job_id() -> str | None:
    """Return the submission id of the Ray job whose driver this process is, or None."""
    raw = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return json.loads(raw).get("metadata", {}).get("job_submission_id") if raw else None


def cluster_address() -> str | None:
    """Return the address of the cluster to join, or None if a run starts its own Ray."""
    address = os.environ.get("RAY_ADDRESS")
    # "local" is Ray's word for a new Ray on this machine, which must be a guarded one as well.
    return None if address in (None, "", "local") else address


def grace_s(wanted_s: float) -> float:
    """Return how long a stopped run may take: as wanted, limited by what `ray job stop` allows."""
    if ray_job_id() is None:
        return wanted_s
    try:
        given_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", ""))
    except ValueError:
        given_s = JOB_STOP_WAIT_S
    return min(wanted_s, max(given_s - JOB_STOP_MARGIN_S, 0.0))
