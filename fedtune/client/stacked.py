"""The outputs of many clients at once, each client with weights of its own.

If every layer of a model has a stacked form, the outputs of all clients are a few large operations. Any other model is
left to `torch.func.vmap`, which knows most of torch's operations and finds a slow form for some of them.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import vmap

from fedtune.client.flat_model import FlatModel
from fedtune.client.stacked_layers import STACKED

# The torch modules that work on the rows of all clients, and the values that their options must have. Exact types: a
# subclass may do something else.
KNOWN: dict[type[nn.Module], dict[str, Any]] = {
    nn.Conv2d: {"groups": 1, "dilation": (1, 1), "padding_mode": "zeros"},
    nn.Dropout: {},
    nn.Embedding: {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False, "sparse": False},
    nn.Flatten: {"start_dim": 1},
    nn.Identity: {},
    nn.Linear: {},
    nn.LSTM: {"num_layers": 1, "batch_first": True, "bidirectional": False, "proj_size": 0},
    nn.MaxPool2d: {"return_indices": False},
    nn.ModuleList: {},
    nn.ReLU: {},
    nn.Sequential: {},
    nn.Sigmoid: {},
    nn.Tanh: {},
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def outputs_of_each(
    model: FlatModel, weights: Float[Tensor, "client weight"], x: Shaped[Tensor, "client example ..."]
) -> Shaped[Tensor, "client example ..."]:
    """The outputs of each client's row of the weights on the client's examples."""
    if not is_stackable(model):
        outputs: Tensor = vmap(model.outputs)(weights, x)
        return outputs
    return stacked_outputs(model, weights, x)


def stacked_outputs(
    model: FlatModel,
    weights: Float[Tensor, "client weight"],
    x: Shaped[Tensor, "client example ..."],
    parameters: Sequence[Float[Tensor, "client ..."]] = (),
) -> Shaped[Tensor, "client example ..."]:
    """The outputs of a model for which `is_stackable` is True.

    `parameters`, if given, take the place of the parameters that can be trained.
    """
    with _stacked_layers(model.module, model.named(weights, parameters)):
        outputs: Tensor = model.module(x.flatten(0, 1))
    return outputs.reshape(*x.shape[:2], *outputs.shape[1:])


def is_stackable(model: FlatModel) -> bool:
    """Whether every layer of the model has a stacked form."""
    return all(map(_is_known, model.module.modules()))


@contextmanager
def _stacked_layers(module: nn.Module, stacks: Mapping[str, Float[Tensor, "client ..."]]) -> Iterator[None]:
    """Inside the `with` block the module's layers with weights take the rows of all clients."""
    layers = [(name, layer) for name, layer in module.named_modules() if type(layer) in STACKED]
    for name, layer in layers:
        prefix = f"{name}." if name else ""
        own = {key: stacks[prefix + key] for key, _ in layer.named_parameters(remove_duplicate=False)}
        layer.forward = functools.partial(STACKED[type(layer)], layer, own)
    try:
        yield
    finally:
        for _, layer in layers:
            del layer.forward


def _is_known(module: nn.Module) -> bool:
    """Whether the module does the same for each row, and leaves its weights to the layers of STACKED.

    A class of the user's own says so by `row_by_row = True`. Its subclasses must say it again.
    """
    if any(getattr(module, hooks) for hooks in HOOKS):
        return False
    if vars(type(module)).get("row_by_row") is True:
        return not any(True for _ in module.parameters(recurse=False))
    options = KNOWN.get(type(module))
    has_padding_word = isinstance(getattr(module, "padding", None), str)  # such as "same"
    return options is not None and not has_padding_word and all(getattr(module, o) == v for o, v in options.items())
