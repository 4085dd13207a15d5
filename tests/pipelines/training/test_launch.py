"""A Ray is started or joined with what the workers leave it, and its end is the command's."""

import logging
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipelines.config.sections import ScalingConfig
from pipelines.driver import CancelledError
from pipelines.training import launch


def test_a_worker_in_the_driver_leaves_ray_as_many_cpus_for_reading(tmp_path: Path) -> None:
    one = ScalingConfig(cpus_per_worker=2)
    # What Ray gets beside it is what it would have left beside a worker of its own.
    log = tmp_path / "log"
    beside, without = (
        launch.local_resources(one, log, cpus=4, gpus=0, in_driver=x) for x in (True, False)
    )
    assert (beside.num_cpus, without.num_cpus) == (4, 6)
    assert beside.environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"


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
