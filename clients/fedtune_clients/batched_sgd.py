"""Local SGD of many clients in one tensor program. It is for devices that one client's small steps leave mostly idle.

It is `fedtune_clients.local_sgd.client_update` for many clients, with the same numbered lines. From the same generators
it draws the same batches and the same dropout. The weights are the same to rounding. On a GPU the dropout draws differ,
with the same distribution: torch has another kernel there for the dropout of a single client.

Every tensor has the client as its first axis. Clients with the same batch size train together. The clients with the
most steps come first, so that the clients that are still training are the first rows. A batch that is smaller than the
others of its step is filled up with examples that do not count.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import grad, vmap

from fedtune.client import Config, Examples, FlatModel, Number
from fedtune.data.spec import IGNORED
from fedtune.errors import InputError
from fedtune_clients.hyperparameters import complete


class LocalTraining(NamedTuple):
    """The local training of one client. A batch holds indices into the examples of all clients; each step has one."""

    row: int  # of the result
    config: dict[str, Number]
    dropout_seed: int
    batches: list[Int[np.ndarray, "example"]]


class Rates(NamedTuple):
    """The factors of local SGD, one number for each client; None if the factor is 0 for all clients."""

    learning_rate: Float[Tensor, "client"]
    momentum: Float[Tensor, "client"] | None
    decay: Float[Tensor, "client"] | None  # of the weights: weight_decay + proximal_mu
    mu: Float[Tensor, "client"] | None


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
    trained = sent.repeat(len(trainings), 1)  # (client, weight)
    has_dropout = any(training.config["dropout"] > 0 for training in trainings)
    shapes = _dropout_shapes(model, examples) if has_dropout else []
    # A bucket holds the clients with one batch size; the clients with the most steps come first.
    for batch_size in sorted({training.config["batch_size"] for training in trainings}):
        bucket = [training for training in trainings if training.config["batch_size"] == batch_size]
        bucket.sort(key=lambda training: -len(training.batches))
        rows = torch.tensor([training.row for training in bucket], device=sent.device)
        trained[rows] = _train_bucket(model, sent, examples, bucket, shapes)
    return trained  # 5


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
    model: FlatModel,
    sent: Float[Tensor, "weight"],
    examples: Examples,
    bucket: list[LocalTraining],
    shapes: list[torch.Size],
) -> Float[Tensor, "client weight"]:
    """The trained weights of clients that have one batch size. The clients with the most steps come first."""
    device = sent.device
    weights = sent.repeat(len(bucket), 1)  # (client, weight)
    rates = _rates_of(bucket, device)
    velocities = [torch.zeros_like(p) for p in model.slices(weights)] if rates.momentum is not None else []
    generators = [torch.Generator(device).manual_seed(training.dropout_seed) for training in bucket]
    gradients_of = vmap(grad(_loss_of(model)))
    index, counts = (array.to(device) for array in _schedule(bucket))
    for step in range(len(index)):  # 3
        # Only the first rows still train.
        active = [training for training in bucket if len(training.batches) > step]
        now = slice(len(active))
        x, y = (tensor[index[step, now]] for tensor in examples)  # (client, example, ...)
        masks = _masks(shapes, active, generators, step, index.shape[2])
        with torch.no_grad():
            parameters = model.slices(weights[now])  # (client, *parameter)
            gradients = gradients_of(parameters, weights[now], x, y, counts[step, now], masks)
            _sgd_step(parameters, gradients, [v[now] for v in velocities], model.slices(sent), rates)  # 4
    return weights


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


def _loss_of(model: FlatModel) -> Callable[..., Float[Tensor, ""]]:
    """One client's loss on a batch, as a function whose first argument is the trainable parameters."""

    def loss(
        parameters: list[Tensor], weights: Tensor, x: Tensor, y: Tensor, counts: Tensor, masks: list[Tensor]
    ) -> Tensor:
        remaining = iter(masks)
        with _dropout_as(model.module, lambda inputs: inputs * next(remaining) if masks else inputs):
            outputs = model.outputs(weights, x, parameters)
        if not y.is_floating_point():
            return model.loss(outputs, torch.where(_per_client(counts, y), y, IGNORED))
        # Real targets have no label like IGNORED. So the error of a filled-up example is set to 0, and the mean is
        # divided by the share of examples that count.
        outputs, y = (torch.where(_per_client(counts, tensor), tensor, 0.0) for tensor in (outputs, y))
        return model.loss(outputs, y) / counts.float().mean()

    return loss


def _rates_of(bucket: list[LocalTraining], device: torch.device) -> Rates:
    def column(*names: str) -> Tensor:
        values = [sum(training.config[name] for name in names) for training in bucket]
        return torch.tensor(values, dtype=torch.float32, device=device)

    # proximal_mu (w - w0) = proximal_mu w - proximal_mu w0
    columns = column("momentum"), column("weight_decay", "proximal_mu"), column("proximal_mu")
    momentum, decay, mu = (factor if factor.any() else None for factor in columns)
    return Rates(column("learning_rate"), momentum, decay, mu)


def _sgd_step(
    parameters: list[Tensor], gradients: Sequence[Tensor], velocities: list[Tensor], sent: list[Tensor], rates: Rates
) -> None:
    """One step of SGD in place, each client with its own rates. `SGDStep` gives the formula."""
    learning_rate, momentum, decay, mu = rates
    for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        # Not in place: two parameters may share one gradient.
        if decay is not None:
            gradient = torch.addcmul(gradient, parameter, _per_client(decay, parameter))
        if mu is not None:
            gradient = torch.addcmul(gradient, sent[number], _per_client(mu, parameter), value=-1)
        if momentum is not None:
            gradient = velocities[number].mul_(_per_client(momentum, parameter)).add_(gradient)
        parameter.addcmul_(gradient, _per_client(learning_rate, parameter), value=-1)


def _per_client(column: Tensor, tensor: Tensor) -> Tensor:
    """The first `len(tensor)` entries of the column, shaped to broadcast: one entry for each row of the tensor."""
    return column[: len(tensor)].view(-1, *[1] * (tensor.ndim - 1))


@contextmanager
def _dropout_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the `with` block the module's dropout layers call `forward`."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Dropout)]
    for layer in layers:
        layer.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _dropout_shapes(model: FlatModel, examples: Examples) -> list[torch.Size]:
    """The shape of each dropout layer's input for one example, in the order in which the layers are called."""
    shapes: list[torch.Size] = []

    def note(inputs: Tensor) -> Tensor:
        if len(inputs) != len(two):
            raise InputError(f"a dropout layer must have the example as its first axis, got shape {(*inputs.shape,)}")
        shapes.append(inputs.shape[1:])
        return inputs

    two = examples.x[:1].repeat_interleave(2, 0)
    with torch.no_grad(), _dropout_as(model.module, note):
        model.outputs(model.flat, two)
    return shapes


def _masks(
    shapes: list[torch.Size], active: list[LocalTraining], generators: list[torch.Generator], step: int, width: int
) -> list[Float[Tensor, "client example ..."]]:
    """The factors of each dropout layer: for each client the random numbers that `nn.Dropout` would draw."""
    masks = [torch.ones(len(active), width, *shape, device=generators[0].device) for shape in shapes]
    for mask in masks:
        for row, training, generator in zip(mask, active, generators, strict=False):
            if (dropout := training.config["dropout"]) > 0:
                row[: len(training.batches[step])].bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
    return masks
