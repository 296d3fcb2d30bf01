"""Train, validation and test: how each client's examples are split."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from fedtune import rng
from fedtune.errors import InputError, UnknownNameError

PARTS = ("train", "validation", "test")


def part_number(part: str) -> int:
    """The place of a part in PARTS."""
    if part not in PARTS:
        raise UnknownNameError("part", part, PARTS)
    return PARTS.index(part)


def part_sizes(
    num_examples: Int64[np.ndarray, "client"], fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> Int64[np.ndarray, "client 3"]:
    """How many examples each client has in each of PARTS. If there are few, validation and test get theirs first."""
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise InputError(f"fractions must be > 0 and sum to 1, got {fractions}")
    wanted = [np.maximum(1, np.rint(fraction * num_examples).astype(np.int64)) for fraction in fractions[1:]]
    validation = np.minimum(wanted[0], num_examples)
    test = np.minimum(wanted[1], num_examples - validation)
    return np.stack([num_examples - validation - test, validation, test], axis=1)


def split_clients(
    sizes: Sequence[int], fractions: tuple[float, float, float], seed: int
) -> tuple[list[Int64[np.ndarray, "_"]], Int64[np.ndarray, "client 3 2"]]:
    """Each client's examples in random order, and the ranges of its parts when all clients stand one after another."""
    n = np.array(sizes, np.int64)
    parts = part_sizes(n, fractions)
    starts = (n.cumsum() - n)[:, None] + parts.cumsum(axis=1) - parts
    permutations = [rng.stream(seed, "split", client).permutation(size) for client, size in enumerate(sizes)]
    return permutations, np.stack([starts, starts + parts], axis=2)
