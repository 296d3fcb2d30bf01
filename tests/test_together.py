"""Clients that train side by side get the bits that each gets alone."""

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.client.examples import Examples
from fedtune.client.flat_model import FlatModel
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError
from fedtune_clients import together as together_module
from fedtune_clients.models import cnn, logistic, mlp
from fedtune_clients.together import MOST_TOGETHER, num_together, train, train_together

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
    monkeypatch.setattr(together_module, "TOGETHER_WEIGHTS", 1000)
    assert num_together(make_model("logistic")) == 1000 // (64 * 4 + 4)
    assert num_together(FlatModel(mlp(SPEC))) == 1  # large
    assert num_together(make_model("cnn")) == 1  # partly autograd's
    assert num_together(FlatModel(logistic(SPEC), "meta")) == 1  # not on a CPU
    assert num_together(FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), objective="regression")) == 1
