"""Steps of SGD by backpropagation, written out for four kinds of layers (WRITTEN_OUT) and left to autograd for others.

The written-out form has none of autograd's overhead, which is most of a small layer's time. It also saves memory
traffic: the gradient of a linear layer's weight is a product of two matrices, and it is added to the weight while the
product is computed. Autograd would write the product to memory first.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from fedtune.client import Examples, FlatModel
from fedtune_clients.sgd_step import SGDStep


class Backprop:
    """A model as blocks that follow each other. A block's weights are stepped as soon as their gradients are known."""

    def __init__(self, model: FlatModel, *, written_out: bool = True) -> None:
        """If `written_out` is False, everything is left to autograd."""
        numbers = {parameter: number for number, parameter in enumerate(model.parameters)}
        self._loss = model.loss
        self._is_cross_entropy = written_out and model.loss is cross_entropy
        self._minus_one = torch.tensor(-1.0, device=model.flat.device)
        blocks = list(_blocks(model.module, numbers)) if written_out else [Block([model.module], numbers)]
        # A weight that two blocks use would be stepped between its two uses: such a model is one block.
        if len({number for block in blocks for number in block.numbers}) < sum(len(block.numbers) for block in blocks):
            blocks = [Block([model.module], numbers)]
        # Nothing before the first block with weights needs a gradient.
        first = next(place for place, block in enumerate(blocks) if block.numbers)
        for block in blocks[: first + 1]:
            block.needs_input_gradient = False
        self._blocks, self._trained = blocks, blocks[first:]

    def step(self, batch: Examples, sgd_step: SGDStep) -> None:
        """Steps the weights of `sgd_step`, which must be the model's own, on the batch."""
        outputs = batch.x
        for block in self._blocks:
            outputs = block.forward(outputs, sgd_step)
        gradient = self._loss_gradient(outputs, batch.y)
        for block in reversed(self._trained):
            gradient = block.backward(gradient, sgd_step)

    def _loss_gradient(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The gradient of the loss with respect to the outputs."""
        if not self._is_cross_entropy or outputs.ndim > 2:
            outputs = outputs.detach().requires_grad_()
            return torch.autograd.grad(self._loss(outputs, y), outputs)[0]
        # The softmax minus the one-hot labels, over the number of examples.
        index = y.unsqueeze(-1)
        return outputs.softmax(-1).scatter_add_(-1, index, self._minus_one.expand(index.shape)).div_(y.size(0))


class Block:
    """Layers that are left to autograd. It is also the base class of the layers that are written out.

    `forward` stores what `backward` needs.
    """

    needs_input_gradient = True

    def __init__(self, modules: Sequence[nn.Module], numbers: Mapping[nn.Parameter, int]) -> None:
        """`numbers` are the places of the model's trainable parameters in `SGDStep.weights`."""
        self.modules = modules
        parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
        self.parameters = [parameter for parameter in parameters if parameter in numbers]
        self.numbers = [numbers[parameter] for parameter in self.parameters]

    def forward(self, inputs: Tensor, sgd_step: SGDStep) -> Tensor:
        """The outputs in training mode."""
        self._source = x = inputs
        if self.needs_input_gradient:
            self._source = inputs.detach().requires_grad_()
            x = self._source.clone()  # a layer may work in place, which torch forbids on the tensor itself
        for module in self.modules:
            x = module(x)
        self._result = x
        return x.detach()

    def backward(self, gradient: Tensor, sgd_step: SGDStep) -> Tensor:
        """The gradient of the loss with respect to the inputs, if it is needed. Steps the weights.

        `gradient` is the gradient of the loss with respect to the outputs.
        """
        sources = [*self.parameters, self._source] if self.needs_input_gradient else self.parameters
        if self._result.requires_grad or not self.needs_input_gradient:
            gradients = torch.autograd.grad(self._result, sources, gradient, materialize_grads=True)
        else:  # a layer lets no gradient through
            gradients = tuple(map(torch.zeros_like, sources))
        for number, by_weight in zip(self.numbers, gradients, strict=False):
            sgd_step.along(number, by_weight)
        return gradients[-1]


class Linear(Block):
    """nn.Linear."""

    def forward(self, inputs: Tensor, sgd_step: SGDStep) -> Tensor:
        """The inputs times the transposed weight, plus the bias if there is one."""
        self._inputs = inputs
        return linear(inputs, *[sgd_step.weights[number] for number in self.numbers])

    def backward(self, gradient: Tensor, sgd_step: SGDStep) -> Tensor:
        """The gradient times the weight as it was in `forward`. Steps the weight and the bias."""
        weight, *bias = self.numbers
        by_inputs = gradient.matmul(sgd_step.weights[weight]) if self.needs_input_gradient else gradient
        columns = _matrix(gradient).t()  # (output, example)
        sgd_step.along_product(weight, columns, _matrix(self._inputs))
        for number in bias:
            sgd_step.along_product(number, columns, _ones(columns.size(1), columns.device))
        return by_inputs


class ReLU(Block):
    """nn.ReLU."""

    def forward(self, inputs: Tensor, sgd_step: SGDStep) -> Tensor:
        """max(inputs, 0)."""
        (module,) = self.modules
        self._outputs = torch.relu_(inputs) if module.inplace else torch.relu(inputs)
        return self._outputs

    def backward(self, gradient: Tensor, sgd_step: SGDStep) -> Tensor:
        """The gradient, with 0 at the places at which the output is 0."""
        by_inputs: Tensor = torch.ops.aten.threshold_backward(gradient, self._outputs, 0)
        return by_inputs


class Dropout(Block):
    """nn.Dropout, with the random numbers that it would draw."""

    def forward(self, inputs: Tensor, sgd_step: SGDStep) -> Tensor:
        """The inputs times random factors: 0 with the layer's dropout probability p, otherwise 1 / (1 - p)."""
        p = cast(nn.Dropout, self.modules[0]).p
        self._factors = torch.ones_like(inputs).bernoulli_(1 - p).div_(1 - p) if p > 0 else None
        return self._times_factors(inputs)

    def backward(self, gradient: Tensor, sgd_step: SGDStep) -> Tensor:
        """The gradient times the factors of `forward`."""
        return self._times_factors(gradient)

    def _times_factors(self, batch: Tensor) -> Tensor:
        return batch if self._factors is None else batch * self._factors


class Flatten(Block):
    """nn.Flatten of all axes after the first."""

    def forward(self, inputs: Tensor, sgd_step: SGDStep) -> Tensor:
        """The inputs, each example as one row of numbers."""
        self._shape = inputs.shape[1:]
        return inputs.flatten(1)

    def backward(self, gradient: Tensor, sgd_step: SGDStep) -> Tensor:
        """The gradient in the shape of the inputs."""
        return gradient.reshape(gradient.size(0), *self._shape)


WRITTEN_OUT: dict[type[nn.Module], type[Block]] = {
    nn.Linear: Linear,
    nn.ReLU: ReLU,
    nn.Dropout: Dropout,
    nn.Flatten: Flatten,
}


def _matrix(batch: Tensor) -> Float[Tensor, "row feature"]:
    return batch if batch.ndim == 2 else batch.flatten(0, -2)


@functools.lru_cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)


def _blocks(module: nn.Module, numbers: Mapping[nn.Parameter, int]) -> Iterator[Block]:
    """The layers of nested nn.Sequentials as blocks.

    A layer that is written out is a block of its own. Other layers that follow each other share one block.
    """
    between: list[nn.Module] = []
    for layer in _layers(module):
        if _is_written_out(layer) and all(parameter in numbers for parameter in layer.parameters()):
            if between:
                yield Block(between, numbers)
                between = []
            yield WRITTEN_OUT[type(layer)]([layer], numbers)
        else:
            between.append(layer)
    if between:
        yield Block(between, numbers)


def _is_written_out(layer: nn.Module) -> bool:
    if type(layer) not in WRITTEN_OUT or has_hooks(layer):
        return False
    # Weights that a user added to the layer must decay, even if nothing uses them: autograd does this.
    known = {"weight", "bias"} if type(layer) is nn.Linear else set()
    if dict(layer.named_parameters()).keys() - known:
        return False
    return not isinstance(layer, nn.Flatten) or (layer.start_dim, layer.end_dim) == (1, -1)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    # A hook sees or changes what passes, so a module with a hook is called as a whole. So is an nn.Sequential that has
    # weights of its own in addition to its layers.
    hooked = any(has_hooks(inner) for inner in module.modules())
    has_own_weights = any(True for _ in module.parameters(recurse=False))
    if type(module) is nn.Sequential and not hooked and not has_own_weights:
        for layer in module:
            yield from _layers(layer)
    else:
        yield module


def has_hooks(module: nn.Module) -> bool:
    """Whether a function sees or changes what passes through the module."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(module, f"_{kind}_hooks") for kind in kinds)
