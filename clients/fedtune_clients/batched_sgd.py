"""Local SGD of many clients in one tensor program, for devices on which one small step at a time leaves most idle.

The many-clients twin of `fedtune_clients.local_sgd.train`, whose source and numbered lines it has: from the same
generators come the same batches, the same dropout (on a GPU, where torch has another kernel for a lone client's
dropout, different draws of the same law) and, to rounding, the same weights.

Every tensor has the client as its first axis. Clients of one batch size go together, those with the most steps first,
so that the ones still training are the first rows. A batch that is smaller than the others of its step is filled up
with examples that do not count.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import grad, vmap

from fedtune.client.examples import Examples
from fedtune.client.flat_model import FlatModel
from fedtune.data.spec import IGNORED
from fedtune.errors import InputError
from fedtune.tuning.space import Config, Number
from fedtune_clients.local_sgd import complete


class Client(NamedTuple):
    """What one client does: its batches, each the indices of its examples among all clients'."""

    row: int
    config: dict[str, Number]
    dropout_seed: int
    batches: list[Int[np.ndarray, "example"]]


class Rates(NamedTuple):
    """What local SGD multiplies with, a number a client; None where it is 0 for all."""

    learning_rate: Float[Tensor, "client"]
    momentum: Float[Tensor, "client"] | None
    decay: Float[Tensor, "client"] | None  # of the weights: weight_decay + proximal_mu
    mu: Float[Tensor, "client"] | None


def train(
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    examples: Examples,
    sizes: Sequence[int],
    configs: Sequence[Config],
    rngs: Sequence[np.random.Generator],
) -> Float[Tensor, "client weight"]:
    """The weights of each client after local SGD from `weights` on its part of the examples.

    `examples` holds those of the first client, then those of the second, and so on; `sizes` says how many each has.
    """
    clients = _clients(sizes, configs, rngs)
    model.load(weights)
    model.module.train()
    sent = model.flat.clone()
    trained = sent.repeat(len(clients), 1)
    shapes = _dropout_shapes(model, examples) if any(client.config["dropout"] > 0 for client in clients) else []
    for batch_size in sorted({client.config["batch_size"] for client in clients}):
        members = [client for client in clients if client.config["batch_size"] == batch_size]
        members.sort(key=lambda client: -len(client.batches))
        rows = torch.tensor([client.row for client in members], device=sent.device)
        trained[rows] = _train_bucket(model, sent, examples, members, shapes)
    return trained  # 5


def _clients(sizes: Sequence[int], configs: Sequence[Config], rngs: Sequence[np.random.Generator]) -> list[Client]:
    clients = []
    starts = np.cumsum([0, *sizes])
    for row, (size, given, rng) in enumerate(zip(sizes, configs, rngs, strict=True)):
        config = complete(given)
        seed = int(rng.integers(2**63))
        orders = [starts[row] + rng.permutation(size) for _ in range(int(config["epochs"]))]  # 1
        stops = range(int(config["batch_size"]), size, int(config["batch_size"]))
        batches = [batch for order in orders for batch in np.split(order, stops)]  # 2
        clients.append(Client(row, config, seed, batches))
    return clients


def _train_bucket(
    model: FlatModel,
    sent: Float[Tensor, "weight"],
    examples: Examples,
    clients: list[Client],
    shapes: list[torch.Size],
) -> Float[Tensor, "client weight"]:
    """The trained weights of clients of one batch size, of which those with the most steps come first."""
    device = sent.device
    weights = sent.repeat(len(clients), 1)
    rates = _rates_of(clients, device)
    velocities = [torch.zeros_like(p) for p in model.slices(weights)] if rates.momentum is not None else []
    generators = [torch.Generator(device).manual_seed(client.dropout_seed) for client in clients]
    gradients = vmap(grad(_loss_of(model)))
    index, counts = (array.to(device) for array in _schedule(clients))
    for step in range(len(index)):  # 3
        active = [client for client in clients if len(client.batches) > step]
        now = slice(len(active))
        x, y = (tensor[index[step, now]] for tensor in examples)
        masks = _masks(shapes, active, generators, step, index.shape[2])
        with torch.no_grad():
            parameters = model.slices(weights[now])
            slopes = gradients(parameters, weights[now], x, y, counts[step, now], masks)
            _sgd_step(parameters, slopes, [v[now] for v in velocities], model.slices(sent), rates)  # 4
    return weights


def _schedule(clients: list[Client]) -> tuple[Int[Tensor, "step client example"], Bool[Tensor, "step client example"]]:
    """The indices of the examples in each batch, filled up to one length, and which of them count."""
    index = np.zeros((len(clients[0].batches), len(clients), max(len(c.batches[0]) for c in clients)), np.int64)
    counts = np.zeros(index.shape, np.bool_)
    for place, client in enumerate(clients):
        for step, batch in enumerate(client.batches):
            index[step, place] = batch[0]  # an example of its own is as finite as the others
            index[step, place, : len(batch)] = batch
            counts[step, place, : len(batch)] = True
    return torch.from_numpy(index), torch.from_numpy(counts)


def _loss_of(model: FlatModel) -> Callable[..., Float[Tensor, ""]]:
    """One client's loss on a batch, as a function of its trainable parameters first."""

    def loss(
        parameters: list[Tensor], weights: Tensor, x: Tensor, y: Tensor, counts: Tensor, masks: list[Tensor]
    ) -> Tensor:
        remaining = iter(masks)
        with _dropout_as(model.module, lambda inputs: inputs * next(remaining) if masks else inputs):
            outputs = model.outputs(weights, x, parameters)
        if not y.is_floating_point():
            return model.loss(outputs, torch.where(_beside(counts, y), y, IGNORED))
        # Real targets have no label that does not count: there the error is made zero, and the mean put right.
        outputs, y = (torch.where(_beside(counts, tensor), tensor, 0.0) for tensor in (outputs, y))
        return model.loss(outputs, y) / counts.float().mean()

    return loss


def _rates_of(clients: list[Client], device: torch.device) -> Rates:
    def column(*names: str) -> Tensor:
        values = [sum(client.config[name] for name in names) for client in clients]
        return torch.tensor(values, dtype=torch.float32, device=device)

    # proximal_mu (w - w0) = proximal_mu w - proximal_mu w0
    columns = column("momentum"), column("weight_decay", "proximal_mu"), column("proximal_mu")
    momentum, decay, mu = (each if each.any() else None for each in columns)
    return Rates(column("learning_rate"), momentum, decay, mu)


def _sgd_step(
    parameters: list[Tensor], gradients: Sequence[Tensor], velocities: list[Tensor], sent: list[Tensor], rates: Rates
) -> None:
    """One step of SGD in place, each client with its own rates; see `fedtune_clients.descent`."""
    learning_rate, momentum, decay, mu = rates
    for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        # Not in place: two parameters may share one gradient.
        if decay is not None:
            gradient = torch.addcmul(gradient, parameter, _beside(decay, parameter))
        if mu is not None:
            gradient = torch.addcmul(gradient, sent[number], _beside(mu, parameter), value=-1)
        if momentum is not None:
            gradient = velocities[number].mul_(_beside(momentum, parameter)).add_(gradient)
        parameter.addcmul_(gradient, _beside(learning_rate, parameter), value=-1)


def _beside(column: Tensor, tensor: Tensor) -> Tensor:
    """The column, as far as the tensor's first axis goes, in a shape that broadcasts along it."""
    return column[: len(tensor)].view(-1, *[1] * (tensor.ndim - 1))


@contextmanager
def _dropout_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Lets `forward` do the work of the module's dropout layers."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Dropout)]
    for layer in layers:
        layer.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _dropout_shapes(model: FlatModel, examples: Examples) -> list[torch.Size]:
    """The shape of what each dropout layer is given for one example, in the order in which they are called."""
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
    shapes: list[torch.Size], clients: list[Client], generators: list[torch.Generator], step: int, width: int
) -> list[Float[Tensor, "client example ..."]]:
    """What each dropout layer multiplies its input with: for each client the draws that `nn.Dropout` would make."""
    masks = [torch.ones(len(clients), width, *shape, device=generators[0].device) for shape in shapes]
    for mask in masks:
        for row, client, generator in zip(mask, clients, generators, strict=False):
            if (dropout := client.config["dropout"]) > 0:
                row[: len(client.batches[step])].bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
    return masks
