"""Reads many examples in chunks of one size, so that the memory for this does not grow with the number of examples."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, Shaped

CHUNK_BYTES = 1 << 20


def chunk_size(*arrays: Shaped[np.ndarray, "example ..."]) -> int:
    """How many examples a chunk has, so that their rows in all these arrays take CHUNK_BYTES; at least 1."""
    return max(1, CHUNK_BYTES // max(1, sum(array[:1].nbytes for array in arrays)))


def positions(
    ranges: Int64[np.ndarray, "range 2"], chunk_size: int
) -> Iterator[tuple[Int64[np.ndarray, "example"], Int64[np.ndarray, "example"]]]:
    """All positions within the ranges, range after range, `chunk_size` at a time: (number of the range, position).

    A range that runs backwards holds no position.
    """
    sizes = np.maximum(ranges[:, 1] - ranges[:, 0], 0)
    # Number all positions from 0 on: range i has the numbers below stops[i] that no earlier range has.
    stops = sizes.cumsum()
    offsets = ranges[:, 0] - (stops - sizes)
    for first in range(0, int(sizes.sum()), chunk_size):
        number = np.arange(first, min(first + chunk_size, int(stops[-1])))
        owner = np.searchsorted(stops, number, side="right")
        yield owner, number + offsets[owner]
