"""Layers that many clients go through at once, each client with weights of its own.

torch's own layers know one set of weights. Here each weight is a stack of the clients' weights, whose first axis is the
client. The inputs and the outputs have the rows of all clients on their first axis, client after client, each client
with the same number of rows. So the layers without weights, and a module's own `forward`, work as for one client.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

from fedtune.client.stacked_lstm import stacked_lstm

Weights = Mapping[str, Float[Tensor, "client ..."]]  # of one layer, by name


def stacked_linear(
    layer: nn.Linear, weights: Weights, x: Float[Tensor, "row *axis input"]
) -> Float[Tensor, "row *axis output"]:
    """The outputs of nn.Linear: one product of matrices for each client, all in one operation."""
    return _products(x, weights["weight"], weights.get("bias"))


def stacked_convolution(
    layer: nn.Conv2d, weights: Weights, x: Float[Tensor, "row channel height width"]
) -> Float[Tensor, "row output height2 width2"]:
    """The outputs of nn.Conv2d. torch has no fast form for many clients: its grouped convolution is slow on a GPU."""
    convolve = _convolved_apart if x.is_cpu else _convolved_by_products
    return convolve(layer, weights, x)


def _convolved_apart(layer: nn.Conv2d, weights: Weights, x: Tensor) -> Tensor:
    """One client after the other. On a CPU a convolution is faster than a product with all patches of the images."""
    filters, biases = weights["weight"], weights.get("bias")
    apart = biases.unbind() if biases is not None else [None] * len(filters)
    clients = zip(x.chunk(len(filters)), filters.unbind(), apart, strict=True)
    return torch.cat([functional.conv2d(*client, layer.stride, layer.padding) for client in clients])


def _convolved_by_products(layer: nn.Conv2d, weights: Weights, x: Tensor) -> Tensor:
    """The products of each client's filters and all patches of the client's images, in one operation."""
    assert not isinstance(layer.padding, str)
    (above, beside), (height, width), (down, right) = layer.padding, layer.kernel_size, layer.stride
    images = functional.pad(x.movedim(1, -1), (0, 0, beside, beside, above, above))  # (row, height, width, channel)
    patches = images.unfold(1, height, down).unfold(2, width, right).movedim(3, -1)  # (row, down, right, *patch)
    filters = weights["weight"].permute(0, 1, 3, 4, 2).flatten(2)  # (client, output, patch)
    return _products(patches.flatten(3), filters, weights.get("bias")).movedim(-1, 1)


def stacked_embedding(
    layer: nn.Embedding, weights: Weights, x: Int[Tensor, "row *axis"]
) -> Float[Tensor, "row *axis feature"]:
    """The outputs of nn.Embedding: the clients' tables are one long table, in which each client has its own part."""
    tables = weights["weight"]
    first = torch.arange(len(tables), device=x.device) * layer.num_embeddings  # (client,)
    tokens = x.reshape(len(tables), -1)
    # A token that is in no table must not be found in the next client's part.
    is_known = (tokens >= 0) & (tokens < layer.num_embeddings)
    index = torch.where(is_known, tokens + first[:, None], -1)
    return functional.embedding(index, tables.flatten(0, 1)).reshape(*x.shape, layer.embedding_dim)


def _products(
    inputs: Float[Tensor, "row *axis input"],
    matrices: Float[Tensor, "client output input"],
    biases: Float[Tensor, "client output"] | None,
) -> Float[Tensor, "row *axis output"]:
    kind = inputs.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        inputs, matrices = inputs.to(dtype), matrices.to(dtype)
        biases = None if biases is None else biases.to(dtype)
    products: Tensor = _Products.apply(inputs, matrices, biases)  # type: ignore[no-untyped-call]
    return products


class _Products(torch.autograd.Function):
    """The inputs times each client's transposed matrix, plus the client's bias if there is one.

    Autograd would give the gradient of the matrices transposed, and SGD would be slow to add that to the weights.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, matrices: Tensor, biases: Tensor | None) -> Tensor:
        rows = inputs.reshape(len(matrices), -1, inputs.size(-1))  # (client, row, input)
        ctx.save_for_backward(rows, matrices)
        ctx.shape = inputs.shape
        # Not a view of a product: a layer may work in place on it.
        outputs = inputs.new_empty(*inputs.shape[:-1], matrices.size(1))
        out, transposed = outputs.view(len(matrices), -1, matrices.size(1)), matrices.transpose(1, 2)
        if biases is None:
            torch.bmm(rows, transposed, out=out)
        else:
            torch.baddbmm(biases[:, None], rows, transposed, out=out)
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        rows, matrices = ctx.saved_tensors
        by_outputs = gradient.reshape(len(matrices), -1, matrices.size(1))  # (client, row, output)
        needs_inputs, _, needs_biases = ctx.needs_input_grad
        by_inputs = torch.bmm(by_outputs, matrices).reshape(ctx.shape) if needs_inputs else None
        by_biases = by_outputs.sum(1) if needs_biases else None
        return by_inputs, torch.bmm(by_outputs.transpose(1, 2), rows), by_biases


# The layers with weights that have a stacked form. Exact types: a subclass may do something else.
STACKED: dict[type[nn.Module], Callable[..., Shaped[Tensor, "row ..."] | tuple[Tensor, None]]] = {
    nn.Linear: stacked_linear,
    nn.Conv2d: stacked_convolution,
    nn.Embedding: stacked_embedding,
    nn.LSTM: stacked_lstm,
}
