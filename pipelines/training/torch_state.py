"""Keep what a training in the driver's process changes in torch from what comes after it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipelines.config.sections import ScalingConfig


@contextmanager
def restored_torch(scaling: ScalingConfig) -> Iterator[None]:
    """Restore torch's number of threads and its random state at the end of the block."""
    num_threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng([0] if scaling.use_gpu else []):
            yield
    finally:
        torch.set_num_threads(num_threads)
