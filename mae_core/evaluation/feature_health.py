"""Measure without labels how much of its width an encoder uses.

Features are (N, D), one row per image.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# A dimension is dead if it deviates by less than this share of what all deviate by.
DEAD_DEVIATION = 0.01


class FeatureHealth(NamedTuple):
    rank: float  # about how many directions the images differ in, 1..D; 0 if they are all alike
    dead_share: float  # of the dimensions
    mean_share: float  # of the features' power that all images have in common


def feature_health(features: Float[Tensor, "N D"]) -> FeatureHealth:
    """Measure the rank, the dead dimensions and the mean's share of power.

    The rank is RankMe, Garrido et al. 2023, https://arxiv.org/abs/2210.02885, equation 1: the
    exponential of the entropy of the singular values. Differs: the features are centred first. The
    mean often holds most of the power, and it has a number of its own here.
    """
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    power = float(features.square().sum(dim=1).mean())
    deviations = centred.square().mean(dim=0).sqrt()
    dead = deviations <= DEAD_DEVIATION * deviations.square().mean().sqrt()
    return FeatureHealth(
        rank=_effective_rank(centred),
        dead_share=float(dead.double().mean()),
        mean_share=float(mean.square().sum()) / power if power > 0 else 1.0,
    )


def _effective_rank(centred: Float[Tensor, "N D"]) -> float:
    sizes = torch.linalg.svdvals(centred)
    total = sizes.sum()
    if total <= 0:
        return 0.0
    shares = sizes / total
    return float(torch.special.entr(shares).sum().exp())
