import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedtune.client.examples import Examples
from fedtune.client.flat_model import FlatModel
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError, UnknownNameError
from fedtune_clients.local_sgd import HYPERPARAMETERS, client_update, train
from fedtune_clients.models import cnn, logistic, mlp

SPEC = DatasetSpec((8, 8), "real", 4)


def make_model(name="mlp", seed=0):
    torch.manual_seed(seed)
    make = {"logistic": logistic, "mlp": lambda spec: mlp(spec, hidden=[9, 8]), "cnn": lambda spec: cnn(spec, dense=6)}
    return FlatModel(make[name](SPEC))


def make_data(n=23, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 8, 8)).astype(np.float32)
    return Examples(torch.from_numpy(x), torch.from_numpy(rng.integers(0, 4, n)))


def generator(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def run(model, weights, examples, config, seed=0, form=train):
    return form(model, weights, examples, config, generator(seed)).clone()


both_forms = pytest.mark.parametrize("form", [client_update, train], ids=lambda form: form.__name__)


def softmax_regression(weight, bias, x, y, config, rng):
    """The weight and the bias that local SGD gives, with the gradients worked out by hand, in float64."""
    w, velocity = np.hstack([weight, bias[:, None]]), 0.0
    sent, x = w.copy(), np.hstack([x, np.ones((len(x), 1))])
    rng.integers(2**63)  # the seed for dropout
    for _ in range(config["epochs"]):
        order = rng.permutation(len(y))
        for start in range(0, len(y), config["batch_size"]):
            batch = order[start : start + config["batch_size"]]
            scores = np.exp(x[batch] @ w.T)
            residual = scores / scores.sum(1, keepdims=True) - np.eye(4)[y[batch]]  # the gradient by the logits
            gradient = residual.T @ x[batch] / len(batch)
            gradient += config["weight_decay"] * w + config["proximal_mu"] * (w - sent)
            velocity = config["momentum"] * velocity + gradient
            w = w - config["learning_rate"] * velocity
    return w[:, :-1], w[:, -1]


# 23 examples: batches of 5 leave 3 for the last one, batches of 40 are all the examples at once.
SETTINGS = [
    {"momentum": momentum, "weight_decay": weight_decay, "proximal_mu": mu, "epochs": epochs, "batch_size": batch_size}
    for momentum, weight_decay, mu, epochs, batch_size in itertools.product(
        (0.0, 0.9), (0.0, 0.01), (0.0, 0.3), (1, 2), (5, 40)
    )
]


@both_forms
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_softmax_regression_by_hand(config, form):
    model, examples = make_model("logistic"), make_data()
    weight, bias = (part.double().numpy().copy() for part in model.slices(model.flat))
    x, y = examples.x.double().numpy().reshape(23, 64), examples.y.numpy()
    expected = softmax_regression(weight, bias, x, y, {"learning_rate": 0.1} | config, generator())
    trained = model.slices(run(model, model.flat.clone(), examples, config, form=form))
    for part, other, before in zip(trained, expected, (weight, bias), strict=True):
        assert part.numpy() == pytest.approx(other, abs=1e-5)
        assert abs(other - before).max() > 1e-3  # so that agreement says something


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_the_fast_form_is_the_plain_one_to_rounding(config, dropout):
    model, examples = make_model(), make_data()
    weights = model.flat.clone()
    config = config | {"dropout": dropout}
    trained = run(model, weights, examples, config)
    expected = run(model, weights, examples, config, form=client_update)
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(trained, weights)


class Plain(nn.Module):
    """Of a kind that is never written out."""

    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(64, 9), nn.Dropout(), nn.Linear(9, 4)

    def forward(self, x):
        return self.last(self.dropout(self.first(x.flatten(1)).tanh()))


# What needs no other order of operations: neither weight decay nor FedProx's term.
SAME_ORDER = [{}, {"momentum": 0.9}, {"momentum": 0.9, "dropout": 0.4, "epochs": 2, "batch_size": 5}]


@pytest.mark.parametrize("config", SAME_ORDER, ids=str)
def test_the_fast_form_has_the_bits_of_the_plain_one_if_all_is_left_to_autograd(config):
    torch.manual_seed(0)
    model = FlatModel(Plain(), objective="regression")
    examples = Examples(make_data().x, torch.randn(23, 4))
    weights = model.flat.clone()
    trained = run(model, weights, examples, config)
    assert torch.equal(trained, run(model, weights, examples, config, form=client_update))
    assert not torch.equal(trained, weights)


@pytest.mark.parametrize("config", SAME_ORDER, ids=str)
@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn"])
def test_the_fast_form_has_the_bits_of_the_plain_one_under_autocast(name, config):
    model, examples = make_model(name), make_data()
    weights = model.flat.clone()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        trained = run(model, weights, examples, config)
        assert torch.equal(trained, run(model, weights, examples, config, form=client_update))
    assert not torch.equal(trained, weights)


class Awkward(nn.Module):
    """Gradients that are one tensor for two biases, that are no contiguous memory, and that do not exist."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 64))
        self.bias, self.second_bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.slope = nn.Parameter(torch.randn(3, 2))
        self.unused = nn.Parameter(torch.randn(7))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)

    def forward(self, x):
        weight = self.weight.permute(2, 0, 1)[..., 0] + self.weight[:, 1].t()
        return x.flatten(1) @ weight * self.slope.sum() + (self.bias + self.second_bias)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_odd_gradients(momentum, mu):
    model, examples = FlatModel(Awkward()), make_data()
    loss = cross_entropy(model.module(examples.x), examples.y)
    plain = torch.autograd.grad(loss, model.parameters, allow_unused=True)
    assert plain[1].data_ptr() == plain[2].data_ptr()
    assert not plain[3].is_contiguous()
    assert plain[4] is None
    weights = model.flat.clone()
    config = {"momentum": momentum, "proximal_mu": mu, "learning_rate": 0.01}
    expected = run(model, weights, examples, config, form=client_update)
    torch.testing.assert_close(run(model, weights, examples, config), expected, rtol=1e-5, atol=1e-6)


@both_forms
def test_weight_decay_shrinks_a_parameter_that_the_loss_does_not_depend_on(form):
    model = FlatModel(Awkward())
    unused, frozen = (model.module.get_parameter(name).detach().clone() for name in ("unused", "frozen"))
    run(model, model.flat, make_data(10), {"weight_decay": 0.5, "learning_rate": 0.1, "batch_size": 10}, form=form)
    torch.testing.assert_close(model.module.unused.detach(), unused * (1 - 0.1 * 0.5))
    assert torch.equal(model.module.frozen, frozen)


CHANGES = {
    "learning_rate": 0.2,
    "momentum": 0.5,
    "weight_decay": 0.1,
    "batch_size": 7,
    "epochs": 2,
    "dropout": 0.3,
    "proximal_mu": 0.7,
}


@both_forms
@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn"])
def test_every_hyperparameter_moves_every_model(name, form):
    assert CHANGES.keys() == HYPERPARAMETERS.keys()
    model, examples = make_model(name), make_data()
    weights = model.flat.clone()
    default = run(model, weights, examples, {}, form=form)
    for hyperparameter, value in CHANGES.items():
        changed = run(model, weights, examples, {hyperparameter: value}, form=form)
        for part, changed_part in zip(model.slices(default), model.slices(changed), strict=True):
            assert not torch.equal(part, changed_part), hyperparameter


def test_what_is_left_out_keeps_its_default():
    model, examples = make_model(), make_data()
    weights = model.flat.clone()
    defaults = {name: hyperparameter.default for name, hyperparameter in HYPERPARAMETERS.items()}
    assert torch.equal(run(model, weights, examples, {}), run(model, weights, examples, defaults))


@both_forms
@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn"])
def test_the_same_seed_gives_the_same_bits_whatever_ran_before(name, form):
    model, other, examples = make_model(name), make_model(name), make_data()
    weights = model.flat.clone()
    config = {"dropout": 0.4, "momentum": 0.9, "epochs": 2}
    first = run(model, weights, examples, config, form=form)
    run(model, torch.full_like(weights, torch.nan), make_data(9, seed=1), {"dropout": 0.1}, seed=5, form=form)
    model.module.eval()
    torch.rand(17)
    assert torch.equal(run(model, weights, examples, config, form=form), first)
    assert torch.equal(run(other, weights, examples, config, form=form), first)
    assert not torch.equal(run(model, weights, examples, config, seed=1, form=form), first)


def test_batch_norm_starts_from_the_weights_too():
    model = FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4, momentum=None)))
    weights = model.flat.clone()
    examples = make_data(20)
    first = run(model, weights, examples, {})
    assert torch.equal(run(model, weights, examples, {}), first)
    # The running statistics are part of the answer: with momentum=None the mean of what the two batches of 10 had.
    batch_means = run(model, weights, examples, {"learning_rate": 1e-30})[-8:-4]
    linear = model.module[1]
    torch.testing.assert_close(batch_means, linear(examples.x.flatten(1)).mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.equal(first[-8:-4], weights[-8:-4])


def test_dropout_does_not_shift_the_batches():
    model, examples = make_model(), make_data()
    weights = model.flat.clone()
    # At this rate a unit is dropped with a chance below 1e-8, so only other batches could make a difference.
    barely = run(model, weights, examples, {"dropout": 1e-12, "epochs": 2})
    torch.testing.assert_close(barely, run(model, weights, examples, {"epochs": 2}), rtol=1e-5, atol=1e-6)


def test_dropout_drops_its_share_of_the_units():
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append((x == 0).float().mean().item())
            return x

    model = FlatModel(nn.Sequential(nn.Flatten(), nn.Dropout(0.0), Watch(), nn.Linear(64, 4)))
    run(model, model.flat, make_data(1000), {"dropout": 0.3, "batch_size": 1000})
    assert seen[0] == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 64_000) ** 0.5)  # false alarm below 1e-6


def test_fedprox_keeps_near_the_weights_that_were_sent():
    model, examples = make_model(), make_data()
    weights = model.flat.clone()
    config = {"epochs": 5, "learning_rate": 0.1}
    distances = [
        (run(model, weights, examples, config | {"proximal_mu": mu}) - weights).norm() for mu in (0.0, 0.1, 1.0, 5.0)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0] / 2


@both_forms
def test_the_weights_may_be_the_models_own(form):
    model, examples = make_model(), make_data()
    weights = model.flat.clone()
    config = {"proximal_mu": 0.5, "momentum": 0.9, "epochs": 2}
    expected = run(model, weights, examples, config, form=form)
    model.load(weights)
    assert torch.equal(run(model, model.flat, examples, config, form=form), expected)


@both_forms
def test_the_weights_that_were_sent_stay_as_they_were(form):
    model, examples = make_model(), make_data()
    weights = model.flat.clone()
    sent = weights.clone()
    run(model, sent, examples, {"proximal_mu": 0.5}, form=form)
    assert torch.equal(sent, weights)


@pytest.mark.parametrize("config", [{}, {"momentum": 0.9, "proximal_mu": 0.1, "weight_decay": 0.1, "dropout": 0.5}])
def test_nan_weights_are_an_outcome_not_an_exception(config):
    model, examples = make_model(), make_data()
    weights = torch.full_like(model.flat, torch.nan)
    assert run(model, weights, examples, config).isnan().all()
    exploded = run(model, make_model(seed=1).flat, examples, config | {"learning_rate": 1e30, "epochs": 3})
    assert not exploded.isfinite().all()


def test_an_unknown_hyperparameter_is_named_with_the_known_ones():
    model = make_model()
    with pytest.raises(
        UnknownNameError, match=r"unknown client hyperparameter 'lr'; known: batch_size, .*learning_rate"
    ):
        run(model, model.flat, make_data(), {"lr": 0.1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("epochs", 0),
        ("dropout", 1.0),
        ("proximal_mu", -1.0),
    ],
)
def test_a_value_outside_its_range_is_an_input_error(name, value):
    model = make_model()
    with pytest.raises(InputError, match=rf"{name} must be .*, got {value}"):
        run(model, model.flat, make_data(), {name: value})
