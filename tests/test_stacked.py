"""The stacked form of a model gives each client the outputs and the gradients that it would get alone."""

import pytest
import torch
from torch import nn

from fedtune.client import stacked_layers
from fedtune.client.flat_model import FlatModel
from fedtune.client.stacked import is_stackable, outputs_of_each, stacked_outputs
from fedtune.data.spec import DatasetSpec
from fedtune_clients import models

IMAGES, TEXT = DatasetSpec((8, 8), "real", 4), DatasetSpec((7,), "token", 5)


class Marked(nn.Module):
    """A module as a user may write it: it returns an output for each step of its LSTM, which has no biases."""

    row_by_row = True

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(5, 3), nn.Linear(4, 5)
        self.lstm = nn.LSTM(3, 4, batch_first=True, bias=False)

    def forward(self, x):
        return self.linear(self.lstm(self.embedding(x))[0])


class Unmarked(Marked):
    pass


class WithWeight(nn.Linear):
    row_by_row = True


def tied():
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Sigmoid(), first)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 0), bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 2, stride=2),
        nn.Flatten(),
    )


def frozen():
    module = models.mlp(IMAGES, hidden=[6])
    module[1].weight.requires_grad_(False)
    return module


MODELS = {
    "logistic": (lambda: models.logistic(IMAGES), IMAGES),
    "mlp": (lambda: models.mlp(IMAGES, hidden=[9, 8]), IMAGES),
    "cnn": (lambda: models.cnn(IMAGES, dense=6), IMAGES),
    "convolutions": (convolutions, DatasetSpec((2, 9, 8), "real", 4)),
    "lstm": (lambda: models.lstm(TEXT, hidden=6), TEXT),
    "marked": (Marked, TEXT),
    "tied": (tied, IMAGES),
    "frozen": (frozen, IMAGES),
    "only a layer": (lambda: nn.Linear(8, 3), IMAGES),
}


def make(name):
    """The model, three clients' weights, and their examples."""
    torch.manual_seed(0)
    make_module, spec = MODELS[name]
    model = FlatModel(make_module())
    weights = model.flat + 0.3 * torch.randn(3, model.num_weights)
    shape = (3, 5, *spec.input_shape)
    return model, weights, torch.randint(5, shape) if spec.input_kind == "token" else torch.randn(shape)


def gradients(model, weights, x, outputs_of):
    parameters = [parameter.clone().requires_grad_() for parameter in model.slices(weights)]
    outputs = outputs_of(weights, x, parameters)
    return outputs, torch.autograd.grad(outputs.square().sum(), parameters)


def assert_close(actual, expected):
    for own, other in zip(actual, expected, strict=True):
        assert own.shape == other.shape
        assert (own - other).norm() <= 1e-5 * other.norm()


def one_by_one(model):
    return lambda weights, x, parameters: torch.stack(
        [model.outputs(*row) for row in zip(weights, x, zip(*parameters, strict=True), strict=True)]
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_and_the_gradients_are_those_of_each_client(name):
    model, weights, x = make(name)
    assert is_stackable(model)
    outputs, by_weights = gradients(model, weights, x, lambda *arguments: stacked_outputs(model, *arguments))
    expected, expected_by_weights = gradients(model, weights, x, one_by_one(model))
    assert min(gradient.norm() for gradient in expected_by_weights) > 1e-3  # so that agreement says something
    assert_close([outputs, *by_weights], [expected, *expected_by_weights])


@pytest.mark.parametrize("name", ["cnn", "convolutions"])
def test_convolutions_by_products_are_the_same(name, monkeypatch):
    """On a CPU they are not used."""
    model, weights, x = make(name)
    expected = gradients(model, weights, x, lambda *arguments: stacked_outputs(model, *arguments))
    monkeypatch.setattr(stacked_layers, "_convolved_apart", stacked_layers._convolved_by_products)
    actual = gradients(model, weights, x, lambda *arguments: stacked_outputs(model, *arguments))
    assert not torch.equal(actual[0], expected[0])
    assert_close([actual[0], *actual[1]], [expected[0], *expected[1]])


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2)),
        nn.Conv2d(2, 4, 3, dilation=2),
        nn.Conv2d(2, 4, 3, padding="same"),
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        nn.Sequential(nn.Flatten(0), nn.Linear(4, 4)),
        nn.Embedding(5, 3, padding_idx=0),
        nn.LSTM(3, 4),
        nn.LSTM(3, 4, num_layers=2, batch_first=True),
        nn.LSTM(3, 4, bidirectional=True, batch_first=True),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        Unmarked(),
        WithWeight(3, 4),
        type("Subclass", (nn.Linear,), {})(3, 4),
    ],
    ids=lambda module: str(module).replace("\n", " "),
)
def test_other_layers_have_no_stacked_form(module):
    assert not is_stackable(FlatModel(module))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_with_a_hook_has_no_stacked_form(register):
    module = nn.Sequential(nn.Linear(3, 4))
    getattr(module[0], register)(lambda *arguments: None)
    assert not is_stackable(FlatModel(module))


def test_a_model_without_a_stacked_form_is_left_to_vmap():
    torch.manual_seed(0)
    model = FlatModel(nn.Sequential(nn.Linear(4, 3), nn.Softplus()))
    weights, x = torch.randn(3, model.num_weights), torch.randn(3, 5, 4)
    assert not is_stackable(model)
    expected = torch.stack([model.outputs(*row) for row in zip(weights, x, strict=True)])
    torch.testing.assert_close(outputs_of_each(model, weights, x), expected)


def test_a_token_that_is_in_no_table_is_an_error_and_the_layers_are_as_before():
    """It is not the first token of the next client."""
    model, weights, x = make("lstm")
    x[0, 0, 0] = TEXT.num_classes
    with pytest.raises(IndexError):
        stacked_outputs(model, weights, x)
    assert not any("forward" in vars(module) for module in model.module.modules())
