"""Steps of SGD by backpropagation, written out for four kinds of layers (WRITTEN_OUT) and left to autograd for others.

The written-out form has none of autograd's overhead, which is most of a small layer's time. It also saves memory
traffic: the gradient of a linear layer's weight is a product of two matrices, and it is added to the weight while the
product is computed. Autograd would write the product to memory first.

If all layers of a model are written out, several clients can take a step together, each with weights of its own. An
operation that works row by row is done on the rows of all clients at once. A matrix product is done for each client as
if the client were alone. So every client gets the bits that it would get by itself.
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

from fedtune.client import Examples, FlatModel
from fedtune_clients.sgd_step import SGDStep

ALIGNMENT = 16  # floats in 64 bytes; where memory begins can decide how a matrix product is computed


class Client(NamedTuple):
    """A client that takes a step: the SGD step on its weights, and its dropout."""

    sgd_step: SGDStep
    dropout: float = 0.0
    generator: torch.Generator | None = None  # None is torch's own


class Rows(NamedTuple):
    """A batch between two layers: the rows of each client, as views of `whole` if there are several clients."""

    per_client: list[Shaped[Tensor, "example ..."]]
    whole: Shaped[Tensor, "client example ..."] | None = None  # all clients filled up to one number of examples


class Backprop:
    """A model as blocks that follow each other. A block's weights are stepped as soon as their gradients are known.

    `takes_several` is True if `step` can be given more than one client.
    """

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
        self.takes_several = self._is_cross_entropy and all(type(block) is not Block for block in blocks)
        self._blocks, self._trained = blocks, blocks[first:]

    def step(self, batches: Sequence[Examples], clients: Sequence[Client]) -> None:
        """Steps each client's weights on the client's batch."""
        rows = Rows([batch.x for batch in batches])
        for block in self._blocks:
            rows = block.forward(rows, clients)
        gradient = self._loss_gradient(rows, [batch.y for batch in batches])
        for block in reversed(self._trained):
            gradient = block.backward(gradient, clients)

    def _loss_gradient(self, outputs: Rows, labels: list[Tensor]) -> Rows:
        logits = outputs.per_client[0] if outputs.whole is None else outputs.whole  # ([client], example, class)
        if not self._is_cross_entropy or logits.ndim > 2 + (outputs.whole is not None):
            (only,) = outputs.per_client
            only = only.detach().requires_grad_()
            return Rows([torch.autograd.grad(self._loss(only, labels[0]), only)[0]])
        # The labels in the shape of the logits' first axes, and each client's number of examples.
        sizes = [y.size(0) for y in labels]
        size: int | Tensor = sizes[0]
        if outputs.whole is None:
            (y,) = labels
        elif min(sizes) == size == max(sizes):
            y = torch.stack(labels)
        else:
            y = pad_sequence(labels, batch_first=True)  # (client, example)
            size = torch.tensor(sizes, dtype=torch.float32, device=logits.device)[:, None, None]
        # The softmax minus the one-hot labels, over the number of examples.
        index = y.unsqueeze(-1)
        gradient = logits.softmax(-1).scatter_add_(-1, index, self._minus_one.expand(index.shape)).div_(size)
        return Rows([gradient]) if outputs.whole is None else _apart(gradient, sizes)


class Block:
    """Layers that are left to autograd, for one client. It is also the base class of the layers that are written out.

    `forward` stores what `backward` needs.
    """

    needs_input_gradient = True

    def __init__(self, modules: Sequence[nn.Module], numbers: Mapping[nn.Parameter, int]) -> None:
        """`numbers` are the places of the model's trainable parameters in `SGDStep.weights`."""
        self.modules = modules
        parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
        self.parameters = [parameter for parameter in parameters if parameter in numbers]
        self.numbers = [numbers[parameter] for parameter in self.parameters]

    def forward(self, inputs: Rows, clients: Sequence[Client]) -> Rows:
        """The outputs in training mode."""
        (x,) = inputs.per_client
        self._source = x
        if self.needs_input_gradient:
            self._source = x.detach().requires_grad_()
            x = self._source.clone()  # a layer may work in place, which torch forbids on the tensor itself
        for module in self.modules:
            x = module(x)
        self._result = x
        return Rows([x.detach()])

    def backward(self, gradient: Rows, clients: Sequence[Client]) -> Rows:
        """The gradient of the loss with respect to the inputs, if it is needed. Steps the weights.

        `gradient` is the gradient of the loss with respect to the outputs.
        """
        sources = [*self.parameters, self._source] if self.needs_input_gradient else self.parameters
        if self._result.requires_grad or not self.needs_input_gradient:
            gradients = torch.autograd.grad(self._result, sources, gradient.per_client[0], materialize_grads=True)
        else:  # a layer lets no gradient through
            gradients = tuple(map(torch.zeros_like, sources))
        for number, by_weight in zip(self.numbers, gradients, strict=False):
            clients[0].sgd_step.along(number, by_weight)
        return Rows([gradients[-1]])


class Linear(Block):
    """nn.Linear."""

    def forward(self, inputs: Rows, clients: Sequence[Client]) -> Rows:
        """The inputs times the transposed weight, plus the bias if there is one."""
        self._inputs = inputs
        weights = [[client.sgd_step.weights[number] for number in self.numbers] for client in clients]
        if len(clients) == 1:
            return Rows([linear(inputs.per_client[0], *weights[0])])
        return _products(
            [(x, weight.t(), *bias) for x, (weight, *bias) in zip(inputs.per_client, weights, strict=True)]
        )

    def backward(self, gradient: Rows, clients: Sequence[Client]) -> Rows:
        """The gradient times the weight as it was in `forward`. Steps the weight and the bias."""
        by_inputs = gradient
        if self.needs_input_gradient:
            weights = [client.sgd_step.weights[self.numbers[0]] for client in clients]
            if len(clients) == 1:
                by_inputs = Rows([gradient.per_client[0].matmul(weights[0])])
            else:
                by_inputs = _products(list(zip(gradient.per_client, weights, strict=True)))
        for rows, x, client in zip(gradient.per_client, self._inputs.per_client, clients, strict=True):
            columns = _matrix(rows).t()  # (output, example)
            client.sgd_step.along_product(self.numbers[0], columns, _matrix(x))
            for number in self.numbers[1:]:
                client.sgd_step.along_product(number, columns, _ones(columns.size(1), columns.device))
        return by_inputs


class ReLU(Block):
    """nn.ReLU."""

    def forward(self, inputs: Rows, clients: Sequence[Client]) -> Rows:
        """max(inputs, 0)."""
        (module,) = self.modules
        self._outputs = _map(torch.relu_ if module.inplace else torch.relu, inputs)
        return self._outputs

    def backward(self, gradient: Rows, clients: Sequence[Client]) -> Rows:
        """The gradient, with 0 at the places at which the output is 0."""
        return _map(_relu_backward, gradient, self._outputs)


def _relu_backward(gradient: Tensor, outputs: Tensor) -> Tensor:
    by_inputs: Tensor = torch.ops.aten.threshold_backward(gradient, outputs, 0)
    return by_inputs


class Dropout(Block):
    """nn.Dropout, with the random numbers that it would draw."""

    def forward(self, inputs: Rows, clients: Sequence[Client]) -> Rows:
        """The inputs times random factors: 0 with the client's dropout probability p, otherwise 1 / (1 - p)."""
        self._factors = None
        if any(client.dropout > 0 for client in clients):
            self._factors = _map(torch.ones_like, inputs)
            for factors, client in zip(self._factors.per_client, clients, strict=True):
                if client.dropout > 0:
                    retained = 1 - client.dropout
                    factors.bernoulli_(retained, generator=client.generator).div_(retained)
        return self._times_factors(inputs)

    def backward(self, gradient: Rows, clients: Sequence[Client]) -> Rows:
        """The gradient times the factors of `forward`."""
        return self._times_factors(gradient)

    def _times_factors(self, rows: Rows) -> Rows:
        return rows if self._factors is None else _map(torch.mul, rows, self._factors)


class Flatten(Block):
    """nn.Flatten of all axes after the first."""

    def forward(self, inputs: Rows, clients: Sequence[Client]) -> Rows:
        """The inputs, each example as one row of numbers."""
        self._shape = inputs.per_client[0].shape[1:]
        return _map(lambda x: x.flatten(-len(self._shape)), inputs)

    def backward(self, gradient: Rows, clients: Sequence[Client]) -> Rows:
        """The gradient in the shape of the inputs."""
        return _map(lambda by_outputs: by_outputs.unflatten(-1, self._shape), gradient)


WRITTEN_OUT: dict[type[nn.Module], type[Block]] = {
    nn.Linear: Linear,
    nn.ReLU: ReLU,
    nn.Dropout: Dropout,
    nn.Flatten: Flatten,
}


def _products(factors: Sequence[tuple[Tensor, ...]]) -> Rows:
    """The rows of each client times the client's matrix, plus the client's bias if there is one."""
    x, matrix = factors[0][:2]
    products = _zeros([x.size(0) for x, *_ in factors], (*x.shape[1:-1], matrix.size(1)), x)
    for (x, matrix, *bias), product in zip(factors, products.per_client, strict=True):
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
    """Rows to be filled. The rows of each client start at an aligned place in memory."""
    multiple = ALIGNMENT // math.gcd(ALIGNMENT, math.prod(shape))
    return _apart(like.new_zeros(len(sizes), -(-max(sizes) // multiple) * multiple, *shape), sizes)


def _apart(whole: Shaped[Tensor, "client example ..."], sizes: list[int]) -> Rows:
    most = max(sizes)
    views = whole[:, :most].unbind()
    return Rows([rows if size == most else rows[:size] for rows, size in zip(views, sizes, strict=True)], whole)


def _map(function: Callable[..., Tensor], *rows: Rows) -> Rows:
    """The results of the function on the rows; the function must work row by row."""
    wholes = [argument.whole for argument in rows]
    if any(whole is None for whole in wholes):
        tensors = zip(*[argument.per_client for argument in rows], strict=True)
        return Rows([function(*of_client) for of_client in tensors])
    return _apart(function(*wholes), [of_client.size(0) for of_client in rows[0].per_client])


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
    if type(layer) not in WRITTEN_OUT or _has_hooks(layer):
        return False
    # Weights that a user added to the layer must decay, even if nothing uses them: autograd does this.
    known = {"weight", "bias"} if type(layer) is nn.Linear else set()
    if dict(layer.named_parameters()).keys() - known:
        return False
    return not isinstance(layer, nn.Flatten) or (layer.start_dim, layer.end_dim) == (1, -1)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    # A hook sees or changes what passes, so a module with a hook is called as a whole. So is an nn.Sequential that has
    # weights of its own in addition to its layers.
    hooked = any(_has_hooks(inner) for inner in module.modules())
    has_own_weights = any(True for _ in module.parameters(recurse=False))
    if type(module) is nn.Sequential and not hooked and not has_own_weights:
        for layer in module:
            yield from _layers(layer)
    else:
        yield module


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(module, f"_{kind}_hooks") for kind in kinds)
