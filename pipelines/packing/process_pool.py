"""A pool of processes that read and pack; none of them outlives the command."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from mae_core.data.samples import DataError


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # Not fork: the caller may have threads, and a copied lock would hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DataError(
            "a packing process was killed, perhaps for lack of memory; lower workers or "
            "max_shard_bytes, and run the same command again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End if the parent was killed: a pool's process would wait for work for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
