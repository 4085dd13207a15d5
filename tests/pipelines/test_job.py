"""Where a process runs: alone, in a Ray job, or on a cluster."""

import json

import pytest

from pipelines.job import ROOT, cluster_address, grace_s, ray_job_id

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
