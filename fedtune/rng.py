"""Random streams keyed by what they are for, so that no draw depends on which other draws were made before it."""

import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt32

from fedtune.errors import InputError


def seed_sequence(seed: int | np.integer, purpose: str, *keys: int | np.integer) -> np.random.SeedSequence:
    """The seed sequence of one purpose: equal arguments give equal streams, different ones independent streams.

    Raises InputError if the seed is negative.
    """
    return np.random.SeedSequence(int.from_bytes(_entropy(seed, purpose, keys)))


def stream(seed: int | np.integer, purpose: str, *keys: int | np.integer) -> np.random.Generator:
    """A generator of its own for one purpose, for example `stream(seed, "cohort", server_round)`."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, purpose, *keys)))


def derived_seed(seed: int | np.integer, purpose: str, *keys: int | np.integer) -> int:
    """A seed in [0, 2**62) for one purpose: a Flower ConfigRecord holds signed 64-bit integers."""
    return int(seed_sequence(seed, purpose, *keys).generate_state(1, np.uint64)[0] >> np.uint64(2))


def derived_seeds(
    seed: int | np.integer, purpose: str, *keys: int | np.integer, last_keys: Iterable[int | np.integer]
) -> list[int]:
    """The `derived_seed` for each of the `last_keys`, which follow the `keys`: for many keys in a third of the time."""
    entropy = b"".join(_entropy(seed, purpose, (*keys, last)) for last in last_keys)
    words = np.frombuffer(entropy, ">u4").astype(np.uint32).reshape(-1, 4)[:, ::-1].T  # (word, key), the lowest first
    low, high = _generate_state(words).tolist()
    return [(first | second << 32) >> 2 for first, second in zip(low, high, strict=True)]


def _entropy(seed: int | np.integer, purpose: str, keys: Iterable[int | np.integer]) -> bytes:
    if seed < 0:
        raise InputError(f"seed must be a whole number >= 0, got {seed}")
    # Hashed, not listed as entropy words: numpy pads entropy with zeros, so (seed, purpose) and (seed, purpose, 0)
    # would agree.
    name = repr((int(seed), purpose, tuple(map(int, keys))))
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


# numpy's SeedSequence, for many sequences at once. numpy promises that the algorithm stays as it is; it is O'Neill's
# seed_seq_fe, 2015. Products are modulo 2**32.


def _powers(start: int, factor: int, count: int) -> UInt32[np.ndarray, "power 1"]:
    """The numbers start * factor**i modulo 2**32, for i from 0 on, as a column."""
    return np.array([[start * pow(factor, i, 2**32) % 2**32] for i in range(count)], np.uint32)


_MIXED = _powers(0x43B0D7E5, 0x931E8875, 17)
_GENERATED = _powers(0x8B51F9DD, 0x58F38DED, 3)
_LEFT, _RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)


def _generate_state(entropy: UInt32[np.ndarray, "4 sequence"]) -> UInt32[np.ndarray, "2 sequence"]:
    """The first two words that each sequence generates from its entropy of four words."""
    pool = _hashed(entropy, _MIXED[:5])
    for source in range(4):
        others = [word for word in range(4) if word != source]
        hashed = _hashed(pool[source], _MIXED[4 + 3 * source : 8 + 3 * source])
        pool[others] = _shifted(_LEFT * pool[others] - _RIGHT * hashed)
    return _hashed(pool[:2], _GENERATED)


def _hashed(words: UInt32[np.ndarray, "..."], constants: UInt32[np.ndarray, "constant 1"]) -> UInt32[np.ndarray, "..."]:
    """Each row of words, hashed with a constant and the next one. A single row is hashed with each of them."""
    return _shifted((words ^ constants[:-1]) * constants[1:])


def _shifted(words: UInt32[np.ndarray, "..."]) -> UInt32[np.ndarray, "..."]:
    shifted: np.ndarray = words ^ words >> np.uint32(16)
    return shifted
