"""The table of a model's layers for the compiled kernel, or the reason why the kernel can't train the model.

The kernel knows two kinds of models. One is a sequence of linear layers, activations and dropout. The other one is the
stacked LSTM of `fedtune_clients.models`: an embedding, LSTM layers, the last step, linear layers.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from fedtune.client import FlatModel
from fedtune.client.objectives import OBJECTIVES
from fedtune.data.spec import DatasetSpec
from fedtune_clients.backprop import has_hooks
from fedtune_clients.models import StackedLSTM

MAX_LAYERS = 64  # as in kernel.c
FLOAT_BYTES = 4

# `enum kind` of kernel.c.
LINEAR, RELU, TANH, SIGMOID, DROPOUT, EMBEDDING, LSTM, LAST_STEP = range(8)
LSTM_WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
ELEMENTWISE = {nn.ReLU: RELU, nn.Tanh: TANH, nn.Sigmoid: SIGMOID, nn.Dropout: DROPOUT}
OBJECTIVES_OF_KERNEL = ("classification", "regression")


class Layer(NamedTuple):
    """A row of the table; the structure `Layer` of kernel.c says what the numbers mean."""

    kind: int
    num_in: int
    num_out: int
    weights: tuple[int, int, int, int] = (-1, -1, -1, -1)


class NotCompiled(Exception):
    """The kernel can't train this model; the message says why."""


def layer_table(model: FlatModel, spec: DatasetSpec) -> list[Layer] | str:
    """The layers of the model in their order, or why it can't be compiled. `spec` describes its examples."""
    try:
        layers = list(_layers(model, spec))
        _check(model, spec, layers)
    except NotCompiled as reason:
        return str(reason)
    return layers


def _layers(model: FlatModel, spec: DatasetSpec) -> Iterator[Layer]:
    shape = spec.input_shape
    for module in _modules(model.module):
        width = math.prod(shape)
        if type(module) is StackedLSTM:
            yield from _lstm_layers(model, module)
            shape = (module.output.out_features,)
        elif type(module) is nn.Flatten:
            if (module.start_dim, module.end_dim) != (1, -1):
                raise NotCompiled("the kernel knows nn.Flatten of all axes after the first only")
            shape = (width,)
        elif type(module) is nn.Linear:
            if shape != (module.in_features,):
                raise NotCompiled(f"nn.Linear gets inputs of shape {shape}, not rows of {module.in_features} numbers")
            shape = (module.out_features,)
            yield _linear(model, module)
        elif type(module) in ELEMENTWISE:
            yield Layer(ELEMENTWISE[type(module)], width, width)
        else:
            raise NotCompiled(f"the kernel doesn't know the layer {_name_of_unknown(model.module)}")


def _name_of_unknown(module: nn.Module) -> str:
    """The first layer of torch that the kernel does not know, or else the first layer: it says more to a user."""
    known = {nn.Flatten, nn.Linear, StackedLSTM, *ELEMENTWISE}
    unknown = [type(layer) for layer in _modules(module) if type(layer) not in known]
    names = [layer.__name__ for layer in unknown if layer.__module__.startswith("torch.")]
    return (names or [unknown[0].__name__])[0]


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested nn.Sequentials."""
    if type(module) is nn.Sequential:
        for layer in module:
            yield from _modules(layer)
    else:
        yield module


def _linear(model: FlatModel, module: nn.Linear) -> Layer:
    return Layer(LINEAR, module.in_features, module.out_features, _places(model, module.weight, module.bias))


def _lstm_layers(model: FlatModel, module: StackedLSTM) -> Iterator[Layer]:
    embedding = module.embedding
    options = embedding.padding_idx, embedding.max_norm, embedding.scale_grad_by_freq, embedding.sparse
    if type(embedding) is not nn.Embedding or options != (None, None, False, False):
        raise NotCompiled("the kernel knows nn.Embedding without options only")
    yield Layer(EMBEDDING, embedding.num_embeddings, embedding.embedding_dim, _places(model, embedding.weight))
    for lstm, dropout in zip(module.layers, module.dropouts, strict=True):
        if type(lstm) is not nn.LSTM or type(dropout) is not nn.Dropout or not _is_plain(lstm):
            raise NotCompiled("the kernel knows a stack of plain nn.LSTM and nn.Dropout layers only")
        weights = (lstm.get_parameter(name) for name in LSTM_WEIGHTS)
        yield Layer(LSTM, lstm.input_size, lstm.hidden_size, _places(model, *weights))
        if lstm is module.layers[-1]:
            yield Layer(LAST_STEP, lstm.hidden_size, lstm.hidden_size)
        yield Layer(DROPOUT, lstm.hidden_size, lstm.hidden_size)
    if type(module.output) is not nn.Linear:
        raise NotCompiled("the kernel knows nn.Linear after the last LSTM only")
    yield _linear(model, module.output)


def _is_plain(lstm: nn.LSTM) -> bool:
    options = lstm.num_layers, lstm.bias, lstm.batch_first, lstm.dropout, lstm.bidirectional, lstm.proj_size
    return options == (1, True, True, 0.0, False, 0)


def _places(model: FlatModel, *tensors: Tensor | None) -> tuple[int, int, int, int]:
    """Where each tensor begins in the model's flat weights."""
    begin = model.flat.data_ptr()
    places = [-1 if tensor is None else (tensor.data_ptr() - begin) // FLOAT_BYTES for tensor in tensors]
    first, second, third, fourth = places + [-1] * (4 - len(places))
    return first, second, third, fourth


def _check(model: FlatModel, spec: DatasetSpec, layers: list[Layer]) -> None:
    """Raises NotCompiled if the table does not say all about the model."""
    if spec.objective not in OBJECTIVES_OF_KERNEL or model.loss is not OBJECTIVES[spec.objective].loss:
        raise NotCompiled(f"the kernel doesn't know the objective {spec.objective!r}")
    if any(has_hooks(module) or "forward" in vars(module) for module in model.module.modules()):
        raise NotCompiled("a layer has a hook, or a forward of its own")
    if (spec.input_kind == "token") != (layers[0].kind == EMBEDDING):
        raise NotCompiled("the kernel knows models of tokens that begin with an embedding, and of numbers that do not")
    # Every number is in exactly one tensor of the table, and is trained.
    tensors = [place for layer in layers for place in layer.weights if place >= 0]
    trained = sum(parameter.numel() for parameter in model.parameters)
    if len(set(tensors)) < len(tensors) or len(tensors) != len(model.parameters) or trained != model.num_weights:
        raise NotCompiled("a weight is shared, not trained, or used by no layer that the kernel knows")
    if len(layers) > MAX_LAYERS:
        raise NotCompiled(f"the kernel knows at most {MAX_LAYERS} layers, the model has {len(layers)}")
    if layers[-1].num_out != spec.num_outputs:
        raise NotCompiled(f"the model must have {spec.num_outputs} outputs, got {layers[-1].num_out}")
