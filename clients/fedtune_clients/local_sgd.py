"""Local SGD: what a client does with the weights it is sent. With `proximal_mu` > 0 it is the local solver of FedProx.

Source: McMahan et al. (2017), "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1,
ClientUpdate; the proximal term is equation 2 of Li et al. (2020), "Federated Optimization in Heterogeneous Networks".

    ClientUpdate(k, w):
    1   for each local epoch i from 1 to E do
    2       B <- (split P_k into batches of size B)
    3       for batch b in B do
    4           w <- w - eta * grad l(w; b)
    5   return w to server

E is epochs, B batch_size, eta learning_rate, P_k examples. Added: momentum, dropout, weight decay and FedProx's term.
Line 4 follows the gradient of l(w; b) + weight_decay/2 |w|^2 + proximal_mu/2 |w - w0|^2, where w0 is the weights sent.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtune.errors import UnknownNameError
from fedtune.flat_model import Examples, FlatModel, batches
from fedtune.tuning.space import Config, Hyperparameter, Number
from fedtune_clients.backprop import Backprop
from fedtune_clients.descent import Descent

HYPERPARAMETERS = {
    "learning_rate": Hyperparameter(0.1, low=0.0, low_open=True),
    "momentum": Hyperparameter(0.0, low=0.0, high=1.0, high_open=True),
    "weight_decay": Hyperparameter(0.0, low=0.0),
    "batch_size": Hyperparameter(10, low=1, integer=True),
    "epochs": Hyperparameter(1, low=1, integer=True),
    "dropout": Hyperparameter(0.0, low=0.0, high=1.0, high_open=True),
    "proximal_mu": Hyperparameter(0.0, low=0.0),
}

# What is searched on data for which nobody chose: the ranges of Khodak et al. (2021), as in mnist.toml.
SPACE = {
    "learning_rate": {"log_uniform": [1e-4, 1.0]},
    "momentum": {"uniform": [0.0, 0.99]},
    "weight_decay": {"log_uniform": [1e-5, 1e-3]},
    "batch_size": {"power_of_two": [8, 128]},
    "epochs": {"integer": [1, 5]},
    "dropout": {"uniform": [0.0, 0.5]},
    "proximal_mu": {"log_uniform": [1e-5, 1.0]},
}


def train(
    model: FlatModel, weights: Float[Tensor, "weight"], examples: Examples, config: Config, rng: np.random.Generator
) -> Float[Tensor, "weight"]:
    """The weights after local SGD from `weights` on `examples`: `model.flat`, valid until the model is next used.

    They depend on the arguments alone, not on what the model did before. What `config` leaves out keeps its default.
    """
    config = complete(config)
    model.load(weights)
    _prepare(model.module, config["dropout"], rng)
    backprop = _backprop(model, torch.is_autocast_enabled(model.flat.device.type))
    descent = Descent(model, config)
    for _ in range(int(config["epochs"])):  # 1
        for x, y in batches(_shuffled(examples, rng), int(config["batch_size"])):  # 2, 3
            backprop.step(x, y, descent)  # 4
    return model.flat  # 5


def train_batched(
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    examples: Examples,
    sizes: Sequence[int],
    configs: Sequence[Config],
    rngs: Sequence[np.random.Generator],
) -> Float[Tensor, "client weight"]:
    """What `train` gives for each of several clients, to rounding: see `fedtune_clients.batched_sgd.train`."""
    from fedtune_clients import batched_sgd  # which imports this module

    return batched_sgd.train(model, weights, examples, sizes, configs, rngs)


def complete(config: Config) -> dict[str, Number]:
    """The configuration with the defaults of what it leaves out."""
    for name in config:
        if name not in HYPERPARAMETERS:
            raise UnknownNameError("client hyperparameter", name, HYPERPARAMETERS)
    return {name: hp.check(name, config.get(name, hp.default)) for name, hp in HYPERPARAMETERS.items()}


def _prepare(module: nn.Module, dropout: float, rng: np.random.Generator) -> None:
    """Puts the module into training mode with this dropout, and seeds the random numbers that its layers draw."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    seed = int(rng.integers(2**63))
    if next(module.parameters()).is_cpu:
        torch.default_generator.manual_seed(seed)  # 200 times as fast as torch.manual_seed, which seeds every device
    else:
        torch.manual_seed(seed)


def _shuffled(examples: Examples, rng: np.random.Generator) -> Examples:
    order = torch.from_numpy(rng.permutation(len(examples.y))).to(examples.y.device)
    return Examples(examples.x.index_select(0, order), examples.y.index_select(0, order))


@functools.lru_cache(maxsize=1)
def _backprop(model: FlatModel, autocasts: bool) -> Backprop:
    return Backprop(model, written_out=not autocasts)  # autocast heeds autograd's operations alone
