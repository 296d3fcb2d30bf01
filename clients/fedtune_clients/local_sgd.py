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

import itertools
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtune.client.examples import Examples, StoredExamples
from fedtune.client.flat_model import FlatModel
from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.space import Config, Hyperparameter, Number
from fedtune_clients.backprop import ALIGNMENT, Backprop, Client
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

MOST_TOGETHER = 16  # clients; more gain nothing
TOGETHER_WEIGHTS = 2**17  # of all of them: 512 KiB, which stay in a core's cache
LARGEST_TOGETHER = 512  # examples in a batch; a larger one keeps a core busy by itself
MOST_FILLED = 4  # times as many examples as a client's own that its batch is filled up to

Training = tuple[Examples, Client]  # a batch and who trains on it

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
    (trained,) = train_together(model, weights, [examples], [config], [rng])
    return trained


def num_together(model: FlatModel) -> int:
    """How many clients `train_together` had best be given at a time: 1 where it can't take more, or gains nothing."""
    if not (model.flat.is_cpu and _backprop(model, False).takes_several):
        return 1
    return max(1, min(MOST_TOGETHER, TOGETHER_WEIGHTS // model.num_weights))


def train_together(
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    examples: Sequence[Examples | StoredExamples],
    configs: Sequence[Config],
    rngs: Sequence[np.random.Generator],
) -> list[Float[Tensor, "weight"]]:
    """What `train` gives for each of several clients, to the bit. See `num_together`."""
    completed = [complete(config) for config in configs]
    backprop = _backprop(model, torch.is_autocast_enabled(model.flat.device.type))
    if len(completed) > 1 and not backprop.takes_several:
        raise InputError(f"clients of this model must train one at a time, got {len(completed)}")
    clients = []
    rows = _rows(model, weights, len(completed))
    for row, config, rng in zip(rows, completed, rngs, strict=True):
        generator = None
        seed = int(rng.integers(2**63))
        if not backprop.takes_several:
            _prepare(model.module, config["dropout"], seed)
        elif config["dropout"] > 0:
            generator = torch.Generator(row.device).manual_seed(seed)
        clients.append(Client(Descent(model.slices(row), config), config["dropout"], generator))
    streams = map(_batches, examples, completed, rngs)
    for step in itertools.zip_longest(*streams):  # some have fewer
        training = [(batch, client) for batch, client in zip(step, clients, strict=True) if batch is not None]
        for together in _alike(training) if len(training) > 1 else [training]:
            backprop.step(*zip(*together, strict=True))  # 4
    return rows  # 5


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


def _rows(model: FlatModel, weights: Float[Tensor, "weight"], count: int) -> list[Float[Tensor, "weight"]]:
    """So many copies of the weights: the model's own where it is one, and else each at an aligned place in memory."""
    if count == 1:
        model.load(weights)
        return [model.flat]
    length = -(-model.num_weights // ALIGNMENT) * ALIGNMENT
    rows = weights.new_empty(count, length)[:, : model.num_weights]
    return list(rows.copy_(weights).unbind())


def _prepare(module: nn.Module, dropout: float, seed: int) -> None:
    """Puts the module into training mode with this dropout, and seeds the random numbers that its layers draw."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    if next(module.parameters()).is_cpu:
        torch.default_generator.manual_seed(seed)  # 200 times as fast as torch.manual_seed, which seeds every device
    else:
        torch.manual_seed(seed)


def _batches(
    examples: Examples | StoredExamples, config: dict[str, Number], rng: np.random.Generator
) -> Iterator[Examples]:
    for _ in range(int(config["epochs"])):  # 1
        order = torch.from_numpy(rng.permutation(examples.num_examples))
        for rows in torch.split(order, int(config["batch_size"])):  # 2, 3
            yield examples.take(rows)  # one batch at a time, which a core's cache holds


def _alike(training: list[Training]) -> Iterator[list[Training]]:
    """Those whose batches are small and of similar sizes together: all are filled up to the largest."""
    training = sorted(training, key=lambda each: -each[0].num_examples)
    while training:
        largest = training[0][0].num_examples
        fit = [each for each in training if MOST_FILLED * each[0].num_examples >= largest]
        together = fit if largest <= LARGEST_TOGETHER else training[:1]
        yield together
        training = training[len(together) :]


def _backprop(model: FlatModel, autocasts: bool) -> Backprop:
    known = _BACKPROPS.setdefault(model, {})
    if autocasts not in known:
        known[autocasts] = Backprop(model, written_out=not autocasts)  # autocast heeds autograd's operations alone
    return known[autocasts]


_BACKPROPS: weakref.WeakKeyDictionary[FlatModel, dict[bool, Backprop]] = weakref.WeakKeyDictionary()
