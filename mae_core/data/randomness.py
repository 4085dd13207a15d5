"""Randomness that depends on names, never on who asks first.

What happens to a sample is a function of (seed, epoch, sample key): not of the worker, the
batch or the restart that it met. Counter-based generators make this cheap.
"""

import hashlib

import numpy as np


def named_generator(seed: int, *names: int | str) -> np.random.Generator:
    """A generator for (seed, names), the same in every process and on every machine."""
    # A numpy number names the same as the number.
    parts = (f"str:{x}" if isinstance(x, str) else f"int:{int(x)}" for x in (seed, *names))
    words = "\x1f".join(parts)
    digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def sample_generator(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of one sample's crop, flip and mask in one epoch."""
    return named_generator(seed, "sample", epoch, key)
