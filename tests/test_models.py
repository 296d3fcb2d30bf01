import numpy as np
import pytest
import torch
from torch import nn

from fedtune.client.examples import Examples
from fedtune.client.flat_model import FlatModel
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError
from fedtune_clients import local_sgd
from fedtune_clients.models import cnn, logistic, lstm, mlp

MNIST = DatasetSpec((28, 28), "real", 10, 1 / 255)
TEXT = DatasetSpec((12,), "token", 81)


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


def test_the_cnn_is_the_textbooks():
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
    torch.testing.assert_close(logits, expected)
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


def test_the_lstm_has_the_published_size_but_for_torchs_second_bias():
    second_bias = 2 * 4 * 256  # two layers, four gates
    assert FlatModel(lstm(DatasetSpec((80,), "token", 80))).num_weights == 817_872 + second_bias


@pytest.mark.parametrize(("embedding", "hidden", "layers"), [(8, 32, 1), (8, 64, 2), (5, 7, 3)])
def test_options_set_the_size_of_the_lstm(embedding, hidden, layers):
    model = FlatModel(lstm(TEXT, embedding=embedding, hidden=hidden, layers=layers))
    inputs = [embedding] + [hidden] * (layers - 1)
    recurrent = sum(4 * hidden * (width + hidden + 2) for width in inputs)
    assert model.num_weights == 81 * embedding + recurrent + (hidden + 1) * 81


def test_the_lstm_is_torchs_stack_read_at_its_last_step():
    ours = lstm(TEXT, hidden=16, layers=2)
    stack = nn.LSTM(8, 16, num_layers=2)
    for layer, module in enumerate(ours.layers):
        for name, parameter in module.named_parameters():
            getattr(stack, name.replace("_l0", f"_l{layer}")).data = parameter.data
    x = torch.randint(0, 81, (5, 12))
    states, _ = stack(ours.embedding(x.t()))  # (step, example, unit)
    torch.testing.assert_close(ours(x), ours.output(states[-1]))


@pytest.mark.parametrize("which", [0, 1])
def test_every_dropout_of_the_lstm_acts_where_it_should(which):
    """Dropping all that passes a dropout layer leaves the biases alone to speak: all rows get the same logits."""
    model = lstm(TEXT, hidden=16, layers=2)
    x = torch.randint(0, 81, (5, 12))
    assert (model(x)[0] != model(x)[1]).any()
    model.dropouts[which].p = 1.0
    logits = model(x)
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))  # to rounding: rows are computed in blocks


def test_the_clients_dropout_reaches_the_lstm():
    model = FlatModel(lstm(TEXT, hidden=8, layers=2))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 81, (20, 12), generator=generator)
    examples, weights = Examples(x, x[:, 0]), model.flat.clone()
    trained = [
        local_sgd.train(model, weights, examples, {"dropout": dropout}, np.random.default_rng(0)).clone()
        for dropout in (0.0, 0.0, 0.3)
    ]
    assert [layer.p for layer in model.module.modules() if isinstance(layer, nn.Dropout)] == [0.3, 0.3]
    assert torch.equal(trained[0], trained[1])
    assert (trained[0] != trained[2]).any()


@pytest.mark.parametrize("spec", [MNIST, DatasetSpec((80,), "real", 81), DatasetSpec((4, 80), "token", 81)])
def test_the_lstm_refuses_what_is_no_row_of_tokens(spec):
    with pytest.raises(InputError, match="the model lstm needs rows of tokens, got inputs of kind"):
        lstm(spec)


@pytest.mark.parametrize("option", ["embedding", "hidden", "layers"])
def test_options_of_the_lstm_are_checked(option):
    with pytest.raises(InputError, match=rf"model.{option} must be a whole number >= 1, got 0"):
        lstm(TEXT, **{option: 0})
