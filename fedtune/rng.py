"""Random streams keyed by what they are for, so that no draw depends on which other draws were made before it."""

import hashlib

import numpy as np

from fedtune.errors import InputError


def seed_sequence(seed: int | np.integer, purpose: str, *keys: int | np.integer) -> np.random.SeedSequence:
    """The seed sequence of one purpose: equal arguments give equal streams, different ones independent streams.

    Raises InputError if the seed is negative.
    """
    if seed < 0:
        raise InputError(f"seed must be a whole number >= 0, got {seed}")
    # Hashed, not listed as entropy words: numpy pads entropy with zeros, so (seed, purpose) and (seed, purpose, 0)
    # would agree.
    name = repr((int(seed), purpose, tuple(int(key) for key in keys)))
    return np.random.SeedSequence(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest()))


def stream(seed: int | np.integer, purpose: str, *keys: int | np.integer) -> np.random.Generator:
    """A generator of its own for one purpose, for example `stream(seed, "cohort", server_round)`."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, purpose, *keys)))


def derived_seed(seed: int | np.integer, purpose: str, *keys: int | np.integer) -> int:
    """A seed in [0, 2**62) for one purpose: a Flower ConfigRecord holds signed 64-bit integers."""
    return int(seed_sequence(seed, purpose, *keys).generate_state(1, np.uint64)[0] >> np.uint64(2))
