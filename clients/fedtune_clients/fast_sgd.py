"""The fast forms of `fedtune_clients.local_sgd.client_update`, for one client at a time.

If the model carries a compiled form, the kernel trains it (`fedtune_clients.compiled`). Otherwise torch does, with
backpropagation written out (`fedtune_clients.backprop`), and so is the step of SGD (`fedtune_clients.sgd_step`). The
numbers at the ends of lines are the line numbers of ClientUpdate.
"""

import weakref

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtune.client import Config, Examples, FlatModel, StoredExamples
from fedtune_clients.backprop import Backprop
from fedtune_clients.hyperparameters import complete
from fedtune_clients.sgd_step import SGDStep


def train(
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    examples: Examples | StoredExamples,
    config: Config,
    rng: np.random.Generator,
) -> Float[Tensor, "weight"]:
    """The weights after local SGD from `weights` on `examples`: `model.flat`, valid until the model is next used.

    They depend on the arguments alone, not on what the model did before. What `config` leaves out keeps its default.
    """
    values = complete(config)
    autocasts = torch.is_autocast_enabled(model.flat.device.type)
    if model.compiled is not None and not autocasts:
        return model.compiled.train(weights, examples, values, rng)
    prepare(model.module, values["dropout"], seed=int(rng.integers(2**63)))
    model.load(weights)
    backprop = _backprop(model, autocasts)
    sgd_step = SGDStep(model.slices(model.flat), values)
    for _ in range(int(values["epochs"])):  # 1
        order = torch.from_numpy(rng.permutation(examples.num_examples))
        for batch in torch.split(order, int(values["batch_size"])):  # 2, 3
            backprop.step(examples.take(batch), sgd_step)  # 4
    return model.flat  # 5


def prepare(module: nn.Module, dropout: float, seed: int) -> None:
    """Puts the module into training mode, sets `p` of its nn.Dropout layers, and seeds what its layers draw."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    if next(module.parameters()).is_cpu:
        torch.default_generator.manual_seed(seed)  # 200 times as fast as torch.manual_seed, which seeds every device
    else:
        torch.manual_seed(seed)


def _backprop(model: FlatModel, autocasts: bool) -> Backprop:
    """The model's backpropagation, made once. Under autocast it is autograd's, since autocast acts on nothing else."""
    known = _BACKPROPS.setdefault(model, {})
    if autocasts not in known:
        known[autocasts] = Backprop(model, written_out=not autocasts)
    return known[autocasts]


_BACKPROPS: weakref.WeakKeyDictionary[FlatModel, dict[bool, Backprop]] = weakref.WeakKeyDictionary()
