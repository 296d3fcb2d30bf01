import pytest
import torch
from torch import nn

from fedtune.data.federated_dataset import DatasetSpec
from fedtune.errors import InputError
from fedtune.flat_model import FlatModel
from fedtune_clients.models import cnn, logistic, mlp

MNIST = DatasetSpec((28, 28), "real", 10, 1 / 255)


@pytest.mark.parametrize(
    ("make", "num_weights"),
    [
        (logistic, 784 * 10 + 10),
        (mlp, 199_210),  # McMahan et al. 2017, section 3
        (cnn, 1_663_370),  # McMahan et al. 2017, section 3
    ],
)
def test_the_number_of_parameters_is_the_published_one(make, num_weights):
    assert FlatModel(make(MNIST)).num_weights == num_weights


def test_the_cnn_for_femnist_has_the_size_of_leafs():
    assert FlatModel(cnn(DatasetSpec((28, 28), "real", 62), dense=2048)).num_weights == 6_603_710


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (logistic, [(28, 28), (8, 8), (3, 6, 5), (7,)]),
        (mlp, [(28, 28), (8, 8), (3, 6, 5), (7,)]),
        (cnn, [(28, 28), (8, 8), (1, 28, 28), (3, 32, 32), (3, 6, 5), (4, 4)]),
    ],
)
def test_logits_for_every_form_of_input(make, shapes):
    for shape in shapes:
        assert make(DatasetSpec(shape, "real", 5))(torch.randn(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize(("make", "layers"), [(logistic, 1), (mlp, 2), (cnn, 1)])
def test_dropout_layers_are_there_and_off(make, layers):
    dropouts = [layer for layer in make(MNIST).modules() if isinstance(layer, nn.Dropout)]
    assert [layer.p for layer in dropouts] == [0.0] * layers


def test_options_set_the_widths():
    assert FlatModel(mlp(MNIST, hidden=[30])).num_weights == 785 * 30 + 31 * 10
    assert FlatModel(cnn(MNIST, dense=7)).num_weights == 26 * 32 + (25 * 32 + 1) * 64 + 3137 * 7 + 8 * 10


def test_the_cnn_is_the_textbooks_bit_for_bit():
    textbook = nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 32, 5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    ours = cnn(DatasetSpec((8, 8), "real", 10))
    for mine, theirs in zip(ours.parameters(), textbook.parameters(), strict=True):
        mine.data = theirs.data
    x = torch.randn(6, 8, 8).relu()  # with ties in the pools, as in images with a blank ground
    logits, expected = ours(x), textbook(x)
    assert torch.equal(logits, expected)
    gradients = torch.autograd.grad(logits.square().sum(), list(ours.parameters()))
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(textbook.parameters()))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("shape", [(784,), (3, 2), (28, 28, 1), (1, 3, 28, 28)])
def test_the_cnn_refuses_what_is_no_image(shape):
    with pytest.raises(InputError, match="the model cnn needs images of shape"):
        cnn(DatasetSpec(shape, "real", 10))


@pytest.mark.parametrize("make", [logistic, mlp, cnn])
def test_tokens_are_refused(make):
    with pytest.raises(InputError, match="needs inputs of kind 'real', got 'token'"):
        make(DatasetSpec((28, 28), "token", 10))


def test_widths_are_checked():
    with pytest.raises(InputError, match=r"model.hidden must be a whole number >= 1, got 0"):
        mlp(MNIST, hidden=[200, 0])
    with pytest.raises(InputError, match=r"model.dense must be a whole number >= 1, got -1"):
        cnn(MNIST, dense=-1)
