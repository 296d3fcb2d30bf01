import copy
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
from fedtune_clients import local_sgd
from fedtune_clients.local_sgd import HYPERPARAMETERS, MOST_TOGETHER, num_together, train, train_together
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


def run(model, weights, examples, config, seed=0):
    return train(model, weights, examples, config, generator(seed)).clone()


def plain_loop(model, weights, examples, config, seed=0):
    """The same training as anyone would write it: a copy of the model, torch.optim, FedProx's term in the loss."""
    config = {name: hyperparameter.default for name, hyperparameter in HYPERPARAMETERS.items()} | config
    module = copy.deepcopy(model.module)
    module.load_state_dict(model.state_dict(weights))
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    sent = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(
        parameters, config["learning_rate"], config["momentum"], weight_decay=config["weight_decay"]
    )
    rng = generator(seed)
    rng.integers(2**63)  # the seed for dropout
    module.train()
    for _ in range(config["epochs"]):
        order = rng.permutation(len(examples.y))
        for start in range(0, len(order), config["batch_size"]):
            batch = order[start : start + config["batch_size"]]
            loss = cross_entropy(module(examples.x[batch]), examples.y[batch])
            if config["proximal_mu"]:
                distance = sum((p - s).square().sum() for p, s in zip(parameters, sent, strict=True))
                loss = loss + config["proximal_mu"] / 2 * distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return FlatModel(module).flat


# 23 examples: batches of 5 leave 3 for the last one, batches of 40 are all the examples at once.
SETTINGS = [
    {"momentum": momentum, "weight_decay": weight_decay, "proximal_mu": mu, "epochs": epochs, "batch_size": batch_size}
    for momentum, weight_decay, mu, epochs, batch_size in itertools.product(
        (0.0, 0.9), (0.0, 0.01), (0.0, 0.3), (1, 2), (5, 40)
    )
]


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_equals_torch_optim(config):
    model, examples = make_model(), make_data()
    weights = model.flat.clone()
    trained = run(model, weights, examples, config)
    torch.testing.assert_close(trained, plain_loop(model, weights, examples, config), rtol=1e-5, atol=1e-6)
    assert not torch.equal(trained, weights)


def test_one_step_of_logistic_regression_by_hand():
    model, examples = make_model("logistic"), make_data()
    weight, bias = (part.double().numpy().copy() for part in model.slices(model.flat))
    x, y = examples.x.double().numpy().reshape(23, 64), examples.y.numpy()
    scores = np.exp(x @ weight.T + bias)
    residual = (
        scores / scores.sum(1, keepdims=True) - np.eye(4)[y]
    )  # softmax minus the label: the gradient by the logit
    trained = run(model, model.flat, examples, {"learning_rate": 0.2, "batch_size": 23})
    trained_weight, trained_bias = model.slices(trained)
    assert trained_weight.numpy() == pytest.approx(weight - 0.2 * residual.T @ x / 23, abs=1e-6)
    assert trained_bias.numpy() == pytest.approx(bias - 0.2 * residual.mean(0), abs=1e-6)


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
    expected = plain_loop(model, weights, examples, config)
    torch.testing.assert_close(run(model, weights, examples, config), expected, rtol=1e-5, atol=1e-6)


def test_weight_decay_shrinks_a_parameter_that_the_loss_does_not_depend_on():
    model = FlatModel(Awkward())
    unused, frozen = (model.module.get_parameter(name).detach().clone() for name in ("unused", "frozen"))
    run(model, model.flat, make_data(10), {"weight_decay": 0.5, "learning_rate": 0.1, "batch_size": 10})
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


@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn"])
def test_every_hyperparameter_moves_every_model(name):
    assert CHANGES.keys() == HYPERPARAMETERS.keys()
    model, examples = make_model(name), make_data()
    weights = model.flat.clone()
    plain = run(model, weights, examples, {})
    for hyperparameter, value in CHANGES.items():
        changed = run(model, weights, examples, {hyperparameter: value})
        for part, changed_part in zip(model.slices(plain), model.slices(changed), strict=True):
            assert not torch.equal(part, changed_part), hyperparameter


def test_what_is_left_out_keeps_its_default():
    model, examples = make_model(), make_data()
    weights = model.flat.clone()
    defaults = {name: hyperparameter.default for name, hyperparameter in HYPERPARAMETERS.items()}
    assert torch.equal(run(model, weights, examples, {}), run(model, weights, examples, defaults))


@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn"])
def test_the_same_seed_gives_the_same_bits_whatever_ran_before(name):
    model, other, examples = make_model(name), make_model(name), make_data()
    weights = model.flat.clone()
    config = {"dropout": 0.4, "momentum": 0.9, "epochs": 2}
    first = run(model, weights, examples, config)
    run(model, torch.full_like(weights, torch.nan), make_data(9, seed=1), {"dropout": 0.1}, seed=5)
    model.module.eval()
    torch.rand(17)
    assert torch.equal(run(model, weights, examples, config), first)
    assert torch.equal(run(other, weights, examples, config), first)
    assert not torch.equal(run(model, weights, examples, config, seed=1), first)


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


def test_dropout_drops_the_share_it_is_told():
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


def test_the_weights_may_be_the_models_own():
    model, examples = make_model(), make_data()
    weights = model.flat.clone()
    config = {"proximal_mu": 0.5, "momentum": 0.9, "epochs": 2}
    expected = run(model, weights, examples, config)
    model.load(weights)
    assert torch.equal(run(model, model.flat, examples, config), expected)


def test_the_weights_that_were_sent_stay_as_they_were():
    model, examples = make_model(), make_data()
    weights = model.flat.clone()
    sent = weights.clone()
    run(model, sent, examples, {"proximal_mu": 0.5})
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


# Clients of unequal sizes, whose batches end at different steps; the last has all defaults.
GROUP = (
    (23, {"learning_rate": 0.1, "batch_size": 5, "epochs": 2, "momentum": 0.9, "dropout": 0.3}),
    (1, {"learning_rate": 0.3, "batch_size": 5, "epochs": 3, "weight_decay": 0.1}),
    (7, {"learning_rate": 0.2, "batch_size": 7, "proximal_mu": 0.5, "dropout": 0.1}),
    (40, {"learning_rate": 0.05, "batch_size": 5, "momentum": 0.5, "weight_decay": 0.01, "proximal_mu": 0.2}),
    (23, {"learning_rate": 0.15, "batch_size": 20, "epochs": 4, "dropout": 0.6, "momentum": 0.3}),
    (40, {"learning_rate": 0.15, "batch_size": 20, "epochs": 4}),
    (12, {}),
)
TOGETHER = {
    "logistic": logistic,
    "mlp": lambda spec: mlp(spec, hidden=[9, 8]),
    "wide": lambda spec: mlp(spec, hidden=[128]),
    "no bias": lambda spec: nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=False), nn.ReLU(), nn.Linear(5, 4)),
    "rows": lambda spec: nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(24, 4)),
    "dropout first and last": lambda spec: nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(64, 4), nn.Dropout()),
}


@pytest.mark.parametrize("clients", [GROUP, GROUP[::-1], GROUP[2:5] * 3, [(40, {"batch_size": 20})] * 5], ids=len)
@pytest.mark.parametrize("name", TOGETHER)
def test_clients_that_train_together_get_the_bits_of_each_alone(name, clients):
    torch.manual_seed(0)
    model = FlatModel(TOGETHER[name](SPEC))
    assert num_together(model) >= len(clients)
    weights = model.flat.clone()
    data = [make_data(size, seed) for seed, (size, _) in enumerate(clients)]
    configs = [config for _, config in clients]
    together = train_together(model, weights, data, configs, list(map(generator, range(len(clients)))))
    for row, examples, (seed, config) in zip(together, data, enumerate(configs), strict=True):
        alone = run(model, weights, examples, config, seed)
        assert torch.equal(row, alone)
        assert not torch.equal(row, weights)


def test_a_client_of_nan_weights_leaves_those_beside_it_alone():
    model = make_model()
    weights = model.flat.clone()
    wild, tame = {"learning_rate": 1e30}, {"learning_rate": 0.1}
    data, configs = [make_data(seed=seed) for seed in range(3)], [wild, tame, wild]
    lost, kept, _ = train_together(model, weights, data, configs, list(map(generator, range(3))))
    assert not lost.isfinite().all()
    assert torch.equal(kept, run(model, weights, data[1], tame, 1))


def test_batches_are_filled_up_to_those_of_similar_sizes_alone(monkeypatch):
    """A client of many examples a batch must not cost all beside it as much memory."""
    model = make_model()
    filled = []

    def new_zeros(self, *shape):
        filled.append(shape)
        return torch.zeros(shape)

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    sizes = [900, 700, 40, 39, 10, 9, 1]
    data = [make_data(size) for size in sizes]
    configs = [{"batch_size": 1000}] * len(sizes)
    together = train_together(model, model.flat.clone(), data, configs, list(map(generator, range(len(sizes)))))
    assert {num_clients for num_clients, *_ in filled} == {3}  # of 40, 39 and 10; the others step alone
    assert {length for _, length, _ in filled} <= set(range(40, 49))
    monkeypatch.undo()
    for seed, row in enumerate(together):
        assert torch.equal(row, run(model, make_model().flat.clone(), data[seed], configs[seed], seed))


def test_a_model_that_is_partly_autograds_takes_one_client():
    model = make_model("cnn")
    with pytest.raises(InputError, match="clients of this model must train one at a time, got 2"):
        train_together(model, model.flat.clone(), [make_data()] * 2, [{}] * 2, [generator(), generator()])


def test_how_many_train_together(monkeypatch):
    assert num_together(make_model("logistic")) == MOST_TOGETHER
    monkeypatch.setattr(local_sgd, "TOGETHER_WEIGHTS", 1000)
    assert num_together(make_model("logistic")) == 1000 // (64 * 4 + 4)
    assert num_together(FlatModel(mlp(SPEC))) == 1  # large
    assert num_together(make_model("cnn")) == 1  # partly autograd's
    assert num_together(FlatModel(logistic(SPEC), "meta")) == 1  # not on a CPU
    assert num_together(FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), objective="regression")) == 1
