"""The guard before every aggregation: which updates count, and how far each one may move the weights.

- An update that is not finite is rejected, and so is the update of a client without training examples.
- An update whose norm exceeds `clip_factor` times the median norm of the cohort's updates is clipped: it is scaled down
  to that norm. The median is over the updates that are usable and not zero.

Without this guard one such client would destroy the weights that all clients share. An update's norm is the distance
between the client's weights after training and the weights from which it started.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor


class Guarded(NamedTuple):
    """What the guard found in each update."""

    usable: Bool[np.ndarray, "client"]
    scale: Float[np.ndarray, "client"]  # by which the client's change is multiplied: 1 unless it is clipped


def inspect(
    weights: Float[Tensor, "weight"],
    updates: Sequence[Float[Tensor, "weight"]],
    num_train: Real[np.ndarray, "client"],
    clip_factor: float,
) -> Guarded:
    """Which of the clients' weights are usable, and the scale of each client's change from `weights`.

    A `clip_factor` of 0 turns clipping off.
    """
    # Measure how far each client moved. One buffer holds all the differences: allocating is slow here.
    buffer = torch.empty_like(weights)
    norms = np.array([_norm(torch.sub(update, weights, out=buffer)) for update in updates])
    usable = np.isfinite(norms) & (num_train > 0)
    # Find the scale of each update.
    scale = np.ones(len(updates))
    moved = usable & (norms > 0)
    if clip_factor > 0 and moved.any():
        bound = clip_factor * np.median(norms[moved])
        too_far = usable & (norms > bound)
        scale[too_far] = bound / norms[too_far]
    return Guarded(usable, scale)


def _norm(vector: Float[Tensor, "weight"]) -> float:
    norm = math.sqrt(float(torch.dot(vector, vector)))
    if math.isfinite(norm):
        return norm
    # An update of 1e30 is finite and must be clipped, but its square overflows in single precision. Double precision
    # costs 20 times more, so it is used only here.
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
