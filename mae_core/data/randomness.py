"""Randomness that depends on names, never on who asks first.

What happens to a sample is a function of (seed, epoch, sample key): not of the worker, the
batch or the restart that it met. Counter-based generators make this cheap.
"""

import hashlib

import numpy as np


def named_generator(seed: int, *names: int | str) -> np.random.Generator:
    """A generator for (seed, names), the same in every process and on every machine."""
    words = "\x1f".join(f"{type(name).__name__}:{name}" for name in (seed, *names))
    digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def sample_generator(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of one sample's crop, flip and mask in one epoch."""
    return named_generator(seed, "sample", epoch, key)
