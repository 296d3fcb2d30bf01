"""Local SGD of many clients in one tensor program. It is for devices that one client's small steps leave mostly idle.

It is `fedtune_clients.local_sgd.client_update` for many clients, with the same numbered lines. From the same generators
it draws the same batches and the same dropout. The weights are the same to rounding. On a GPU the dropout draws differ,
with the same distribution: torch has another kernel there for the dropout of a single client.

Every tensor has the client as its first axis. Clients with the same batch size train together. The clients with the
most steps come first, so that the clients that are still training are the first rows. A batch that is smaller than the
others of its step is filled up with examples that do not count.
"""

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedtune.client import Config, Examples, FlatModel, Number
from fedtune.errors import InputError
from fedtune_clients.batched_steps import Steps, dropout_as
from fedtune_clients.hyperparameters import complete


class LocalTraining(NamedTuple):
    """The local training of one client. A batch holds indices into the examples of all clients; each step has one."""

    row: int  # of the result
    config: dict[str, Number]
    dropout_seed: int
    batches: list[Int[np.ndarray, "example"]]


class DropoutInput(NamedTuple):
    """The input of a dropout layer: the shape of one example, and the axes from the outermost one in memory."""

    shape: torch.Size
    axes: list[int]  # 0 is the axis of the examples


def train_batched(
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    examples: Examples,
    sizes: Sequence[int],
    configs: Sequence[Config],
    rngs: Sequence[np.random.Generator],
) -> Float[Tensor, "client weight"]:
    """The weights of each client after local SGD from `weights` on its examples, equal to `train` up to rounding.

    `examples` holds the examples of all clients, client after client; `sizes` says how many examples each client has.
    """
    trainings = _trainings(sizes, configs, rngs)
    model.load(weights)
    model.module.train()
    sent = model.flat.clone()
    trained = sent.new_empty(len(trainings), model.num_weights)
    has_dropout = any(training.config["dropout"] > 0 for training in trainings)
    layers = _dropout_inputs(model, examples) if has_dropout else []
    # A bucket holds the clients with one batch size; the clients with the most steps come first.
    trainings.sort(key=lambda training: (training.config["batch_size"], -len(training.batches)))
    buckets = itertools.groupby(trainings, key=lambda training: training.config["batch_size"])
    with _steps(model, len(trainings)) as steps:
        for bucket in (list(alike) for _, alike in buckets):
            rows = torch.tensor([training.row for training in bucket], device=sent.device)
            trained[rows] = _train_bucket(steps, sent, examples, bucket, layers)
    return trained  # 5


@contextmanager
def _steps(model: FlatModel, num_clients: int) -> Iterator[Steps]:
    """The steps of that many clients. On a GPU the model keeps them, with what they recorded."""
    steps = _STEPS.pop(model, None)
    if steps is None or steps.capacity < num_clients:
        steps = Steps(model, num_clients)
    yield steps
    # After an error they are lost, so that fewer clients find the memory that these took.
    if steps.stay:
        _STEPS[model] = steps


_STEPS: weakref.WeakKeyDictionary[FlatModel, Steps] = weakref.WeakKeyDictionary()


def _trainings(
    sizes: Sequence[int], configs: Sequence[Config], rngs: Sequence[np.random.Generator]
) -> list[LocalTraining]:
    trainings = []
    starts = np.cumsum([0, *sizes])
    for row, (size, given, rng) in enumerate(zip(sizes, configs, rngs, strict=True)):
        config = complete(given)
        seed = int(rng.integers(2**63))
        orders = [starts[row] + rng.permutation(size) for _ in range(int(config["epochs"]))]  # 1
        stops = range(int(config["batch_size"]), size, int(config["batch_size"]))
        batches = [batch for order in orders for batch in np.split(order, stops)]  # 2
        trainings.append(LocalTraining(row, config, seed, batches))
    return trainings


def _train_bucket(
    steps: Steps,
    sent: Float[Tensor, "weight"],
    examples: Examples,
    bucket: list[LocalTraining],
    layers: list[DropoutInput],
) -> Float[Tensor, "client weight"]:
    """The trained weights of clients that have one batch size, until the next bucket is trained.

    The clients with the most steps come first.
    """
    device = sent.device
    steps.begin(sent, [training.config for training in bucket])
    generators = [torch.Generator(device).manual_seed(training.dropout_seed) for training in bucket] if layers else []
    index, counts = (array.to(device) for array in _schedule(bucket))
    for step in range(len(index)):  # 3
        # Only the first rows still train.
        active = [training for training in bucket if len(training.batches) > step]
        now = slice(len(active))
        x, y = (tensor[index[step, now]] for tensor in examples)  # (client, example, ...)
        masks = _masks(layers, active, generators, step, index.shape[2])
        steps.take(x, y, counts[step, now], masks)  # 4
    return steps.weights[: len(bucket)]


def _schedule(
    bucket: list[LocalTraining],
) -> tuple[Int[Tensor, "step client example"], Bool[Tensor, "step client example"]]:
    """The indices of the examples in each batch, filled up to one length, and which of them count."""
    longest = max(len(training.batches[0]) for training in bucket)
    index = np.zeros((len(bucket[0].batches), len(bucket), longest), np.int64)
    counts = np.zeros(index.shape, np.bool_)
    for place, training in enumerate(bucket):
        for step, batch in enumerate(training.batches):
            # Fill up with an example of the same client. If all its examples are finite, this one is finite too.
            index[step, place] = batch[0]
            index[step, place, : len(batch)] = batch
            counts[step, place, : len(batch)] = True
    return torch.from_numpy(index), torch.from_numpy(counts)


def _dropout_inputs(model: FlatModel, examples: Examples) -> list[DropoutInput]:
    """The input of each dropout layer, in the order in which the layers are called."""
    noted: list[DropoutInput] = []

    def note(inputs: Tensor) -> Tensor:
        if len(inputs) != len(two):
            raise InputError(f"a dropout layer must have the example as its first axis, got shape {(*inputs.shape,)}")
        outermost_first = sorted(range(inputs.ndim), key=inputs.stride, reverse=True)
        noted.append(DropoutInput(inputs.shape[1:], outermost_first))
        return inputs

    two = examples.x[:1].repeat_interleave(2, 0)
    with torch.no_grad(), dropout_as(model.module, note):
        model.outputs(model.flat, two)
    return noted


def _masks(
    layers: list[DropoutInput], active: list[LocalTraining], generators: list[torch.Generator], step: int, width: int
) -> list[Float[Tensor, "client example ..."]]:
    """The factors of each dropout layer: for each client the random numbers that `nn.Dropout` would draw.

    `nn.Dropout` draws them in the order in which its input lies in memory.
    """
    masks = []
    for shape, axes in layers:
        layout = [0, *(axis + 1 for axis in axes)]
        mask = torch.empty_permuted((len(active), width, *shape), layout, device=generators[0].device).fill_(1.0)
        for row, training, generator in zip(mask, active, generators, strict=False):
            if (dropout := training.config["dropout"]) > 0:
                row[: len(training.batches[step])].bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
        masks.append(mask)
    return masks
