"""Where a process runs: alone, in a Ray job, or on a cluster."""

import json

import pytest

from pipelines.config.sections import ScalingConfig
from pipelines.job import (
    ROOT,
    check_resources,
    cluster_address,
    grace_s,
    ray_job_id,
    trains_in_driver,
)
from pipelines.outcome import ConfigError

JOB = json.dumps({"metadata": {"job_submission_id": "nightly-1"}})


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_STOP_WAIT_TIME_S"):
        monkeypatch.delenv(name, raising=False)


def test_the_root_is_the_folder_of_the_project() -> None:
    assert (ROOT / "pyproject.toml").is_file()


@pytest.mark.parametrize(
    ("config", "found"), [(JOB, "nightly-1"), ("{}", None), ('{"metadata": {}}', None), ("", None)]
)
def test_a_driver_of_a_job_knows_its_id(
    config: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config)
    assert ray_job_id() == found


@pytest.mark.parametrize(
    ("address", "joined"), [("10.0.0.1:6379", "10.0.0.1:6379"), ("auto", "auto"), ("", None)]
)
def test_a_cluster_is_joined_where_one_is_named(
    address: str, joined: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster_address() is None
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address() == joined
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster_address() is None


@pytest.mark.parametrize(
    ("is_job", "wait", "grace"),
    [
        (False, "5", 30.0),  # nobody kills it
        (True, "60", 30.0),
        (True, "11", 10.0),  # a second is left to report the end
        (True, None, 2.0),  # Ray's default of 3
        (True, "soon", 2.0),
        (True, "0.5", 0.0),
    ],
)
def test_a_stopped_run_ends_before_its_job_is_killed(
    is_job: bool, wait: str | None, grace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", JOB)
    if wait is not None:
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", wait)
    assert grace_s(30.0) == grace


@pytest.mark.parametrize(
    ("scaling", "cpus", "gpus", "told"),
    [
        (
            ScalingConfig(num_workers=3),
            2,
            0,
            "scaling.num_workers=3 x scaling.cpus_per_worker=1 needs 3 CPUs, here has 2; "
            "try scaling.num_workers=2",
        ),
        (
            ScalingConfig(num_workers=2, cpus_per_worker=3),
            4,
            0,
            "scaling.num_workers=2 x scaling.cpus_per_worker=3 needs 6 CPUs, here has 4; "
            "try scaling.num_workers=1",
        ),
        (
            ScalingConfig(num_workers=1, cpus_per_worker=8),
            4,
            0,
            "scaling.num_workers=1 x scaling.cpus_per_worker=8 needs 8 CPUs, here has 4; "
            "try scaling.num_workers=1 scaling.cpus_per_worker=1",
        ),
        (
            ScalingConfig(num_workers=4, use_gpu=True),
            16,
            2,
            "scaling.num_workers=4 with scaling.use_gpu needs as many GPUs, here has 2; "
            "try scaling.num_workers=2",
        ),
        (
            ScalingConfig(num_workers=1, use_gpu=True),
            16,
            0,
            "scaling.num_workers=1 with scaling.use_gpu needs as many GPUs, here has 0; "
            "try scaling.use_gpu=false",
        ),
    ],
)
def test_a_layout_that_would_wait_for_ever_is_refused(
    scaling: ScalingConfig, cpus: float, gpus: float, told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_resources(scaling, cpus, gpus, "here")
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("scaling", "cpus", "gpus"),
    [
        (ScalingConfig(num_workers=2), 2, 0),
        (ScalingConfig(num_workers=2, cpus_per_worker=2), 4.0, 0),
        (ScalingConfig(num_workers=2, use_gpu=True), 2, 2),
    ],
)
def test_a_layout_that_just_fits_is_taken(scaling: ScalingConfig, cpus: float, gpus: float) -> None:
    check_resources(scaling, cpus, gpus, "here")


def test_one_worker_without_a_cluster_is_the_drivers_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = ScalingConfig(), ScalingConfig(num_workers=2)
    assert (trains_in_driver(one), trains_in_driver(two)) == (True, False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not trains_in_driver(one)
