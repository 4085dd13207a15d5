"""Choose a share of the labelled samples, the same share of each class."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from mae_core.data.randomness import named_generator


def stratified_subset(
    strata: Sequence[Hashable], fraction: float, seed: int
) -> npt.NDArray[np.int64]:
    """Return sorted indices of the chosen samples: `fraction` of each class, at least one.

    The number per class is rounded. With the same seed, the samples of a smaller fraction are
    among those of a larger one. Deterministic in (strata, fraction, seed).

    Args:
        strata: The class of each sample, or any other value to spread evenly.
        fraction: In (0, 1].
        seed: Decides which samples are chosen.
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
