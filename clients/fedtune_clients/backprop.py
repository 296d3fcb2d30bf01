"""Steps of SGD by backpropagation, written out for four kinds of layers (WRITTEN_OUT), left to autograd for all else.

What is written out spares autograd's overhead, most of a small layer's time, and adds the gradient of a linear layer's
weight, a product of two matrices, to the weight as it is computed, where autograd would write it to memory first.

Where all of a model is written out, several clients can take a step together, each with weights of its own: what goes
row by row is done to the rows of all of them at once, and each matrix product for each client as if it were alone. So
every client gets the bits that it would get by itself.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils.rnn import pad_sequence

from fedtune.client.examples import Examples
from fedtune.client.flat_model import FlatModel
from fedtune_clients.descent import Descent

ALIGNMENT = 16  # floats in 64 bytes; where memory begins can decide how a matrix product is computed


class Client(NamedTuple):
    """Who takes a step: the weights that it trains, and its dropout."""

    descent: Descent
    dropout: float = 0.0
    generator: torch.Generator | None = None  # None is torch's own


class Rows(NamedTuple):
    """A batch between two layers: each client's rows and, where there are several clients, all that they lie in."""

    each: list[Shaped[Tensor, "example ..."]]
    whole: Shaped[Tensor, "client example ..."] | None = None  # filled up to one number of examples


class Backprop:
    """A model as parts that follow each other. Each part's weights are stepped as soon as their gradients are known.

    `takes_several` is True where `step` can be given more than one client.
    """

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
        for part in parts[: first + 1]:
            part.needs_input_gradient = False
        self.takes_several = self._is_cross_entropy and all(type(part) is not Part for part in parts)
        self._parts, self._trained = parts, parts[first:]

    def step(self, batches: Sequence[Examples], clients: Sequence[Client]) -> None:
        """One step of each client on its batch."""
        rows = Rows([batch.x for batch in batches])
        for part in self._parts:
            rows = part.forward(rows, clients)
        gradient = self._loss_gradient(rows, [batch.y for batch in batches])
        for part in reversed(self._trained):
            gradient = part.backward(gradient, clients)

    def _loss_gradient(self, outputs: Rows, labels: list[Tensor]) -> Rows:
        logits = outputs.each[0] if outputs.whole is None else outputs.whole
        if not self._is_cross_entropy or logits.ndim > 2 + (outputs.whole is not None):
            (each,) = outputs.each
            each = each.detach().requires_grad_()
            return Rows([torch.autograd.grad(self._loss(each, labels[0]), each)[0]])
        sizes = [y.size(0) for y in labels]
        size: int | Tensor = sizes[0]
        if outputs.whole is None:
            (y,) = labels
        elif min(sizes) == size == max(sizes):
            y = torch.stack(labels)
        else:
            y, size = (
                pad_sequence(labels, batch_first=True),
                torch.tensor(sizes, dtype=torch.float32, device=logits.device)[:, None, None],
            )
        # The softmax less the one-hot labels, over the number of examples.
        index = y.unsqueeze(-1)
        gradient = logits.softmax(-1).scatter_add_(-1, index, self._minus_one.expand(index.shape)).div_(size)
        return Rows([gradient]) if outputs.whole is None else _apart(gradient, sizes)


class Part:
    """Layers left to autograd, for one client; and the base of those written out.

    It keeps of `forward` what `backward` needs.
    """

    needs_input_gradient = True

    def __init__(self, modules: Sequence[nn.Module], numbers: Mapping[nn.Parameter, int]) -> None:
        """`numbers` are those of the model's trainable parameters in `Descent`."""
        self.modules = modules
        parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
        self.parameters = [parameter for parameter in parameters if parameter in numbers]
        self.numbers = [numbers[parameter] for parameter in self.parameters]

    def forward(self, inputs: Rows, clients: Sequence[Client]) -> Rows:
        """The outputs in training."""
        (x,) = inputs.each
        self._source = x
        if self.needs_input_gradient:
            self._source = x.detach().requires_grad_()
            x = self._source.clone()  # a layer may work in place, which torch forbids on the tensor itself
        for module in self.modules:
            x = module(x)
        self._result = x
        return Rows([x.detach()])

    def backward(self, gradient: Rows, clients: Sequence[Client]) -> Rows:
        """Steps the weights, given the loss's gradient by the outputs; that by the inputs, if it is needed."""
        sources = [*self.parameters, self._source] if self.needs_input_gradient else self.parameters
        if self._result.requires_grad or not self.needs_input_gradient:
            gradients = torch.autograd.grad(self._result, sources, gradient.each[0], materialize_grads=True)
        else:  # a layer lets none through
            gradients = tuple(map(torch.zeros_like, sources))
        for number, slope in zip(self.numbers, gradients, strict=False):
            clients[0].descent.step(number, slope)
        return Rows([gradients[-1]])


class Linear(Part):
    """nn.Linear."""

    def forward(self, inputs: Rows, clients: Sequence[Client]) -> Rows:
        self._inputs = inputs
        weights = [[client.descent.weights[number] for number in self.numbers] for client in clients]
        if len(clients) == 1:
            return Rows([linear(inputs.each[0], *weights[0])])
        return _products([(x, weight.t(), *bias) for x, (weight, *bias) in zip(inputs.each, weights, strict=True)])

    def backward(self, gradient: Rows, clients: Sequence[Client]) -> Rows:
        by_inputs = gradient
        if self.needs_input_gradient:
            weights = [client.descent.weights[self.numbers[0]] for client in clients]
            if len(clients) == 1:
                by_inputs = Rows([gradient.each[0].matmul(weights[0])])
            else:
                by_inputs = _products(list(zip(gradient.each, weights, strict=True)))
        for rows, x, client in zip(gradient.each, self._inputs.each, clients, strict=True):
            columns = _matrix(rows).t()
            client.descent.step_along_product(self.numbers[0], columns, _matrix(x))
            for number in self.numbers[1:]:
                client.descent.step_along_product(number, columns, _ones(columns.size(1), columns.device))
        return by_inputs


class ReLU(Part):
    """nn.ReLU."""

    def forward(self, inputs: Rows, clients: Sequence[Client]) -> Rows:
        (module,) = self.modules
        self._outputs = _map(torch.relu_ if module.inplace else torch.relu, inputs)
        return self._outputs

    def backward(self, gradient: Rows, clients: Sequence[Client]) -> Rows:
        return _map(_relu_backward, gradient, self._outputs)


def _relu_backward(gradient: Tensor, outputs: Tensor) -> Tensor:
    by_inputs: Tensor = torch.ops.aten.threshold_backward(gradient, outputs, 0)
    return by_inputs


class Dropout(Part):
    """nn.Dropout, with the numbers that it would draw."""

    def forward(self, inputs: Rows, clients: Sequence[Client]) -> Rows:
        self._factors = None
        if any(client.dropout > 0 for client in clients):
            self._factors = _map(torch.ones_like, inputs)
            for factors, client in zip(self._factors.each, clients, strict=True):
                if client.dropout > 0:
                    keep = 1 - client.dropout
                    factors.bernoulli_(keep, generator=client.generator).div_(keep)
        return self._times_factors(inputs)

    def backward(self, gradient: Rows, clients: Sequence[Client]) -> Rows:
        return self._times_factors(gradient)

    def _times_factors(self, rows: Rows) -> Rows:
        return rows if self._factors is None else _map(torch.mul, rows, self._factors)


class Flatten(Part):
    """nn.Flatten of all but the first axis."""

    def forward(self, inputs: Rows, clients: Sequence[Client]) -> Rows:
        self._shape = inputs.each[0].shape[1:]
        return _map(lambda x: x.flatten(-len(self._shape)), inputs)

    def backward(self, gradient: Rows, clients: Sequence[Client]) -> Rows:
        return _map(lambda slope: slope.unflatten(-1, self._shape), gradient)


WRITTEN_OUT: dict[type[nn.Module], type[Part]] = {
    nn.Linear: Linear,
    nn.ReLU: ReLU,
    nn.Dropout: Dropout,
    nn.Flatten: Flatten,
}


def _products(factors: Sequence[tuple[Tensor, ...]]) -> Rows:
    """Each client's rows times its matrix, plus its bias if it has one."""
    x, matrix = factors[0][:2]
    products = _zeros([x.size(0) for x, *_ in factors], (*x.shape[1:-1], matrix.size(1)), x)
    for (x, matrix, *bias), product in zip(factors, products.each, strict=True):
        if bias:
            torch.addmm(bias[0], _matrix(x), matrix, out=_matrix(product))
        else:
            torch.mm(_matrix(x), matrix, out=_matrix(product))
    return products


def _matrix(rows: Tensor) -> Tensor:
    return rows if rows.ndim == 2 else rows.flatten(0, -2)


@functools.lru_cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)


def _zeros(sizes: list[int], shape: tuple[int, ...], like: Tensor) -> Rows:
    """Rows to be filled, each client's from the start of an aligned piece of memory."""
    multiple = ALIGNMENT // math.gcd(ALIGNMENT, math.prod(shape))
    return _apart(like.new_zeros(len(sizes), -(-max(sizes) // multiple) * multiple, *shape), sizes)


def _apart(whole: Shaped[Tensor, "client example ..."], sizes: list[int]) -> Rows:
    most = max(sizes)
    each = whole[:, :most].unbind()
    return Rows([rows if size == most else rows[:size] for rows, size in zip(each, sizes, strict=True)], whole)


def _map(function: Callable[..., Tensor], *rows: Rows) -> Rows:
    """What the function, which goes row by row, makes of them."""
    wholes = [each.whole for each in rows]
    if any(whole is None for whole in wholes):
        return Rows([function(*tensors) for tensors in zip(*[each.each for each in rows], strict=True)])
    return _apart(function(*wholes), [each.size(0) for each in rows[0].each])


def _parts(module: nn.Module, numbers: Mapping[nn.Parameter, int]) -> Iterator[Part]:
    """The written-out layers of nested nn.Sequentials, each a part, and the layers between two of them, a part too."""
    between: list[nn.Module] = []
    for layer in _layers(module):
        if _is_written_out(layer) and all(parameter in numbers for parameter in layer.parameters()):
            if between:
                yield Part(between, numbers)
                between = []
            yield WRITTEN_OUT[type(layer)]([layer], numbers)
        else:
            between.append(layer)
    if between:
        yield Part(between, numbers)


def _is_written_out(layer: nn.Module) -> bool:
    if type(layer) not in WRITTEN_OUT or _has_hooks(layer):
        return False
    known = {"weight", "bias"} if type(layer) is nn.Linear else set()
    if dict(layer.named_parameters()).keys() - known:  # a user's, which decay even where nothing uses them
        return False
    return not isinstance(layer, nn.Flatten) or (layer.start_dim, layer.end_dim) == (1, -1)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    # A hook sees or changes what passes: what has one is called as a whole. So is what has weights beside its layers'.
    whole = any(_has_hooks(each) for each in module.modules()) or any(True for _ in module.parameters(recurse=False))
    if type(module) is nn.Sequential and not whole:
        for layer in module:
            yield from _layers(layer)
    else:
        yield module


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(module, f"_{kind}_hooks") for kind in kinds)
