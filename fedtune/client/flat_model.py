"""A torch module whose weights are views of one flat float32 tensor."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from fedtune.client.compiled_model import CompiledModel
from fedtune.client.objectives import OBJECTIVES
from fedtune.errors import InputError

# Examples. In larger batches small models gain little, and large models lose as their activations outgrow the cache.
EVALUATION_BATCH = 128


class FlatModel:
    """A torch module whose floating-point parameters and buffers are views of one flat float32 tensor.

    The views are in the order of the module's state_dict; a tensor that has several names has one view. Integer buffers
    are not in the flat tensor: they get their first values back whenever weights are loaded.

    `module` is the torch module, `flat` the tensor of its `num_weights` numbers, and `parameters` are the parameters
    that can be trained. `loss(outputs, y)` is the objective's mean loss, on which the model is trained, and
    `measure(outputs, y)` gives a loss and an error for each example. `compiled` is the model's compiled form, if the
    run uses one.
    """

    compiled: CompiledModel | None = None

    def __init__(
        self, module: nn.Module, device: str | torch.device = "cpu", objective: str = "classification"
    ) -> None:
        if any(map(is_lazy, module.state_dict(keep_vars=True).values())):
            raise InputError("a model must know the size of every layer when it is made, got one with lazy layers")
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
        if weights.data_ptr() != self.flat.data_ptr():
            self.flat.copy_(weights)
        for buffer, first in self._integers.values():
            buffer.copy_(first)

    def outputs(
        self, weights: Float[Tensor, "weight"], x: Shaped[Tensor, "example ..."], parameters: Sequence[Tensor] = ()
    ) -> Tensor:
        """The module's outputs with these weights in place of its own: a function that torch.func can transform.

        `parameters`, if given, take the place of the parameters that can be trained. Raises InputError if the module
        returns no tensor.
        """
        outputs = functional_call(self.module, self.named(weights, parameters), (x,), tie_weights=False)
        if not isinstance(outputs, Tensor):
            raise InputError(f"it must return a tensor, got {type(outputs).__name__}")
        return outputs

    def slices(self, weights: Float[Tensor, "*client weight"]) -> list[Tensor]:
        """Views of the weights in the shapes of `parameters`, and in their order.

        If `weights` has a row for each of several clients, the first axis of each view is the client.
        """
        views = self._views(weights)
        return [views[index] for index in self._trainable]

    def named(self, weights: Float[Tensor, "*client weight"], parameters: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """Views of the weights by name. `parameters`, if given, take the place of those that can be trained.

        If `weights` has a row for each of several clients, the first axis of each view is the client.
        """
        views = self._views(weights)
        for index, parameter in zip(self._trainable, parameters, strict=False):
            views[index] = parameter
        return {name: views[index] for name, index in self._names.items()}

    def state_dict(self, weights: Float[Tensor, "weight"]) -> dict[str, Tensor]:
        """Views of the weights by name: `load_state_dict` of a module of the same kind accepts this dictionary."""
        return self.named(weights) | {name: first for name, (_, first) in self._integers.items()}

    def _views(self, weights: Tensor) -> list[Tensor]:
        parts = torch.split(weights, self._sizes, dim=-1)
        return [part.view(*weights.shape[:-1], *shape) for part, shape in zip(parts, self._shapes, strict=True)]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own tensors by name, not copies: the parameters and the persistent buffers."""
    state = module.state_dict(keep_vars=True)  # not detached: tied weights are found because they are one object
    return ((name, value) for name, value in state.items() if isinstance(value, Tensor))
