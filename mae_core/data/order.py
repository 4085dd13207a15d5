"""The whole run as one fixed sequence of samples.

Epoch after epoch, the shards are laid end to end in a permutation of (seed, epoch); the sequence
is cut into windows of `window` samples, and each window is permuted by (seed, window). So sample
i of the run is a pure function of (seed, counts, window): not of the number of workers, the
micro batch or the restarts. The state of a run's data is one number, the samples trained on.

A window may straddle two epochs; every sample still comes once in each epoch. The last window
ends where the run ends.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.data.randomness import named_generator


class Segment(NamedTuple):
    """Neighbouring samples of one shard: rows [start, stop)."""

    epoch: int
    shard: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class RunOrder:
    counts: npt.NDArray[np.int64]  # samples in each shard
    seed: int
    window: int  # samples permuted together
    num_samples: int  # length of the run: steps x global batch

    @property
    def samples_per_epoch(self) -> int:
        return int(self.counts.sum())

    @property
    def num_windows(self) -> int:
        return -(-self.num_samples // self.window)

    def window_bounds(self, window: int) -> tuple[int, int]:
        """First and last-plus-one place in the run's sequence."""
        start = window * self.window
        return start, min(start + self.window, self.num_samples)

    def window_segments(self, window: int) -> list[Segment]:
        """The pieces of shards that fill a window, before it is permuted."""
        position, stop = self.window_bounds(window)
        segments: list[Segment] = []
        while position < stop:
            epoch, place = divmod(position, self.samples_per_epoch)
            shards, ends = self._epoch_layout(epoch)
            visit = int(np.searchsorted(ends, place, side="right"))
            shard = int(shards[visit])
            row = place - int(ends[visit] - self.counts[shard])
            length = min(int(ends[visit]) - place, stop - position)
            segments.append(Segment(epoch, shard, row, row + length))
            position += length
        return segments

    def window_permutation(self, window: int) -> npt.NDArray[np.int64]:
        """Place i of the window holds row `permutation[i]` of its laid-out segments."""
        start, stop = self.window_bounds(window)
        return named_generator(self.seed, "window", window).permutation(stop - start)

    @lru_cache(maxsize=4)  # noqa: B019  # an order lives as long as its process reads
    def _epoch_layout(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The epoch's shards in order, and where each ends in it."""
        shards = named_generator(self.seed, "shards", epoch).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])
