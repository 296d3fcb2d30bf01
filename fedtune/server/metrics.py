"""Means over clients of the errors and losses that they report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


def column(metrics: Sequence[Mapping[str, Any]], name: str) -> Float[np.ndarray, "client"]:
    """One metric of each client."""
    return np.array([float(client[name]) for client in metrics])


def evaluation_means(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean error and loss on both parts, weighted by the clients' numbers of examples, summed in the order given.

    The keys are `validation_error`, `validation_loss`, `test_error` and `test_loss`.
    """
    means = {}
    for part in ("validation", "test"):
        sizes = column(metrics, f"num_{part}")
        for kind in ("error", "loss"):
            values = column(metrics, f"{part}_{kind}")
            means[f"{part}_{kind}"] = float(np.dot(sizes, values) / sizes.sum())
    return means


def finite_mean(metrics: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean by validation examples over the clients whose value is finite; NaN if there is none."""
    values, sizes = column(metrics, name), column(metrics, "num_validation")
    finite = np.isfinite(values)
    return float(np.average(values[finite], weights=sizes[finite])) if sizes[finite].sum() > 0 else float("nan")
