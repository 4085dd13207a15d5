"""Condition the encoder's map for a dense head, before an arm's first step.

The fit needs no labels, so it reads any of the training images and is the same for every share of
the labels. Every arm gets its own fit, also one from random weights.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mae_core.model.dense import ConditioningKind, DenseModel
from pipelines.downstream.task import ArmStart, Example, FitInput, TruthT

NUM_IMAGES = 128
PLACES_PER_IMAGE = 128  # in total many times as many vectors as the widest encoder has channels

# Takes a model, normalised images, their examples and a limit; returns the vectors of each image.
SampleVectors = Callable[[DenseModel, Tensor, Sequence[Example[TruthT]], int], list[Tensor]]


def conditioning_start(
    kind: ConditioningKind, sample: SampleVectors[TruthT]
) -> ArmStart[TruthT] | None:
    """Return the fit of the conditioning; None if the map stays unchanged."""
    if kind == "none":
        return None
    return ArmStart(NUM_IMAGES, partial(_vectors, sample), _fit, of_arm=False)


def _vectors(
    sample: SampleVectors[TruthT],
    model: nn.Module,
    images: Tensor,
    examples: Sequence[Example[TruthT]],
) -> list[FitInput]:
    assert isinstance(model, DenseModel)
    vectors = sample(model, images, examples, PLACES_PER_IMAGE)
    return [FitInput(own.cpu().numpy()) for own in vectors]


def _fit(model: nn.Module, inputs: list[FitInput]) -> None:
    assert isinstance(model, DenseModel)
    vectors = np.concatenate([image.values for image in inputs])
    model.conditioning.fit(torch.from_numpy(vectors))
