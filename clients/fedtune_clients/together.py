"""The fast form of `fedtune_clients.local_sgd.client_update`, for one client or for several side by side.

Backpropagation is written out (`fedtune_clients.backprop`). If all layers of a model are written out, several clients
take each step together. For a small model this saves most of the overhead of starting operations. Each client gets the
bits that it would get alone. The numbers at the ends of lines are the line numbers of ClientUpdate.
"""

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtune.client import Config, Examples, FlatModel, Number, StoredExamples
from fedtune.errors import InputError
from fedtune_clients.backprop import ALIGNMENT, Backprop, Client
from fedtune_clients.hyperparameters import complete
from fedtune_clients.sgd_step import SGDStep

MOST_TOGETHER = 16  # clients; more clients gain nothing
TOGETHER_WEIGHTS = 2**17  # of all clients: 512 KiB, which stay in a core's cache
LARGEST_TOGETHER = 512  # examples in a batch; a larger batch keeps a core busy by itself
MOST_FILLED = 4  # a batch is filled up to at most this many times its own number of examples


class Turn(NamedTuple):
    """One client's next step: the batch that it trains on."""

    batch: Examples
    client: Client


def train(
    model: FlatModel, weights: Float[Tensor, "weight"], examples: Examples, config: Config, rng: np.random.Generator
) -> Float[Tensor, "weight"]:
    """The weights after local SGD from `weights` on `examples`: `model.flat`, valid until the model is next used.

    They depend on the arguments alone, not on what the model did before. What `config` leaves out keeps its default.
    """
    (trained,) = train_together(model, weights, [examples], [config], [rng])
    return trained


def num_together(model: FlatModel) -> int:
    """How many clients `train_together` should be given at a time: 1 if more are impossible or gain nothing."""
    if not (model.flat.is_cpu and _backprop(model, autocasts=False).takes_several):
        return 1
    return max(1, min(MOST_TOGETHER, TOGETHER_WEIGHTS // model.num_weights))


def train_together(
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    examples: Sequence[Examples | StoredExamples],
    configs: Sequence[Config],
    rngs: Sequence[np.random.Generator],
) -> list[Float[Tensor, "weight"]]:
    """The weights of each client, with the same bits as from `train`. See `num_together`."""
    completed = [complete(config) for config in configs]
    backprop = _backprop(model, torch.is_autocast_enabled(model.flat.device.type))
    if len(completed) > 1 and not backprop.takes_several:
        raise InputError(f"clients of this model must train one at a time, got {len(completed)}")

    # Each client gets weights of its own, and its own random numbers for dropout.
    rows = _rows(model, weights, len(completed))
    clients = []
    for row, config, rng in zip(rows, completed, rngs, strict=True):
        generator = None
        seed = int(rng.integers(2**63))
        if not backprop.takes_several:
            prepare(model.module, config["dropout"], seed)
        elif config["dropout"] > 0:
            generator = torch.Generator(row.device).manual_seed(seed)
        clients.append(Client(SGDStep(model.slices(row), config), config["dropout"], generator))

    # All clients take their first step, then their second, and so on; some have fewer steps than others.
    for batches in itertools.zip_longest(*map(_batches, examples, completed, rngs)):
        turns = [Turn(batch, client) for batch, client in zip(batches, clients, strict=True) if batch is not None]
        for together in _alike(turns) if len(turns) > 1 else [turns]:
            backprop.step([turn.batch for turn in together], [turn.client for turn in together])  # 4
    return rows  # 5


def prepare(module: nn.Module, dropout: float, seed: int) -> None:
    """Puts the module into training mode, sets `p` of its nn.Dropout layers, and seeds what its layers draw."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    if next(module.parameters()).is_cpu:
        torch.default_generator.manual_seed(seed)  # 200 times as fast as torch.manual_seed, which seeds every device
    else:
        torch.manual_seed(seed)


def _rows(model: FlatModel, weights: Float[Tensor, "weight"], count: int) -> list[Float[Tensor, "weight"]]:
    """`count` copies of the weights: a single copy is `model.flat`; several copies have aligned places in memory."""
    if count == 1:
        model.load(weights)
        return [model.flat]
    length = -(-model.num_weights // ALIGNMENT) * ALIGNMENT
    rows = weights.new_empty(count, length)[:, : model.num_weights]
    return list(rows.copy_(weights).unbind())


def _batches(
    examples: Examples | StoredExamples, config: dict[str, Number], rng: np.random.Generator
) -> Iterator[Examples]:
    for _ in range(int(config["epochs"])):  # 1
        order = torch.from_numpy(rng.permutation(examples.num_examples))
        for rows in torch.split(order, int(config["batch_size"])):  # 2, 3
            yield examples.take(rows)  # one batch at a time, which a core's cache holds


def _alike(turns: list[Turn]) -> Iterator[list[Turn]]:
    """Groups of turns; the clients of a group step together. All its batches are filled up to the size of the largest.

    A group holds small batches of similar sizes; a large batch is a group of its own.
    """
    turns = sorted(turns, key=lambda turn: -turn.batch.num_examples)
    while turns:
        largest = turns[0].batch.num_examples
        fit = [turn for turn in turns if MOST_FILLED * turn.batch.num_examples >= largest]
        together = fit if largest <= LARGEST_TOGETHER else turns[:1]
        yield together
        turns = turns[len(together) :]


def _backprop(model: FlatModel, autocasts: bool) -> Backprop:
    """The model's backpropagation, made once. Under autocast it is autograd's, since autocast acts on nothing else."""
    known = _BACKPROPS.setdefault(model, {})
    if autocasts not in known:
        known[autocasts] = Backprop(model, written_out=not autocasts)
    return known[autocasts]


_BACKPROPS: weakref.WeakKeyDictionary[FlatModel, dict[bool, Backprop]] = weakref.WeakKeyDictionary()
