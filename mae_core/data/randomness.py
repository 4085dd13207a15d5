"""Random generators that depend on names, not on the order of calls.

What happens to a sample depends only on (seed, epoch, sample key), not on the worker, the batch or
a restart. Counter-based generators make this cheap.
"""

import hashlib

import numpy as np


def named_generator(seed: int, *names: int | str) -> np.random.Generator:
    """Return a generator for (seed, names), the same in every process and on every machine."""
    # A numpy integer gives the same generator as the Python integer.
    parts = (f"str:{x}" if isinstance(x, str) else f"int:{int(x)}" for x in (seed, *names))
    words = "\x1f".join(parts)
    digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def sample_generator(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Return the generator for one sample's crop, flip and mask in one epoch."""
    return named_generator(seed, "sample", epoch, key)
