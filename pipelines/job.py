"""Find out where this process runs: its sources, its Ray job, and the cluster to join."""

import json
import os
from pathlib import Path

from pipelines.config.sections import ScalingConfig
from pipelines.outcome import ConfigError

STAGE_VARIABLE = "MAE_STAGE"  # names the stage of a pipeline that this process is
ROOT = Path(__file__).resolve().parents[1]


JOB_STOP_WAIT_S = 3.0  # Ray's default
JOB_STOP_MARGIN_S = 1.0  # time left to report the end


def ray_job_id() -> str | None:
    """Return the submission id of the Ray job whose driver this process is, or None."""
    raw = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return json.loads(raw).get("metadata", {}).get("job_submission_id") if raw else None


def cluster_address() -> str | None:
    """Return the address of the cluster to join, or None if a run starts its own Ray."""
    address = os.environ.get("RAY_ADDRESS")
    # "local" is Ray's word for a new Ray on this machine, which must be a guarded one as well.
    return None if address in (None, "", "local") else address


def trains_in_driver(scaling: ScalingConfig) -> bool:
    """Return whether the one worker of a run is the process of the command itself (ADR 27)."""
    return scaling.num_workers == 1 and cluster_address() is None


def check_resources(scaling: ScalingConfig, cpus: float, gpus: float, place: str) -> None:
    """Refuse workers that do not fit, which Ray would wait for without an end.

    Raises:
        ConfigError: names what is asked for, what there is, and what would fit.
    """
    need = scaling.num_workers * scaling.cpus_per_worker
    if need > cpus:
        fits = int(cpus // scaling.cpus_per_worker)
        raise ConfigError(
            f"scaling.num_workers={scaling.num_workers} x scaling.cpus_per_worker="
            f"{scaling.cpus_per_worker} needs {need} CPUs, {place} has {cpus:g}; "
            f"try scaling.num_workers={max(fits, 1)}"
            + (" scaling.cpus_per_worker=1" if fits < 1 else "")
        )
    if scaling.use_gpu and scaling.num_workers > gpus:
        raise ConfigError(
            f"scaling.num_workers={scaling.num_workers} with scaling.use_gpu needs as many GPUs, "
            f"{place} has {gpus:g}; "
            + (f"try scaling.num_workers={int(gpus)}" if gpus else "try scaling.use_gpu=false")
        )


def grace_s(wanted_s: float) -> float:
    """Return how long a stopped run may take: as wanted, limited by what `ray job stop` allows."""
    if ray_job_id() is None:
        return wanted_s
    try:
        given_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", ""))
    except ValueError:
        given_s = JOB_STOP_WAIT_S
    return min(wanted_s, max(given_s - JOB_STOP_MARGIN_S, 0.0))
