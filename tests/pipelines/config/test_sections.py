"""Values that the user did not set are chosen to fit those that are; set ones never change."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mae_core.config import StrictConfig
from pipelines.config.sections import DebugConfig, ScalingConfig, fitted_batches, fitted_window


class Optim(StrictConfig):
    global_batch_size: int = 100
    micro_batch_size: int = 32


class Data(StrictConfig):
    shuffle_window: int = 1000


@pytest.mark.parametrize(
    ("given", "workers", "crops", "batch", "micro"),
    [
        ({}, 1, 1, 128, 32),  # the global batch is rounded up
        ({}, 3, 1, 192, 32),
        ({"micro_batch_size": 50}, 1, 1, 100, 50),
        ({"global_batch_size": 60}, 1, 1, 60, 30),  # the largest one up to the default
        ({"global_batch_size": 60}, 2, 1, 60, 30),
        ({"global_batch_size": 62}, 2, 1, 62, 31),
        ({}, 1, 5, 120, 30),  # of whole images
        ({"global_batch_size": 100, "micro_batch_size": 32}, 1, 1, 100, 32),
        ({"global_batch_size": 61}, 2, 1, 61, 32),  # can't fit: another check reports it
    ],
)
def test_batches_that_were_not_set_divide(
    given: dict[str, int], workers: int, crops: int, batch: int, micro: int
) -> None:
    fitted = fitted_batches(Optim.model_validate(given), workers, crops)
    assert (fitted.global_batch_size, fitted.micro_batch_size) == (batch, micro)


@pytest.mark.parametrize(
    ("given", "images", "window"),
    [({}, 50, 1000), ({}, 48, 1008), ({"shuffle_window": 999}, 48, 999), ({}, 0, 1000)],
)
def test_a_window_that_was_not_set_is_a_multiple_of_the_micro_batch(
    given: dict[str, int], images: int, window: int
) -> None:
    assert fitted_window(Data.model_validate(given), images).shuffle_window == window


def test_a_trace_is_written_where_the_command_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert DebugConfig(sample_trace="trace").sample_trace == f"{tmp_path}/trace"
    assert DebugConfig().sample_trace is None


@pytest.mark.parametrize("values", [{"num_workers": 0}, {"cpus_per_worker": 0}, {"gpus": 1}])
def test_workers_without_a_cpu_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ScalingConfig.model_validate(values)
