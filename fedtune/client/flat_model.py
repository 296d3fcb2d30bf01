"""A torch module over one flat float32 tensor, its examples as tensors, and its error on them."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from fedtune.client.objectives import OBJECTIVES
from fedtune.errors import InputError

EVALUATION_BATCH = 128  # small models gain little beyond it, and large ones lose as their activations outgrow the cache


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


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own tensors by name: parameters and persistent buffers, no copies."""
    state = module.state_dict(keep_vars=True)  # detached copies have no identity by which to find tied weights
    return ((name, value) for name, value in state.items() if isinstance(value, Tensor))
