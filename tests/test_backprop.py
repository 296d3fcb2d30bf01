import numpy as np
import pytest
import torch
from torch import nn

from fedtune.client.examples import Examples
from fedtune.client.flat_model import FlatModel
from fedtune_clients import local_sgd
from fedtune_clients.backprop import Backprop, Block, Dropout, Flatten, Linear, ReLU
from fedtune_clients.hyperparameters import complete
from fedtune_clients.sgd_step import SGDStep

EVERYTHING = {"momentum": 0.9, "weight_decay": 0.1, "proximal_mu": 0.3, "dropout": 0.4}


class Product(nn.Module):
    """A layer of a user's own, with a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))

    def forward(self, x):
        return x * self.weight


class Cut(nn.Module):
    """Lets no gradient through."""

    def forward(self, x):
        return x.detach()


class Twice(nn.Module):
    """Expands, so that its gradient is no memory of its own."""

    def forward(self, x):
        return x.expand(2, *x.shape).sum(0)


def linear_16(**options):
    return nn.Linear(16, 16, **options)


def tied():
    shared = linear_16()
    return nn.Sequential(nn.Flatten(), shared, nn.ReLU(), shared, nn.Linear(16, 3))


def frozen():
    model = nn.Sequential(nn.Flatten(), linear_16(), nn.Tanh(), linear_16(), nn.ReLU(), nn.Linear(16, 3))
    model[1].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    return model


def half_hooked():
    model = nn.Sequential(nn.Flatten(), linear_16(), nn.ReLU(), nn.Linear(16, 3))
    model[1].register_forward_hook(lambda module, inputs, outputs: outputs * 3)
    return model


def with_unused_weights():
    model = nn.Sequential(nn.Flatten(), linear_16(), nn.ReLU(), nn.Sequential(linear_16(), nn.ReLU()), nn.Linear(16, 3))
    for place in (1, 2, 3):
        model[place].register_parameter("unused", nn.Parameter(torch.randn(16)))
    return model


def with_an_unused_weight_beside_its_layers():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model.register_parameter("unused", nn.Parameter(torch.randn(16)))
    return model


MODELS = {
    "logistic": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(16, 3)),
    "no bias": lambda: nn.Sequential(nn.Flatten(), linear_16(bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False)),
    "in place": lambda: nn.Sequential(
        nn.Flatten(), linear_16(), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(16, 3)
    ),
    "nested": lambda: nn.Sequential(
        nn.Flatten(), nn.Sequential(linear_16(), nn.ReLU()), nn.Sequential(nn.Sequential(), nn.Linear(16, 3))
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv2d(1, 5, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 6, 2, bias=False),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(6, 3),
    ),
    "own layers": lambda: nn.Sequential(
        nn.Flatten(), Product(), linear_16(), Twice(), nn.ReLU(), Product(), nn.Tanh(), nn.Linear(16, 3), nn.Softplus()
    ),
    "rows": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Flatten(), nn.Linear(8, 3)),
    "cut": lambda: nn.Sequential(nn.Flatten(), linear_16(), Product(), Cut(), nn.Linear(16, 3)),
    "ends in dropout": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Dropout(0.0)),
    "others in place": lambda: nn.Sequential(
        nn.Flatten(), linear_16(), nn.LeakyReLU(inplace=True), linear_16(), nn.Hardtanh(inplace=True), nn.Linear(16, 3)
    ),
    "tied": tied,
    "frozen": frozen,
    "half hooked": half_hooked,
    "with unused weights": with_unused_weights,
    "with an unused weight beside its layers": with_an_unused_weight_beside_its_layers,
}


def make_examples(objective="classification", n=11):
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 4, generator=draws)
    y = torch.randn(n, 3, generator=draws) if objective == "regression" else torch.arange(n) % 3
    return Examples(x, y)


def train(model, config, *, written_out, objective="classification"):
    """As local SGD does it, for two epochs of three batches, the last of them smaller."""
    config = complete({"learning_rate": 0.2} | config)
    for layer in model.module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = config["dropout"]
    torch.manual_seed(3)
    backprop = Backprop(model, written_out=written_out)
    sgd_step = SGDStep(model.slices(model.flat), config)
    examples = make_examples(objective)
    for rows in [*torch.arange(len(examples.y)).split(4)] * 2:
        backprop.step(examples.take(rows), sgd_step)
    return model.flat.clone()


@pytest.mark.parametrize("config", [{}, {"proximal_mu": 0.3}, EVERYTHING], ids=str)
@pytest.mark.parametrize("objective", ["classification", "regression"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_out_is_what_autograd_does(name, objective, config):
    torch.manual_seed(0)
    model = FlatModel(MODELS[name](), objective=objective)
    weights = model.flat.clone()
    expected = train(model, config, written_out=False, objective=objective)
    assert not torch.equal(expected, weights)
    model.load(weights)
    written_out = train(model, config, written_out=True, objective=objective)
    torch.testing.assert_close(written_out, expected, rtol=1e-5, atol=1e-6)


def kinds(model):
    backprop = Backprop(FlatModel(model))
    return [type(block) for block in backprop._blocks]


def test_what_is_written_out():
    assert kinds(MODELS["in place"]()) == [Flatten, Linear, ReLU, Dropout, Linear]
    assert kinds(MODELS["own layers"]()) == [Flatten, Block, Linear, Block, ReLU, Block, Linear, Block]
    assert kinds(MODELS["convolutions"]()) == [Block, ReLU, Block, ReLU, Flatten, Dropout, Linear]
    assert kinds(MODELS["frozen"]()) == [Flatten, Block, ReLU, Linear]
    assert kinds(MODELS["with unused weights"]()) == [Flatten, Block, Linear]
    assert kinds(nn.Linear(16, 3)) == [Linear]


@pytest.mark.parametrize("name", ["tied", "half hooked", "with an unused weight beside its layers"])
def test_what_is_left_to_autograd_as_a_whole(name):
    assert kinds(MODELS[name]()) == [Block]


def test_a_hook_of_the_only_layer_is_called():
    model = nn.Linear(16, 3)
    model.register_forward_hook(lambda module, inputs, outputs: outputs * 3)
    assert kinds(model) == [Block]


def test_the_examples_stay_as_they_are():
    model = FlatModel(nn.Sequential(nn.Flatten(), nn.ReLU(inplace=False), nn.Linear(16, 3)))
    examples, untouched = make_examples(), make_examples()
    Backprop(model).step(examples, SGDStep(model.slices(model.flat), complete({})))
    assert torch.equal(examples.x, untouched.x)


def test_bf16_is_left_to_autograd():
    model = FlatModel(MODELS["logistic"]())
    weights = model.flat.clone()

    def trained(**options):
        rng = np.random.Generator(np.random.PCG64(0))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False, **options):
            return local_sgd.train(model, weights, make_examples(), {}, rng).clone()

    in_bf16, in_fp32 = trained(), trained(enabled=False)
    assert in_bf16.dtype == torch.float32
    torch.testing.assert_close(in_bf16, in_fp32, rtol=0, atol=1e-2)
    assert not torch.equal(in_bf16, in_fp32)
