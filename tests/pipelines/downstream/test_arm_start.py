"""An arm's model is fitted to images that are read once, before its first step."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.downstream.arm_start import evenly_spaced, fit_start
from pipelines.downstream.task import ArmStart, FitInput


class FakeMeasurer:
    """Gives the inputs of a fit on rank 0, and remembers which rows it was asked for."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.rows: list[list[int]] = []

    def outputs(self, model: nn.Module, shards: Any, rows: Any, inputs: Any) -> Any:
        self.rows = [np.asarray(part).tolist() for part in rows]
        found = inputs(model, torch.ones(2, 1), [])
        return found if self.rank == 0 else None


def double(model: nn.Module, images: Tensor, examples: Any) -> list[FitInput]:
    return [FitInput(value) for value in (2 * images).numpy()]


def to_sum(model: nn.Module, inputs: list[FitInput]) -> None:
    for parameter in model.parameters():
        parameter.fill_(float(sum(each.values.sum() for each in inputs)))


SHARDS: Any = (SimpleNamespace(num_samples=4), SimpleNamespace(num_samples=2))
ROWS = (np.asarray([1, 3]), np.asarray([0]))


def run(measurer: Any, **options: Any) -> nn.Linear:
    model = nn.Linear(1, 1)
    fit_start(ArmStart(100, double, to_sum, **options), model, measurer, SHARDS, ROWS)
    return model


def test_the_fit_gets_the_inputs_of_the_arms_images() -> None:
    measurer = FakeMeasurer()
    model = run(measurer)
    assert measurer.rows == [[1, 3], [0]]
    assert model.weight.item() == 4.0


def test_what_needs_no_labels_reads_all_images() -> None:
    measurer = FakeMeasurer()
    run(measurer, of_arm=False)
    assert measurer.rows == [[0, 1, 2, 3], [0, 1]]


def test_the_other_workers_get_the_values_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.broadcast", lambda value, source: value.fill_(7))
    model = run(FakeMeasurer(rank=1, world_size=2))
    assert (model.weight.item(), model.bias.item()) == (7.0, 7.0)


@pytest.mark.parametrize(
    ("limit", "chosen"),
    [
        (9, [[0, 1, 2, 3, 4], [], [10, 11, 12, 13]]),
        (3, [[0, 3], [], [11]]),  # each third
        (1, [[0], [], []]),
    ],
)
def test_too_many_images_are_thinned_at_equal_distances(
    limit: int, chosen: list[list[int]]
) -> None:
    found = evenly_spaced([range(5), range(0), np.asarray([10, 11, 12, 13])], limit)
    assert [np.asarray(part).tolist() for part in found] == chosen
