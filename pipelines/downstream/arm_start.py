"""Fit an arm's model before its first step; see `ArmStart` in `pipelines.downstream.task`."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed
from torch import nn

from pipelines.downstream.measuring import Measurer, Shards
from pipelines.downstream.task import ArmStart, PredictionT, TruthT
from pipelines.reading.shards import Rows


def fit_start(
    start: ArmStart[TruthT],
    model: nn.Module,
    measurer: Measurer[TruthT, PredictionT],
    shards: Shards,
    rows: tuple[Rows, ...],
) -> None:
    """Fit the model to images on rank 0, and copy its values to the other workers.

    Args:
        start: What is fitted.
        model: Changed in place.
        measurer: Reads and encodes the images.
        shards: The training shards.
        rows: The arm's labelled samples of each shard.
    """
    if not start.of_arm:
        rows = tuple(range(shard.num_samples) for shard in shards)
    inputs = measurer.outputs(model, shards, evenly_spaced(rows, start.num_images), start.inputs)
    with torch.no_grad():
        if inputs is not None:
            start.fit(model, inputs)
        if measurer.world_size > 1:
            for value in model.state_dict().values():
                torch.distributed.broadcast(value, 0)


def evenly_spaced(rows: Sequence[Rows], limit: int) -> tuple[Rows, ...]:
    """Choose at most `limit` rows of all shards, at equal distances."""
    counts = [len(part) for part in rows]
    total = sum(counts)
    if total <= limit:
        return tuple(rows)
    chosen = np.arange(limit, dtype=np.int64) * total // limit
    ends = np.cumsum(counts)
    return tuple(
        np.asarray(part)[chosen[(chosen >= end - count) & (chosen < end)] - (end - count)]
        for part, end, count in zip(rows, ends, counts, strict=True)
    )
