"""What can't work is refused in words before Ray is asked for it."""

import logging
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipelines.config.sections import ScalingConfig
from pipelines.driver import CancelledError
from pipelines.outcome import ConfigError
from pipelines.training import launch


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
        launch.check_resources(scaling, cpus, gpus, "here")
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
    launch.check_resources(scaling, cpus, gpus, "here")


def test_one_worker_without_a_cluster_trains_in_the_drivers_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, two = ScalingConfig(cpus_per_worker=2), ScalingConfig(num_workers=2, cpus_per_worker=2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert (launch.trains_in_driver(one), launch.trains_in_driver(two)) == (True, False)
    # What Ray gets beside it is what it would have left beside a worker of its own.
    log = tmp_path / "log"
    beside, without = (
        launch.local_resources(one, log, cpus=4, gpus=0, in_driver=x) for x in (True, False)
    )
    assert (beside.num_cpus, without.num_cpus) == (4, 6)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not launch.trains_in_driver(one)


def test_a_command_that_is_stopped_while_it_plans_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(launch.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(launch.local_ray, "running", lambda *_: nullcontext())
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(CancelledError, match="stopped by SIGTERM") as stopped,
        launch.running_ray(ScalingConfig()),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_says_that_it_joins_the_cluster_and_shows_no_news_of_ray(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(launch.ray, "init", lambda address, **words: asked.update(words))
    caplog.set_level(logging.INFO)
    launch._join("10.0.0.1:6379")
    assert caplog.messages == ["joining the Ray cluster 10.0.0.1:6379 ..."]
    assert asked["logging_level"] == logging.WARNING


@pytest.mark.ray
def test_nodes_that_the_autoscaler_may_start_count(
    local_ray: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch._cluster_capacity() == (8 - launch.READ_CPUS, 0)
    limits = {"CPU": 100.0, "GPU": 4.0}
    monkeypatch.setattr(launch.state, "get_max_resources_from_cluster_config", lambda: limits)
    assert launch._cluster_capacity() == (100 - launch.READ_CPUS, 4)
