"""Server optimisers: how the server's weights move towards the clients' mean.

Source: Reddi et al., Adaptive Federated Optimization, 2021, algorithm 2 (FedAdam, FedYogi; without bias correction, as
in the source), and its appendix for FedAvgM. Symbols: Delta_t -> change, m_t -> first, v_t -> second, eta ->
learning_rate, beta_1, beta_2, tau -> beta1, beta2, tau. Departures: v starts at 0, in the source at tau^2 or more; the
learning rate shrinks by the fraction `decay` each round (Khodak et al. 2021).
"""

from typing import Any, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float
from torch import Tensor

from fedtune.settings import ServerSettings
from fedtune.tuning.space import Config, Hyperparameter


def _hyperparameter(name: str) -> Hyperparameter:
    """The default and the range that the setting `server.<name>` has."""
    setting = ServerSettings.model_fields[name]
    bounds: dict[str, Any] = {}
    for constraint in setting.metadata:
        if isinstance(constraint, Gt | Ge):
            low = constraint.gt if isinstance(constraint, Gt) else constraint.ge
            bounds |= {"low": float(low), "low_open": isinstance(constraint, Gt)}  # type: ignore[arg-type]
        elif isinstance(constraint, Lt):
            bounds |= {"high": float(constraint.lt), "high_open": True}  # type: ignore[arg-type]
    return Hyperparameter(default=setting.default, **bounds)


HYPERPARAMETERS = {
    name: _hyperparameter(name)
    for name in (
        "learning_rate",
        "momentum",
        "decay",
        "beta1",
        "beta2",
        "tau",
    )
}


class OptimizerState(NamedTuple):
    """The moments of the pseudo-gradient; `second` stays zero under SGD."""

    first: Float[Tensor, "weight"]
    second: Float[Tensor, "weight"]


def init(weights: Float[Tensor, "weight"]) -> OptimizerState:
    """Zero moments."""
    return OptimizerState(torch.zeros_like(weights), torch.zeros_like(weights))


def update(
    optimizer: str,
    state: OptimizerState,
    weights: Float[Tensor, "weight"],
    mean: Float[Tensor, "weight"],
    config: Config,
    server_round: int,
) -> tuple[Float[Tensor, "weight"], OptimizerState]:
    """The new weights and state after round `server_round` (from 1); `mean` is the mean of the clients' weights."""
    learning_rate = config["learning_rate"] * (1 - config["decay"]) ** (server_round - 1)
    if optimizer == "sgd" and learning_rate == 1.0 and config["momentum"] == 0.0:
        return mean, state  # w + (mean - w) is the mean, here without its rounding
    change = mean - weights
    if optimizer == "sgd":
        first = config["momentum"] * state.first + change
        return weights + learning_rate * first, OptimizerState(first, state.second)
    beta1, beta2 = config["beta1"], config["beta2"]
    first = beta1 * state.first + (1 - beta1) * change
    square = change * change
    if optimizer == "adam":
        second = beta2 * state.second + (1 - beta2) * square
    else:
        second = state.second - (1 - beta2) * square * torch.sign(state.second - square)
    return weights + learning_rate * first / (second.sqrt() + config["tau"]), OptimizerState(first, second)
