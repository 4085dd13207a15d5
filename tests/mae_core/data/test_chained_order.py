"""Several runs in a row read the same samples as each run alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_core.data.order import ChainedOrder, RunOrder


def make_order(counts: list[int], seed: int, num_samples: int, window: int = 4) -> RunOrder:
    return RunOrder(np.asarray(counts, np.int64), seed, window, num_samples)


def sequence(order: RunOrder | ChainedOrder) -> list[tuple[int, int, int]]:
    """Return (epoch, shard, row) of each position."""
    places = []
    for window in range(order.num_windows):
        laid_out = [
            (segment.epoch, segment.shard, row)
            for segment in order.window_segments(window)
            for row in range(segment.start, segment.stop)
        ]
        places += [laid_out[i] for i in order.window_permutation(window)]
    return places


runs = st.tuples(
    st.lists(st.integers(0, 5), min_size=2, max_size=2).filter(any),
    st.integers(0, 3),
    st.integers(1, 20),
)


@settings(max_examples=60)
@given(st.lists(runs, min_size=1, max_size=4))
def test_a_chain_is_its_runs_one_after_the_other(parts: list[tuple[list[int], int, int]]) -> None:
    orders = [make_order(*part) for part in parts]
    expected = [
        (epoch, shard + 2 * number, row)
        for number, order in enumerate(orders)
        for epoch, shard, row in sequence(order)
    ]
    assert sequence(ChainedOrder(tuple(orders))) == expected


def test_windows_of_a_chain_start_anew_with_each_run() -> None:
    chain = ChainedOrder((make_order([9], 0, 6), make_order([9], 1, 5)))
    bounds = [chain.window_bounds(window) for window in range(chain.num_windows)]
    assert bounds == [(0, 4), (4, 6), (6, 10), (10, 11)]
    assert [chain.window_of(place) for place in (0, 3, 4, 5, 6, 9, 10)] == [0, 0, 1, 1, 2, 2, 3]
    assert (chain.num_samples, chain.num_windows) == (11, 4)


@pytest.mark.parametrize("place", [11, 12, 40])
def test_beyond_the_end_of_a_chain_there_is_nothing(place: int) -> None:
    chain = ChainedOrder((make_order([9], 0, 6), make_order([9], 1, 5)))
    window = chain.window_of(place)
    assert window >= chain.num_windows
    assert chain.window_segments(window) == []
