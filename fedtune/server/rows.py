"""The clipped updates of a cohort as matrices, one for each chunk of coordinates: so memory stays bounded."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_NUMBERS = 2**18  # in a chunk's matrix: 1 MiB, which a core's cache holds


def rows_of_chunks(
    weights: Float[Tensor, "weight"], updates: Sequence[Float[Tensor, "weight"]], scale: Float[np.ndarray, "client"]
) -> Iterator[tuple[slice, Float[Tensor, "client chunk"]]]:
    """Each chunk of the coordinates, and the clients' clipped weights in it, a row for each client.

    A client's clipped weights are `weights + scale * (update - weights)`, with the client's own scale.
    """
    width = max(1, CHUNK_NUMBERS // len(updates))
    clipped = np.flatnonzero(scale < 1).tolist()
    for start in range(0, len(weights), width):
        chunk = slice(start, start + width)
        rows = torch.stack([update[chunk] for update in updates])
        for client in clipped:
            # In double precision: the scale of a huge update is too small for single precision.
            change = rows[client].double() - weights[chunk]
            rows[client] = weights[chunk] + float(scale[client]) * change
        yield chunk, rows


def mean_of_rows(rows: Float[Tensor, "client chunk"]) -> Float[Tensor, "chunk"]:
    """The mean over the rows in double precision, added row by row: so it does not depend on the chunk's width."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for row in rows:
        total.add_(row)
    return total / len(rows)
