"""Define the order of all samples in a run as one fixed sequence.

In each epoch the shards are laid end to end in a permutation of (seed, epoch). The sequence is cut
into windows of `window` samples, and each window is permuted by (seed, window). So sample i of the
run depends only on (seed, counts, window): not on the number of workers, the micro batch or
restarts. The state of a run's data is one number, the number of samples trained on.

A window may span two epochs; every sample still comes once in each epoch. The last window
ends where the run ends.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.data.randomness import named_generator


class Segment(NamedTuple):
    """Consecutive samples of one shard: rows [start, stop)."""

    epoch: int
    shard: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class RunOrder:
    counts: npt.NDArray[np.int64]  # number of samples in each shard
    seed: int
    window: int  # number of samples permuted together
    num_samples: int  # length of the run: steps x global batch

    @property
    def samples_per_epoch(self) -> int:
        return int(self.counts.sum())

    @property
    def num_windows(self) -> int:
        return -(-self.num_samples // self.window)

    def window_of(self, position: int) -> int:
        """Return the window that contains a position of the sequence."""
        return position // self.window

    def window_bounds(self, window: int) -> tuple[int, int]:
        """Return the first position of a window, and the one after its last."""
        start = window * self.window
        return start, min(start + self.window, self.num_samples)

    def window_segments(self, window: int) -> list[Segment]:
        """List the pieces of shards that fill a window, before it is permuted."""
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
        """Return the permutation: position i of the window is row `permutation[i]`."""
        start, stop = self.window_bounds(window)
        return named_generator(self.seed, "window", window).permutation(stop - start)

    @lru_cache(maxsize=4)  # noqa: B019  # an order lives as long as its process reads
    def _epoch_layout(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the epoch's shards in order, and the position where each of them ends."""
        shards = named_generator(self.seed, "shards", epoch).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])


@dataclass(frozen=True, eq=False)
class ChainedOrder:
    """Several runs one after the other as one sequence; each run has its own windows.

    Shards are numbered consecutively: the second run's shards follow the first run's.
    """

    orders: tuple[RunOrder, ...]  # all with the same window

    @property
    def window(self) -> int:
        return self.orders[0].window

    @property
    def num_samples(self) -> int:
        return sum(order.num_samples for order in self.orders)

    @property
    def num_windows(self) -> int:
        return sum(order.num_windows for order in self.orders)

    def window_of(self, position: int) -> int:
        windows = 0
        for order in self.orders:
            if position < order.num_samples:
                return windows + order.window_of(position)
            position -= order.num_samples
            windows += order.num_windows
        return windows

    def window_bounds(self, window: int) -> tuple[int, int]:
        place = self._place(window)
        start, stop = place.order.window_bounds(place.window)
        return place.samples_before + start, place.samples_before + stop

    def window_segments(self, window: int) -> list[Segment]:
        place = self._place(window)
        return [
            segment._replace(shard=place.shards_before + segment.shard)
            for segment in place.order.window_segments(place.window)
        ]

    def window_permutation(self, window: int) -> npt.NDArray[np.int64]:
        place = self._place(window)
        return place.order.window_permutation(place.window)

    def _place(self, window: int) -> "_Place":
        samples = shards = 0
        for order in self.orders:
            if window < order.num_windows:
                return _Place(order, window, samples, shards)
            window -= order.num_windows
            samples += order.num_samples
            shards += len(order.counts)
        # Beyond the end there are no samples, as in a single run.
        return _Place(order, order.num_windows + window, samples - order.num_samples, shards)


class _Place(NamedTuple):
    order: RunOrder
    window: int  # counted within this order
    samples_before: int
    shards_before: int
