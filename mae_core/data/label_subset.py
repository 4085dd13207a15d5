"""A share of the labelled samples, of each class the same share."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from mae_core.data.randomness import named_generator


def stratified_subset(
    strata: Sequence[Hashable], fraction: float, seed: int
) -> npt.NDArray[np.int64]:
    """Places of the chosen samples, rising: of each class `fraction`, rounded, and one at least.

    A smaller fraction's samples are among a larger one's of the same seed. A function of (strata,
    fraction, seed).

    Args:
        strata: the class of each sample, or whatever is to be spread evenly.
        fraction: in (0, 1].
        seed: chooses which.
    """
    if fraction == 1:
        return np.arange(len(strata))
    members: dict[Hashable, list[int]] = {}
    for place, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(place)
    chosen: list[npt.NDArray[np.int64]] = []
    for stratum, places in members.items():
        shuffled = named_generator(seed, "labels", str(stratum)).permutation(places)
        chosen.append(shuffled[: max(1, math.floor(fraction * len(places) + 0.5))])
    return np.sort(np.concatenate(chosen))
