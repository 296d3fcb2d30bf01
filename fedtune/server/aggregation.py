"""How the server makes one vector of weights of the clients' updates: the setting `server.aggregation`.

Every aggregation starts with the guard (`fedtune.server.guard`): it rejects and clips updates. Then `mean` is federated
averaging (`fedtune.server.fedavg`); `median`, `trimmed_mean`, `krum` and `multi_krum` are robust: a minority of
arbitrary updates can't move the weights far. If a round has fewer usable updates than its aggregation needs
(`ServerSettings.fewest_updates`), all of them are rejected, and the weights stay as they are.

A robust aggregation guards the weights. It does not guard theta, which policies such as FedEx learn from the errors
that clients report. There each error is bounded, and weighted by the client's number of validation examples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Real
from torch import Tensor

from fedtune.server import coordinatewise, fedavg, guard, krum
from fedtune.settings import ServerSettings


class Aggregate(NamedTuple):
    """The clients' weights in one, None if there were too few usable updates, and what happened to each update."""

    weights: Float[Tensor, "weight"] | None
    rejected: Bool[np.ndarray, "client"]
    clipped: Bool[np.ndarray, "client"]


def aggregate(
    weights: Float[Tensor, "weight"],
    updates: Sequence[Float[Tensor, "weight"]],
    num_train: Real[np.ndarray, "client"],
    settings: ServerSettings,
) -> Aggregate:
    """The aggregate of `updates`, the clients' weights after training from `weights`, in the order given.

    `num_train` are the clients' numbers of training examples: the mean is weighted by them, the robust aggregations
    only need them to be above 0.
    """
    guarded = guard.inspect(weights, updates, num_train, settings.clip_factor)
    usable, scale = guarded
    if usable.sum() < settings.fewest_updates:
        everyone = np.ones(len(updates), bool)
        return Aggregate(None, rejected=everyone, clipped=~everyone)
    if settings.aggregation == "mean":
        combined = fedavg.average(weights, updates, num_train, guarded)
    else:
        counted = [update for update, counts in zip(updates, usable, strict=True) if counts]
        combined = _robust(weights, counted, scale[usable], settings)
    return Aggregate(combined, ~usable, scale < 1)


def _robust(
    weights: Float[Tensor, "weight"],
    updates: Sequence[Float[Tensor, "weight"]],
    scale: Float[np.ndarray, "client"],
    settings: ServerSettings,
) -> Float[Tensor, "weight"]:
    match settings.aggregation:
        case "median":
            return coordinatewise.median(weights, updates, scale)
        case "trimmed_mean":
            return coordinatewise.trimmed_mean(weights, updates, scale, settings.num_trimmed(len(updates)))
        case "krum":
            return krum.krum(weights, updates, scale, settings.byzantine)
        case "multi_krum":
            return krum.multi_krum(weights, updates, scale, settings.byzantine)
        case _:
            raise AssertionError(settings.aggregation)
