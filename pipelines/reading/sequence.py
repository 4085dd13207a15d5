"""Read shards as a Ray Dataset that delivers the run's one fixed sequence of samples.

The sequence (`mae_core.data.order`) is cut into windows. One Ray Data task reads one window: a
ranged read for each piece of a shard in it, permuted, and cut into micro batches. Micro batches
go to the workers in turn, so a global batch is the same set of samples for any number of workers.
A task depends on its window alone: running it again after losing a node gives the same rows, and
a resumed run starts at its window and opens nothing before it.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from mae_core.data.manifest import (
    ShardInfo,
)
from mae_core.data.order import ChainedOrder, RunOrder
from mae_core.data.samples import (
    Sample,
)
from pipelines.reading.shards import BrokenSample, Rows, read_chosen, target_of

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("position", pa.int64()),  # in the run's sequence
        ("epoch", pa.int32()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("image", pa.large_binary()),  # encoded, or the views' pixels if `decoded`
        ("decoded", pa.bool_()),
        ("error", pa.string()),  # "kind: why" for a sample that can't be read; the image is empty
        (
            "target",
            pa.large_binary(),
        ),  # the file that `SequencePlan.targets` selects, or null
    ]
)
BLOCK_BYTES = 16 * 2**20
_WINDOWS_PER_GROUP = 200
_LONGEST_REST_S = 0.02


# Opening a shard set


# Reading


@dataclass(frozen=True, eq=False)
class SequencePlan:
    """Everything that a read task needs to know."""

    shards: tuple[ShardInfo, ...]
    order: RunOrder | ChainedOrder
    start: int  # position in the sequence at which reading starts
    micro_batch_size: int
    num_workers: int = 1
    passes_per_block: int = 1  # micro batches of one worker that are sent together
    # Rows of each shard in the order, which repeats `shards` again and again; None means all.
    rows: tuple[Rows, ...] | None = None
    targets: tuple[str, ...] = ()  # extensions; the first one that exists comes with the image

    @property
    def can_share_blocks(self) -> bool:
        """Whether each window holds complete rounds of micro batches, one for each worker."""
        return self.order.window % (self.num_workers * self.micro_batch_size) == 0

    def read(self, shard: int, first: int, last: int) -> tuple[str, list[Sample | BrokenSample]]:
        """Return the path of a shard in the order, and its samples [first, last)."""
        info = self.shards[shard % len(self.shards)]
        rows = range(info.num_samples) if self.rows is None else self.rows[shard]
        return info.path, read_chosen(info, rows[first:last])


def read_window(plan: SequencePlan, window: int) -> Iterator[pa.Table]:
    """Yield a window's rows from `plan.start` on, in the run's order, one micro batch at a time."""
    order = plan.order
    rows: list[tuple[int, str, Sample | BrokenSample]] = []
    for epoch, shard, first, last in order.window_segments(window):
        path, samples = plan.read(shard, first, last)
        rows += [(epoch, path, sample) for sample in samples]
    window_start, window_stop = order.window_bounds(window)
    permutation = order.window_permutation(window)
    for begin in range(max(plan.start, window_start), window_stop, plan.micro_batch_size):
        end = min(begin + plan.micro_batch_size, window_stop)
        chosen = [rows[i] for i in permutation[begin - window_start : end - window_start]]
        yield pa.table(
            [
                np.arange(begin, end),
                pa.array([epoch for epoch, _, _ in chosen], pa.int32()),
                pa.array([path for _, path, _ in chosen]),
                pa.array([sample.key for *_, sample in chosen]),
                pa.array([_image(sample) for *_, sample in chosen], pa.large_binary()),
                pa.array([False] * len(chosen)),
                pa.array([getattr(sample, "error", None) for *_, sample in chosen], pa.string()),
                pa.array(
                    [target_of(sample, plan.targets) for *_, sample in chosen], pa.large_binary()
                ),
            ],
            schema=SCHEMA,
        )


def _image(row: Sample | BrokenSample) -> bytes:
    return row.image if isinstance(row, Sample) else b""


def sequence_dataset(
    plan: SequencePlan, decode: Callable[[pa.Table], pa.Table] | None = None
) -> ray.data.Dataset:
    """Return the run from `plan.start` to its end as rows of packed micro batches.

    `micro_batches` unpacks them. Row i is for worker i modulo `plan.num_workers`. `decode` is
    applied in the read task.
    """
    first = plan.order.window_of(plan.start)
    # Ray needs at least one; a window beyond the end is empty.
    num_windows = max(1, plan.order.num_windows - first)
    windows = _numbers(num_windows)
    # Not strict: nothing is stitched across tasks, so Ray Data runs read and slicing as one task.
    return windows.map_batches(
        partial(_read_batch, plan=plan, first=first, decode=decode),
        batch_size=1,
    ).repartition(target_num_rows_per_block=1, strict=False)


def _numbers(num_windows: int, per_group: int = _WINDOWS_PER_GROUP) -> ray.data.Dataset:
    """Return the numbers from 0 on, one in each block.

    Many numbers come in groups, which a stage of their own splits: one task per window would cost
    the driver 2 s or more per thousand windows before the first batch, and a long run has millions.
    For few numbers, that stage would cost the start of another process.
    """
    if num_windows <= per_group:
        return ray.data.range(num_windows, override_num_blocks=num_windows)
    num_groups = -(-num_windows // per_group)
    groups = ray.data.range(num_groups, override_num_blocks=num_groups)
    return groups.map_batches(
        partial(_windows_of_groups, num_windows=num_windows, per_group=per_group),
        batch_size=1,
        num_cpus=0,  # unlike the reading tasks' 1, or Ray Data would merge the two into one task
    ).repartition(target_num_rows_per_block=1, strict=False)


def _windows_of_groups(
    batch: dict[str, npt.NDArray[np.int64]], num_windows: int, per_group: int
) -> Iterator[pa.Table]:
    for group in batch["id"]:
        start = int(group) * per_group
        yield pa.table({"id": np.arange(start, min(start + per_group, num_windows))})


def _read_batch(
    batch: dict[str, npt.NDArray[np.int64]],
    plan: SequencePlan,
    first: int,
    decode: Callable[[pa.Table], pa.Table] | None,
) -> Iterator[pa.Table]:
    num_workers, passes = 1, 1
    if plan.can_share_blocks:
        num_workers, passes = plan.num_workers, plan.passes_per_block
    for window in batch["id"]:
        tables = read_window(plan, first + int(window))
        if decode:
            tables = map(decode, tables)
        while group := list(islice(tables, num_workers * passes)):
            for rank in range(num_workers):
                yield _pack(group[rank::num_workers])


def _pack(tables: list[pa.Table]) -> pa.Table:
    """Pack several micro batches into one row, because Ray Data costs 20 to 30 ms per block."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        for table in tables:
            writer.write_table(table, max_chunksize=len(table))
    data = sink.getvalue()
    offsets = pa.py_buffer(np.asarray([0, data.size], np.int64))
    block = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])
    return pa.table({"block": block})


def micro_batches(rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Unpack a worker's micro batches (of SCHEMA), in order, from rows of `sequence_dataset`."""
    for row in rows:
        for block in row["block"]:
            for batch in pa.ipc.open_stream(block.as_buffer()):
                yield pa.Table.from_batches([batch])


def passes_per_block(plan: SequencePlan, bytes_per_image: float) -> int:
    """Return how many micro batches give a block of about BLOCK_BYTES within a window."""
    a_round = plan.num_workers * plan.micro_batch_size
    wanted = int(BLOCK_BYTES / max(bytes_per_image * plan.micro_batch_size, 1))
    return max(1, min(wanted, plan.order.window // a_round))


class RestingScheduler(ExecutionCallback):
    """Lets Ray Data's scheduler rest between its steps: briefly at a run's start, longer later.

    If the reader is slower than the tasks and their output can't be taken yet, Ray 2.60 checks
    without pausing what can be done, which takes most of a core (ADR 6).
    """

    def before_execution_starts(self, executor: object) -> None:
        self._started = time.monotonic()

    def on_execution_step(self, executor: object) -> None:
        time.sleep(min((time.monotonic() - self._started) / 100, _LONGEST_REST_S))


def configure_ray_data() -> None:
    """Set options in the driver, because Ray Train copies them over a dataset's own options."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.max_errored_blocks = 0
    context.execution_no_progress_timeout_s = 300
    if RestingScheduler not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(RestingScheduler)
