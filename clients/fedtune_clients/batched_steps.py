"""The steps of SGD that many clients take together: one tensor program for all of them.

Every tensor has the client as its first axis. A step is large operations over the stacked weights if the model's layers
have a stacked form (`fedtune.client.stacked`); otherwise it is one client's step under `torch.func.vmap`. On a GPU the
steps of stacked layers are recorded as CUDA graphs.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.func import grad, vmap

from fedtune.client import FlatModel, Number
from fedtune.client.stacked import is_stackable, stacked_outputs
from fedtune.data.spec import IGNORED
from fedtune_clients.cuda_graphs import Recorder, capture_on

ALIGNMENT = 16  # floats in 64 bytes; products are fastest if each client's weights begin at such a place


class Rates(NamedTuple):
    """The factors of local SGD, one number for each client; None if the factor is 0 for all clients."""

    learning_rate: Float[Tensor, "client"]
    momentum: Float[Tensor, "client"] | None
    decay: Float[Tensor, "client"] | None  # of the weights: weight_decay + proximal_mu
    mu: Float[Tensor, "client"] | None


class Steps:
    """Steps of up to `capacity` clients. `weights` has a row for each; `begin` fills it and `take` changes it.

    The tensors that a step changes stay in their place, because a CUDA graph knows them by their addresses.
    """

    def __init__(self, model: FlatModel, capacity: int) -> None:
        self.capacity = capacity
        self._model: FlatModel = weakref.proxy(model)  # a model that keeps its steps must be able to go
        self._is_stacked = is_stackable(model)
        self._recorder = Recorder(capture_on(model.flat.device) if self._is_stacked else None)
        self.weights = self._rows()  # (client, weight)
        self._sent = torch.empty_like(model.flat)
        self._velocities: Tensor | None = None  # (client, weight), made when a client first has momentum
        self._factors = model.flat.new_empty(len(Rates._fields), capacity)

    @property
    def stay(self) -> bool:
        """True if these steps should be used for the next clients too, so that what they recorded is not lost."""
        return self._recorder.records

    def begin(self, sent: Float[Tensor, "weight"], configs: Sequence[dict[str, Number]]) -> None:
        """Lets a client of each of these configurations start from the weights `sent`."""
        self._sent.copy_(sent)
        self.weights[: len(configs)] = sent
        columns = [
            [config["learning_rate"] for config in configs],
            [config["momentum"] for config in configs],
            # proximal_mu (w - w0) = proximal_mu w - proximal_mu w0
            [config["weight_decay"] + config["proximal_mu"] for config in configs],
            [config["proximal_mu"] for config in configs],
        ]
        self._factors[:, : len(configs)] = torch.tensor(columns, dtype=torch.float32, device=sent.device)
        learning_rate, *others = zip(self._factors, columns, strict=True)
        self._rates = Rates(learning_rate[0], *(factor if any(column) else None for factor, column in others))
        if self._rates.momentum is not None:
            if self._velocities is None:
                self._velocities = self._rows()
            self._velocities.zero_()

    def take(
        self,
        x: Shaped[Tensor, "client example ..."],
        y: Shaped[Tensor, "client example ..."],
        counts: Bool[Tensor, "client example"],
        masks: Sequence[Float[Tensor, "client example ..."]],
    ) -> None:
        """One step of the first `len(x)` clients on their batches.

        `counts` says which examples count; the others fill up a client's batch. `masks` are the factors of the dropout
        layers, in the order in which the layers are called; there may be none.
        """
        inputs = [x, y, counts, *masks]
        has_term = [factor is not None for factor in self._rates]
        key = (*has_term, torch.is_autocast_enabled(x.device.type), *(tensor.shape for tensor in inputs))
        self._recorder.call(key, self._step, inputs)

    def _step(self, x: Tensor, y: Tensor, counts: Tensor, *masks: Tensor) -> None:
        weights = self.weights[: len(x)]
        parameters = self._model.slices(weights)
        gradients_of = self._stacked_gradients if self._is_stacked else self._vmapped_gradients
        gradients = gradients_of(parameters, weights, x, y, counts, list(masks))
        velocities = [] if self._velocities is None else self._model.slices(self._velocities[: len(x)])
        with torch.no_grad():
            sgd_step(parameters, gradients, velocities, self._model.slices(self._sent), self._rates)

    def _stacked_gradients(
        self, parameters: list[Tensor], weights: Tensor, x: Tensor, y: Tensor, counts: Tensor, masks: list[Tensor]
    ) -> Sequence[Tensor]:
        parameters = [parameter.detach().requires_grad_() for parameter in parameters]
        with dropout_masks(self._model.module, [mask.flatten(0, 1) for mask in masks]):
            outputs = stacked_outputs(self._model, weights, x, parameters)
        losses = vmap(self._loss)(outputs, y, counts)
        # A client's weights change no other client's loss.
        return torch.autograd.grad(losses.sum(), parameters, materialize_grads=True)

    def _vmapped_gradients(
        self, parameters: list[Tensor], weights: Tensor, x: Tensor, y: Tensor, counts: Tensor, masks: list[Tensor]
    ) -> Sequence[Tensor]:
        def loss(
            parameters: list[Tensor], weights: Tensor, x: Tensor, y: Tensor, counts: Tensor, masks: list[Tensor]
        ) -> Tensor:
            with dropout_masks(self._model.module, masks):
                return self._loss(self._model.outputs(weights, x, parameters), y, counts)

        with torch.no_grad():
            gradients: Sequence[Tensor] = vmap(grad(loss))(parameters, weights, x, y, counts, masks)
        return gradients

    def _loss(self, outputs: Tensor, y: Tensor, counts: Bool[Tensor, "example"]) -> Float[Tensor, ""]:
        """One client's mean loss over the examples that count."""
        if not y.is_floating_point():
            return self._model.loss(outputs, torch.where(_per_row(counts, y), y, IGNORED))
        # Real targets have no label like IGNORED. So the error of a filled-up example is set to 0, and the mean is
        # divided by the share of examples that count.
        outputs, y = (torch.where(_per_row(counts, tensor), tensor, 0.0) for tensor in (outputs, y))
        return self._model.loss(outputs, y) / counts.float().mean()

    def _rows(self) -> Float[Tensor, "client weight"]:
        length = math.ceil(self._model.num_weights / ALIGNMENT) * ALIGNMENT
        return self._model.flat.new_empty(self.capacity, length)[:, : self._model.num_weights]


def sgd_step(
    parameters: list[Tensor], gradients: Sequence[Tensor], velocities: list[Tensor], sent: list[Tensor], rates: Rates
) -> None:
    """One step of SGD in place, each client with its own rates. `SGDStep` gives the formula."""
    learning_rate, momentum, decay, mu = rates
    for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        # Not in place: two parameters may share one gradient.
        if decay is not None:
            gradient = torch.addcmul(gradient, parameter, _per_row(decay, parameter))
        if mu is not None:
            gradient = torch.addcmul(gradient, sent[number], _per_row(mu, parameter), value=-1)
        if momentum is not None:
            gradient = velocities[number].mul_(_per_row(momentum, parameter)).add_(gradient)
        parameter.addcmul_(gradient, _per_row(learning_rate, parameter), value=-1)


def _per_row(column: Tensor, tensor: Tensor) -> Tensor:
    """The first `len(tensor)` entries of the column, shaped to broadcast: one entry for each row of the tensor."""
    return column[: len(tensor)].view(-1, *[1] * (tensor.ndim - 1))


@contextmanager
def dropout_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the `with` block the module's dropout layers call `forward`."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Dropout)]
    for layer in layers:
        layer.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def dropout_masks(module: nn.Module, masks: list[Tensor]) -> AbstractContextManager[None]:
    """Inside the `with` block the dropout layers multiply by the masks, in their order; with none they do nothing."""
    remaining = iter(masks)
    return dropout_as(module, lambda inputs: inputs * next(remaining) if masks else inputs)
