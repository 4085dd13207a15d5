"""Shards give the run's fixed sequence: the same global batches for any layout and restart."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data

from mae_core.data.manifest import Manifest
from mae_core.data.views import ViewSpec
from pipelines.reading import sequence, shards
from pipelines.reading.batches import decode_block
from pipelines.reading.sequence import (
    RestingScheduler,
    SequencePlan,
    configure_ray_data,
    micro_batches,
    passes_per_block,
    read_window,
    sequence_dataset,
)
from pipelines.reading.shards import (
    open_shards,
)
from tests.pipelines.shard_sets import make_plan

SPEC = ViewSpec(seed=3, in_chans=3, size=(16, 16), crop_scale=(0.2, 1.0), flip=True)


@pytest.fixture(autouse=True)
def _forget_indexes() -> None:
    shards._index.cache_clear()


def open_foreign(folder: Path) -> Manifest:
    return open_shards(str(folder), str(folder.parent / "cache"))


@pytest.mark.parametrize("micro", [1, 4, 8, 16])
def test_a_window_comes_in_micro_batches_of_one_size(foreign: Path, micro: int) -> None:
    blocks = list(read_window(make_plan(open_foreign(foreign), micro=micro), 1))
    assert [len(block) for block in blocks] == [micro] * (16 // micro)
    positions = [p for block in blocks for p in block["position"].to_pylist()]
    assert positions == list(range(16, 32))
    # An epoch is one window here.
    assert sorted(key for block in blocks for key in block["key"].to_pylist()) == [
        f"{i:03d}" for i in range(16)
    ]


def test_a_window_is_read_from_the_start_on(foreign: Path) -> None:
    manifest = open_foreign(foreign)
    whole = pa.concat_tables(read_window(make_plan(manifest, micro=4), 1))
    rest = pa.concat_tables(read_window(make_plan(manifest, micro=4, start=24), 1))
    assert rest.equals(whole.slice(8))


def test_windows_are_shuffled_and_differ_by_epoch(foreign: Path) -> None:
    plan = make_plan(open_foreign(foreign), micro=16)
    keys = [next(iter(read_window(plan, w)))["key"].to_pylist() for w in range(3)]
    assert keys[0] != sorted(keys[0])
    assert len({tuple(k) for k in keys}) == 3


def collect(plan: SequencePlan, splits: int, **options: Any) -> list[list[tuple[int, int, str]]]:
    """Return each split's rows in order, as a training worker gets them."""
    dataset = sequence_dataset(plan, **options)

    def read(shard: Any) -> list[tuple[int, int, str]]:
        return [
            row
            for batch in micro_batches(
                shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1)
            )
            for row in zip(
                batch["position"].to_pylist(),
                batch["epoch"].to_pylist(),
                batch["key"].to_pylist(),
                strict=True,
            )
        ]

    with ThreadPoolExecutor(splits) as pool:
        return list(pool.map(read, dataset.streaming_split(splits, equal=True)))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_global_batches_are_the_same_for_any_number_of_workers(foreign: Path) -> None:
    """Plan global batches of 8 and three epochs of 16 samples in shards of 5, 3 and 8."""
    configure_ray_data()
    manifest = open_foreign(foreign)
    expected = [
        row
        for window in range(4)
        for block in read_window(make_plan(manifest, micro=4, window=12), window)
        for row in zip(
            block["position"].to_pylist(),
            block["epoch"].to_pylist(),
            block["key"].to_pylist(),
            strict=True,
        )
    ]
    assert [position for position, *_ in expected] == list(range(48))
    assert set(Counter((epoch, key) for _, epoch, key in expected).values()) == {1}
    for micro, splits, start, passes in [
        (4, 1, 0, 1),
        (4, 1, 16, 3),
        (4, 2, 0, 1),  # here and below at 8: windows of no whole rounds, so no shared blocks
        (2, 4, 0, 2),
        (1, 4, 0, 2),
        (1, 4, 8, 5),
        (2, 2, 0, 2),
        (2, 2, 8, 3),
        (4, 2, 16, 2),
        (2, 4, 8, 1),
    ]:
        plan = replace(
            make_plan(manifest, micro=micro, window=12, start=start),
            num_workers=splits,
            passes_per_block=passes,
        )
        shares = collect(plan, splits)
        for rank, share in enumerate(shares):
            assert [position for position, *_ in share] == [
                start + p for p in range(48 - start) if p // micro % splits == rank
            ], (micro, splits, start)
        assert sorted(row for share in shares for row in share) == expected[start:]


def test_a_block_has_some_megabytes_but_a_window_has_blocks(foreign: Path) -> None:
    plan = replace(make_plan(open_foreign(foreign), micro=64, window=4096), num_workers=2)
    assert passes_per_block(plan, 128 * 1024) == 2  # 16 MiB / (64 x 128 KiB)
    assert passes_per_block(plan, 10) == 32  # a whole window
    assert passes_per_block(plan, 10**9) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_cluster_decodes_to_the_same_pixels(foreign: Path) -> None:
    configure_ray_data()
    plan = make_plan(open_foreign(foreign), micro=4, num_samples=16)
    tables = list(
        micro_batches(
            sequence_dataset(plan, partial(decode_block, spec=SPEC)).iter_batches(
                batch_size=1, batch_format="pyarrow"
            )
        )
    )
    expected = [decode_block(block, SPEC) for block in read_window(plan, 0)]
    assert pa.concat_tables(tables).equals(pa.concat_tables(expected))
    assert all(pa.concat_tables(tables)["decoded"].to_pylist())


def test_the_scheduler_rests_longer_as_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rests = iter([100.0, 100.0, 101.0, 102.0, 900.0]), list[float]()
    monkeypatch.setattr(sequence.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sequence.time, "sleep", rests.append)
    scheduler = RestingScheduler()
    scheduler.before_execution_starts(None)
    for _ in range(4):
        scheduler.on_execution_step(None)
    assert rests == pytest.approx([0.0, 0.01, 0.02, 0.02])


class CountedRests(RestingScheduler):
    count = 0

    def on_execution_step(self, executor: object) -> None:
        super().on_execution_step(executor)
        type(self).count += 1


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_lets_the_scheduler_rest(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure_ray_data()
    context = ray.data.DataContext.get_current()
    assert RestingScheduler in context.custom_execution_callback_classes
    monkeypatch.setattr(context, "custom_execution_callback_classes", [CountedRests])
    rows = sequence_dataset(make_plan(open_foreign(foreign), micro=4, num_samples=16))
    assert sum(1 for _ in rows.iter_batches(batch_size=1, batch_format="pyarrow")) > 0
    assert CountedRests.count > 0


def test_ray_data_is_configured_once_however_often_it_is_asked() -> None:
    for _ in range(2):
        configure_ray_data()
    classes = ray.data.DataContext.get_current().custom_execution_callback_classes
    assert classes.count(RestingScheduler) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("per_group", [5, 2])  # without groups, and in three
def test_windows_come_in_order_and_each_is_a_task_of_its_own(per_group: int) -> None:
    configure_ray_data()
    blocks = sequence._numbers(5, per_group).iter_batches(batch_size=None, batch_format="pyarrow")
    assert [block["id"].to_pylist() for block in blocks] == [[0], [1], [2], [3], [4]]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("window", [16, 12])
def test_a_run_that_is_at_its_end_reads_nothing(foreign: Path, window: int) -> None:
    configure_ray_data()
    plan = make_plan(open_foreign(foreign), micro=4, window=window, start=48)
    assert collect(plan, 2) == [[], []]
