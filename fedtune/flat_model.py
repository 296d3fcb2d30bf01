"""A torch module over one flat float32 tensor, its examples as tensors, and its error on them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from fedtune.data.federated_dataset import DatasetSpec
from fedtune.errors import InputError
from fedtune.objectives import OBJECTIVES

EVALUATION_BATCH = 128  # small models gain little beyond it, and large ones lose as their activations outgrow the cache


class Examples(NamedTuple):
    """Examples as a model gets them, on its device."""

    x: Shaped[Tensor, "example ..."]  # float32 or int64
    y: Shaped[Tensor, "example ..."]  # int64; float32 for regression

    @property
    def num_examples(self) -> int:
        """How many there are."""
        return self.y.size(0)

    def take(self, rows: Int64[Tensor, "row"]) -> "Examples":
        """Those of these numbers, in this order: a copy."""
        rows = rows.to(self.y.device)
        return Examples(self.x.index_select(0, rows), self.y.index_select(0, rows))


class StoredExamples:
    """Examples as they are stored. What is taken of them is as a model gets it: float32 times `spec.scale`, or int64.

    So a client that needs one batch at a time need not have all of them in that form.
    """

    def __init__(
        self,
        x: Shaped[np.ndarray, "example ..."],
        y: Shaped[np.ndarray, "example ..."],
        spec: DatasetSpec,
        device: str | torch.device,
    ) -> None:
        """May share memory with the arrays."""
        # from_numpy warns of read-only arrays; a copy of the stored bytes is cheap beside the cast.
        stored = (torch.from_numpy(each) if each.flags.writeable else torch.tensor(each) for each in (x, y))
        self._stored = Examples(*(tensor.to(device) for tensor in stored))
        self._spec = spec

    @property
    def num_examples(self) -> int:
        """How many there are."""
        return self._stored.num_examples

    def take(self, rows: Int64[Tensor, "row"]) -> Examples:
        """Those of these numbers, in this order: a copy."""
        taken = self._stored.take(rows)
        return Examples(_inputs(taken.x, self._spec), taken.y)

    def all(self) -> Examples:
        """All of them: a copy."""
        return Examples(_inputs(self._stored.x, self._spec), self._stored.y.clone())


class FlatModel:
    """A torch module whose floating-point parameters and buffers are views of one flat float32 tensor.

    They lie in it in the order of the module's state_dict; a tensor that has several names lies there once. Integer
    buffers are no part of it: they get their first values back whenever weights are loaded.

    `parameters` are the trainable ones, `flat` holds `num_weights` numbers. `loss(outputs, y)` is the objective's mean
    loss, which is trained on.
    """

    def __init__(
        self, module: nn.Module, device: str | torch.device = "cpu", objective: str = "classification"
    ) -> None:
        self.loss, self.measure = OBJECTIVES[objective]
        self.module = module.to(device).float()
        tensors = dict(_tensors(self.module))
        unique = list({id(tensor): tensor for tensor in tensors.values() if tensor.is_floating_point()}.values())
        self.parameters = [tensor for tensor in unique if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
        if not self.parameters:
            raise InputError("a model must have at least one trainable parameter, got none")
        self.flat = torch.cat([tensor.detach().reshape(-1) for tensor in unique])
        self.num_weights = len(self.flat)
        self._sizes = [tensor.numel() for tensor in unique]
        self._shapes = [tensor.shape for tensor in unique]
        for tensor, view in zip(unique, self._views(self.flat), strict=True):
            tensor.data = view
        position = {id(tensor): index for index, tensor in enumerate(unique)}
        self._trainable = [position[id(parameter)] for parameter in self.parameters]
        self._names = {name: position[id(tensor)] for name, tensor in tensors.items() if id(tensor) in position}
        self._integers = {name: (t, t.clone()) for name, t in tensors.items() if id(t) not in position}

    def load(self, weights: Float[Tensor, "weight"]) -> None:
        """Copies the weights into the module."""
        self.flat.copy_(weights)
        for buffer, first in self._integers.values():
            buffer.copy_(first)

    def outputs(
        self, weights: Float[Tensor, "weight"], x: Shaped[Tensor, "example ..."], parameters: Sequence[Tensor] = ()
    ) -> Tensor:
        """The module's outputs with these weights instead of its own: a function that torch.func can transform.

        `parameters`, if given, take the place of the trainable ones.
        """
        views = self._views(weights)
        for index, parameter in zip(self._trainable, parameters, strict=False):
            views[index] = parameter
        named = {name: views[index] for name, index in self._names.items()}
        outputs: Tensor = functional_call(self.module, named, (x,), tie_weights=False)
        return outputs

    def slices(self, weights: Float[Tensor, "*client weight"]) -> list[Tensor]:
        """Views of the weights in the shapes of the trainable parameters, in the order of `parameters`.

        Of several clients' weights, a row each, each view has the client as its first axis.
        """
        views = self._views(weights)
        return [views[index] for index in self._trainable]

    def state_dict(self, weights: Float[Tensor, "weight"]) -> dict[str, Tensor]:
        """Those weights by name, as views; a module like this one can load them."""
        views = self._views(weights)
        integers = {name: first for name, (_, first) in self._integers.items()}
        return {name: views[index] for name, index in self._names.items()} | integers

    def _views(self, weights: Tensor) -> list[Tensor]:
        parts = torch.split(weights, self._sizes, dim=-1)
        return [part.view(*weights.shape[:-1], *shape) for part, shape in zip(parts, self._shapes, strict=True)]


def _inputs(stored: Shaped[Tensor, "example ..."], spec: DatasetSpec) -> Shaped[Tensor, "example ..."]:
    """A copy as the model gets them."""
    if spec.input_kind == "token":
        return stored.to(torch.int64, copy=True)
    return stored.to(torch.float32, copy=True).mul_(spec.scale)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own tensors by name: parameters and persistent buffers, no copies."""
    state = module.state_dict(keep_vars=True)  # detached copies have no identity by which to find tied weights
    return ((name, value) for name, value in state.items() if isinstance(value, Tensor))
