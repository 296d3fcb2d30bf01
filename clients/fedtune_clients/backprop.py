"""Steps of SGD by backpropagation, written out for linear layers, ReLU and dropout, left to autograd for all else.

What is written out spares autograd's overhead, most of a small layer's time, and adds the gradient of a linear layer's
weight, a product of two matrices, to the weight as it is computed, where autograd would write it to memory first.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, linear

from fedtune.flat_model import FlatModel
from fedtune_clients.descent import Descent


class Backprop:
    """A model as parts that follow each other. Each part's weights are stepped as soon as their gradients are known."""

    def __init__(self, model: FlatModel, *, written_out: bool = True) -> None:
        """Unless `written_out`, all is left to autograd."""
        numbers = {parameter: number for number, parameter in enumerate(model.parameters)}
        self._loss = model.loss
        self._is_cross_entropy = written_out and model.loss is cross_entropy
        self._minus_one = torch.tensor(-1.0, device=model.flat.device)
        parts = list(_parts(model.module, numbers)) if written_out else [Part([model.module], numbers)]
        if len({number for part in parts for number in part.numbers}) < sum(len(part.numbers) for part in parts):
            parts = [Part([model.module], numbers)]  # a weight of two parts would be stepped between its two uses
        first = next(place for place, part in enumerate(parts) if part.numbers)
        parts[first].needs_input_gradient = False
        self._untrained, self._trained = parts[:first], parts[first:]

    def step(self, x: Shaped[Tensor, "example ..."], y: Shaped[Tensor, "example ..."], descent: Descent) -> None:
        """One step on a batch."""
        for part in self._untrained:
            for module in part.modules:
                x = module(x)
        for part in self._trained:
            x = part.forward(x)
        gradient = self._loss_gradient(x, y)
        for part in reversed(self._trained):
            gradient = part.backward(gradient, descent)

    def _loss_gradient(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self._is_cross_entropy and outputs.ndim == 2:
            # The softmax less the one-hot labels, over the number of examples.
            return outputs.softmax(1).scatter_add_(1, y[:, None], self._minus_one.expand(len(y), 1)).div_(len(y))
        outputs = outputs.detach().requires_grad_()
        return torch.autograd.grad(self._loss(outputs, y), outputs)[0]


class Part:
    """Layers left to autograd, and the base of those written out. It keeps of `forward` what `backward` needs."""

    needs_input_gradient = True

    def __init__(self, modules: Sequence[nn.Module], numbers: Mapping[nn.Parameter, int]) -> None:
        """`numbers` are those of the model's trainable parameters in `Descent`."""
        self.modules = modules
        parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
        self.parameters = [parameter for parameter in parameters if parameter in numbers]
        self.numbers = [numbers[parameter] for parameter in self.parameters]

    def forward(self, x: Tensor) -> Tensor:
        """The outputs in training."""
        self._inputs = x
        if self.needs_input_gradient:
            self._inputs = x.detach().requires_grad_()
            x = self._inputs.clone()  # a layer may work in place, which torch forbids on the tensor itself
        for module in self.modules:
            x = module(x)
        self._outputs = x
        return x.detach()

    def backward(self, gradient: Tensor, descent: Descent) -> Tensor:
        """Steps the weights, given the loss's gradient by the outputs; that by the inputs, if it is needed."""
        sources = [*self.parameters, self._inputs] if self.needs_input_gradient else self.parameters
        if self._outputs.requires_grad or not self.needs_input_gradient:
            gradients = torch.autograd.grad(self._outputs, sources, gradient, materialize_grads=True)
        else:  # a layer lets none through
            gradients = tuple(map(torch.zeros_like, sources))
        for number, slope in zip(self.numbers, gradients, strict=False):
            descent.step(number, slope)
        return gradients[-1]


class Linear(Part):
    """nn.Linear."""

    def __init__(self, modules: Sequence[nn.Module], numbers: Mapping[nn.Parameter, int]) -> None:
        super().__init__(modules, numbers)
        self._tensors = [parameter.detach() for parameter in self.parameters]  # the weight, and the bias if any

    def forward(self, x: Tensor) -> Tensor:
        self._inputs = x
        return linear(x, *self._tensors)

    def backward(self, gradient: Tensor, descent: Descent) -> Tensor:
        by_inputs = gradient.matmul(self._tensors[0]) if self.needs_input_gradient else gradient
        rows = gradient.flatten(0, -2)
        descent.step_along_product(self.numbers[0], rows.t(), self._inputs.flatten(0, -2))
        for number in self.numbers[1:]:
            descent.step(number, rows.sum(0))
        return by_inputs


class ReLU(Part):
    """nn.ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        (module,) = self.modules
        outputs: Tensor = module(x)
        self._outputs = outputs
        return outputs

    def backward(self, gradient: Tensor, descent: Descent) -> Tensor:
        return gradient * (self._outputs > 0)


class Dropout(Part):
    """nn.Dropout, with the numbers that it would draw."""

    def forward(self, x: Tensor) -> Tensor:
        (module,) = self.modules
        p = float(module.p)  # type: ignore[arg-type]
        self._factors = dropout(torch.ones_like(x), p) if p > 0 else None
        return x if self._factors is None else x * self._factors

    def backward(self, gradient: Tensor, descent: Descent) -> Tensor:
        return gradient if self._factors is None else gradient * self._factors


WRITTEN_OUT = {nn.Linear: Linear, nn.ReLU: ReLU, nn.Dropout: Dropout}


def _parts(module: nn.Module, numbers: Mapping[nn.Parameter, int]) -> Iterator[Part]:
    """The written-out layers of nested nn.Sequentials, each a part, and the layers between two of them, a part too."""
    between: list[nn.Module] = []
    for layer in _layers(module):
        if type(layer) in WRITTEN_OUT and all(parameter in numbers for parameter in layer.parameters()):
            if between:
                yield Part(between, numbers)
                between = []
            yield WRITTEN_OUT[type(layer)]([layer], numbers)
        else:
            between.append(layer)
    if between:
        yield Part(between, numbers)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    # A hook sees or changes what passes: what has one is called as a whole.
    if type(module) is nn.Sequential and not any(_has_hooks(each) for each in module.modules()):
        for layer in module:
            yield from _layers(layer)
    else:
        yield module


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(module, f"_{kind}_hooks") for kind in kinds)
