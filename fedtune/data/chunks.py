"""Many examples, some at a time: what a look at all of them needs of memory does not grow with their number."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, Shaped

CHUNK_BYTES = 1 << 20


def rows(*arrays: Shaped[np.ndarray, "example ..."]) -> int:
    """How many examples to look at together, where each has a row in every array."""
    return max(1, CHUNK_BYTES // max(1, sum(array[:1].nbytes for array in arrays)))


def positions(
    ranges: Int64[np.ndarray, "range 2"], rows: int
) -> Iterator[tuple[Int64[np.ndarray, "example"], Int64[np.ndarray, "example"]]]:
    """The positions within the ranges, range after range and `rows` at a time, each with its range's number before it.

    A range that runs backwards holds none.
    """
    sizes = np.maximum(ranges[:, 1] - ranges[:, 0], 0)
    ends = sizes.cumsum()
    offsets = ranges[:, 0] - (ends - sizes)
    for first in range(0, int(sizes.sum()), rows):
        number = np.arange(first, min(first + rows, int(ends[-1])))
        owner = np.searchsorted(ends, number, side="right")
        yield owner, number + offsets[owner]
