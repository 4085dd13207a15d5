"""How the workers of a run are started."""

from pathlib import Path
from typing import Any

import pytest

from mae_core.data.samples import DataError
from pipelines.config.sections import ScalingConfig
from pipelines.training import fit
from pipelines.training.checkpoints import StartAgainError


def test_workers_that_set_a_checkpoint_aside_start_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where Ray may not start them again, or wraps what they raised."""
    wrapped = RuntimeError("two")
    wrapped.__cause__ = StartAgainError("two")
    ends: list[Exception | None] = [StartAgainError("one"), wrapped, None]

    def end(*_: object) -> None:
        if (error := ends.pop(0)) is not None:
            raise error

    monkeypatch.setattr(fit, "_fit_once", end)
    job: Any = None
    fit.fit(job, None)
    assert ends == []
    ends.append(DataError("a label is wrong"))
    with pytest.raises(DataError):
        fit.fit(job, None)


def test_ray_keeps_its_bookkeeping_in_the_run_s_folder(tmp_path: Path) -> None:
    run = fit.ray_run(f"{tmp_path}/pretrain/demo-1", ScalingConfig(max_failures=5))
    assert (run.storage_path, run.name) == (f"{tmp_path}/pretrain", "demo-1")
    assert run.failure_config is not None
    assert run.failure_config.max_failures == 5


def test_a_job_shows_no_news_of_ray_train(tmp_path: Path) -> None:
    run: Any = fit.ray_run(f"{tmp_path}/pretrain/demo-1", ScalingConfig())
    assert run.logging_config.log_level == "WARNING"


def test_workers_reserve_their_cpus_and_a_gpu_each() -> None:
    cpu = fit.ray_scaling(ScalingConfig(num_workers=2, cpus_per_worker=3))
    gpu = fit.ray_scaling(ScalingConfig(num_workers=2, cpus_per_worker=3, use_gpu=True))
    assert (cpu.num_workers, cpu.use_gpu, cpu.resources_per_worker) == (2, False, {"CPU": 3})
    assert (gpu.num_workers, gpu.use_gpu) == (2, True)
    assert gpu.resources_per_worker == {"CPU": 3, "GPU": 1}


def test_a_single_worker_is_the_driver_unless_there_is_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = ScalingConfig(cpus_per_worker=2), ScalingConfig(num_workers=2, cpus_per_worker=2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert (fit.ray_scaling(one).num_workers, fit.ray_scaling(two).num_workers) == (0, 2)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert fit.ray_scaling(one).num_workers == 1
