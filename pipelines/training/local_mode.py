"""Train in the driver's process if there is one worker and no cluster, by Ray Train's local mode.

A separate worker costs half a minute of start-up: Ray starts a controller, a placement group, an
actor that splits the data and the worker, and each of these processes imports torch again. In local
mode `ray.train` and Ray Data are used in the same way, and the training function runs in the
driver's process (docs/adr/0027).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray.train
import ray.train.torch
import torch

from infra import processes
from pipelines.config.sections import ScalingConfig
from pipelines.training.torch_state import restored_torch

logger = logging.getLogger(__name__)

# How the threads are named that read: Ray Data's and those of `pipelines.reading.batches.ahead`.
READERS = ("iter_threaded", "StreamingExecutor", "ahead")
READERS_END_S = 10.0


def fit_in_driver(
    train: Callable[[], object], scaling: ScalingConfig, is_stopping: Callable[[], bool]
) -> None:
    """Train in this process, and start again after an error, as Ray does with its workers.

    An error that would come again is recorded in the run's folder, where the next start finds it
    and raises it.

    Args:
        train: opens the data, trains from the newest checkpoint on, and returns at the end.
        scaling: says how many errors the run survives.
        is_stopping: whether the run was asked to stop, after which nothing is started again.
    """
    processes.note_working(threading.current_thread())
    for failures_left in range(scaling.max_failures, -1, -1):
        try:
            with restored_torch(scaling), _ended_readers():
                train()
        except Exception as error:
            if failures_left == 0 or is_stopping():
                raise
            reason = str(error).strip().partition("\n")[0]
            logger.debug("training failed (%s: %s); it starts again", type(error).__name__, reason)
        else:
            return


@contextmanager
def _ended_readers() -> Iterator[None]:
    """Wait at the end until no thread reads the data any more.

    A thread that asks a Ray for data after `ray.shutdown` would end the process with exit code 1.
    """
    before = set(threading.enumerate())
    try:
        yield
    finally:
        until_s = time.monotonic() + READERS_END_S
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith(READERS):
                thread.join(max(until_s - time.monotonic(), 0.0))
                processes.note_working(thread)


def training_device(scaling: ScalingConfig) -> torch.device:
    """Return the device that this worker trains on, in the driver's process or in one of Ray's."""
    if not scaling.use_gpu:
        return torch.device("cpu")
    # Ray shows all GPUs of a node to each of several workers, and only its own to a single one.
    return ray.train.torch.get_device() if scaling.num_workers > 1 else torch.device("cuda", 0)
