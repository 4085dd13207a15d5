"""The run's sequence has each sample once per epoch and depends on (seed, counts, window) only."""

import time
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_core.data.order import RunOrder, Segment

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any)


def make_order(counts: list[int], seed: int, window: int, num_samples: int) -> RunOrder:
    return RunOrder(np.asarray(counts, dtype=np.int64), seed, window, num_samples)


def laid_out(order: RunOrder) -> list[tuple[int, int, int]]:
    """Return (epoch, shard, row) of the whole run before the windows are permuted."""
    return [
        (segment.epoch, segment.shard, row)
        for window in range(order.num_windows)
        for segment in order.window_segments(window)
        for row in range(segment.start, segment.stop)
    ]


def sequence(order: RunOrder) -> list[tuple[int, int, int]]:
    """Return (epoch, shard, row) of the whole run, in the order of training."""
    samples = []
    for window in range(order.num_windows):
        rows = [
            (segment.epoch, segment.shard, row)
            for segment in order.window_segments(window)
            for row in range(segment.start, segment.stop)
        ]
        samples += [rows[i] for i in order.window_permutation(window)]
    return samples


@settings(max_examples=150)
@given(COUNTS, st.integers(0, 2**40), st.integers(1, 40), st.integers(1, 3))
def test_each_sample_comes_once_in_each_epoch(
    counts: list[int], seed: int, window: int, num_epochs: int
) -> None:
    order = make_order(counts, seed, window, num_epochs * sum(counts))
    expected = {
        (epoch, shard, row)
        for epoch in range(num_epochs)
        for shard, count in enumerate(counts)
        for row in range(count)
    }
    samples = sequence(order)
    assert len(samples) == len(expected)
    assert set(samples) == expected


@settings(max_examples=150)
@given(COUNTS, st.integers(0, 5), st.integers(1, 40), st.integers(1, 100))
def test_segments_tile_the_sequence_shard_by_shard(
    counts: list[int], seed: int, window: int, num_samples: int
) -> None:
    order = make_order(counts, seed, window, num_samples)
    samples = laid_out(order)
    assert len(samples) == num_samples
    assert [epoch for epoch, _, _ in samples] == [i // sum(counts) for i in range(num_samples)]
    for (_, _, row), (_, next_shard, next_row), shard in zip(
        samples, samples[1:], [shard for _, shard, _ in samples], strict=False
    ):
        # A shard is read from its first row to its last, and then another begins.
        if next_row:
            assert (next_shard, next_row) == (shard, row + 1)
        else:
            assert row == counts[shard] - 1


@settings(max_examples=60)
@given(COUNTS, st.integers(0, 5), st.integers(1, 20), st.integers(1, 60), st.integers(0, 60))
def test_a_longer_run_begins_as_the_shorter_one(
    counts: list[int], seed: int, window: int, num_samples: int, more: int
) -> None:
    # Up to the last whole window: a run that goes on finds what was trained on as a prefix.
    whole = num_samples // window * window
    short = sequence(make_order(counts, seed, window, num_samples))
    longer = sequence(make_order(counts, seed, window, num_samples + more))
    assert short[:whole] == longer[:whole]


def test_last_window_ends_where_the_run_ends() -> None:
    order = make_order([5, 5], seed=0, window=8, num_samples=21)
    assert order.num_windows == 3
    assert [order.window_bounds(i) for i in range(3)] == [(0, 8), (8, 16), (16, 21)]
    assert sorted(order.window_permutation(2)) == [0, 1, 2, 3, 4]
    assert sum(s.stop - s.start for s in order.window_segments(2)) == 5


def test_window_may_straddle_two_epochs() -> None:
    order = make_order([3], seed=0, window=5, num_samples=6)
    assert order.window_segments(0) == [Segment(0, 0, 0, 3), Segment(1, 0, 0, 2)]
    assert order.window_segments(1) == [Segment(1, 0, 2, 3)]


def test_window_may_hold_many_epochs() -> None:
    order = make_order([2], seed=0, window=7, num_samples=7)
    assert order.window_segments(0) == [
        *(Segment(epoch, 0, 0, 2) for epoch in range(3)),
        Segment(3, 0, 0, 1),
    ]


def test_a_seed_s_order_never_changes() -> None:
    # The values when this was written: a later version must resume a run in the same order.
    order = make_order([4, 3, 5], seed=7, window=6, num_samples=24)
    assert [order.window_segments(i) for i in range(4)] == [
        [(0, 0, 0, 4), (0, 1, 0, 2)],
        [(0, 1, 2, 3), (0, 2, 0, 5)],
        [(1, 0, 0, 4), (1, 1, 0, 2)],
        [(1, 1, 2, 3), (1, 2, 0, 5)],
    ]
    assert [order.window_permutation(i).tolist() for i in range(4)] == [
        [5, 1, 4, 2, 3, 0],
        [1, 3, 5, 2, 0, 4],
        [1, 4, 3, 2, 0, 5],
        [4, 3, 1, 5, 2, 0],
    ]


def test_epochs_and_seeds_differ() -> None:
    counts = list(range(20, 40))
    shards = [
        [shard for _, shard, _ in laid_out(make_order(counts, seed, 10, 2 * sum(counts)))]
        for seed in (0, 1)
    ]
    first, second = shards[0][: sum(counts)], shards[0][sum(counts) :]
    assert first != second
    assert shards[0] != shards[1]
    one = make_order(counts, 0, 10, 100)
    permutations = {tuple(one.window_permutation(i)) for i in range(10)}
    assert len(permutations) == 10
    other = make_order(counts, 1, 10, 100)
    assert {tuple(other.window_permutation(i)) for i in range(10)}.isdisjoint(permutations)


def test_asking_order_does_not_matter() -> None:
    counts = [7, 2, 9, 4]
    forward = make_order(counts, 3, 5, 200)
    backward = make_order(counts, 3, 5, 200)
    windows = range(forward.num_windows)
    one = {i: forward.window_segments(i) for i in windows}
    other = {i: backward.window_segments(i) for i in reversed(windows)}
    assert one == other


def test_each_shard_is_as_likely_to_come_first() -> None:
    firsts = Counter(
        make_order([1, 1, 1, 1], seed, 4, 4).window_segments(0)[0].shard for seed in range(2000)
    )
    # 500 expected each, with a standard deviation of 19.
    assert set(firsts) == {0, 1, 2, 3}
    assert all(abs(count - 500) < 90 for count in firsts.values())


def test_a_hundred_thousand_shards_are_quick() -> None:
    order = RunOrder(np.full(100_000, 1000), 0, 4096, 300_000_000)
    started_at_s = time.perf_counter()
    for window in [0, 1, 30_000, 60_000, order.num_windows - 1]:
        length = sum(s.stop - s.start for s in order.window_segments(window))
        start, stop = order.window_bounds(window)
        assert length == stop - start
    assert time.perf_counter() - started_at_s < 2.0  # measured: 0.02 s
