"""Choose some of the labelled samples: the same share, or the same number, of each class."""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from mae_core.data.label_budget import LabelBudget
from mae_core.data.randomness import named_generator


def stratified_subset(
    strata: Sequence[Hashable], budget: LabelBudget, seed: int
) -> npt.NDArray[np.int64]:
    """Return sorted indices of the chosen samples.

    With the same seed, the samples of a smaller budget are among those of a larger one.
    Deterministic in (strata, budget, seed).

    Args:
        strata: The class of each sample, or any other value to spread evenly.
        budget: How many samples of each class.
        seed: Decides which samples are chosen.
    """
    if budget.is_all:
        return np.arange(len(strata))
    members: dict[Hashable, list[int]] = {}
    for place, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(place)
    chosen: list[npt.NDArray[np.int64]] = []
    for stratum, places in members.items():
        shuffled = named_generator(seed, "labels", str(stratum)).permutation(places)
        chosen.append(shuffled[: budget.count(len(places))])
    return np.sort(np.concatenate(chosen))
