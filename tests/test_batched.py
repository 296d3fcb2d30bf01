import numpy as np
import pytest
import torch

from fedtune.data.federated_dataset import DatasetSpec
from fedtune.flat_model import Examples, FlatModel
from fedtune_clients import local_sgd
from fedtune_clients.local_sgd import HYPERPARAMETERS, train_batched
from fedtune_clients.models import cnn, logistic, mlp

SPEC = DatasetSpec((8, 8), "real", 4)
MODELS = {
    "logistic": logistic,
    "mlp": lambda spec: mlp(spec, hidden=[9, 8]),
    "cnn": lambda spec: cnn(spec, dense=6),
}
# Every hyperparameter differs, and two clients of one batch size differ in the length of their last batch and in steps.
SIZES = (23, 1, 7, 40, 12, 5)
CONFIGS = (
    {"learning_rate": 0.1, "batch_size": 5, "epochs": 2, "momentum": 0.9, "dropout": 0.3},
    {"learning_rate": 0.3, "batch_size": 5, "epochs": 3, "weight_decay": 0.1},
    {"learning_rate": 0.2, "batch_size": 7, "proximal_mu": 0.5, "dropout": 0.1},
    {"learning_rate": 0.05, "batch_size": 5, "momentum": 0.5, "weight_decay": 0.01, "proximal_mu": 0.2},
    {"learning_rate": 0.15, "batch_size": 50, "epochs": 4, "dropout": 0.6, "momentum": 0.3},
    {},
)


def make_model(make, spec=SPEC, objective="classification"):
    torch.manual_seed(0)
    return FlatModel(make(spec), objective=objective)


def make_examples(sizes=SIZES, shape=(8, 8)):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sum(sizes), *shape)).astype(np.float32)
    return Examples(torch.from_numpy(x), torch.from_numpy(rng.integers(0, 4, sum(sizes))))


def generators(seeds):
    return [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]


def batched(model, weights, examples, sizes=SIZES, configs=CONFIGS, seeds=None):
    return train_batched(model, weights, examples, sizes, configs, generators(seeds or range(len(sizes))))


def one_by_one(model, weights, examples, sizes=SIZES, configs=CONFIGS):
    parts = [Examples(*part) for part in zip(*(tensor.split(sizes) for tensor in examples), strict=True)]
    clients = zip(parts, configs, generators(range(len(sizes))), strict=True)
    return torch.stack([local_sgd.train(model, weights, *client).clone() for client in clients])


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", MODELS)
def test_equals_local_sgd_on_ragged_clients_of_which_each_has_its_own_hyperparameters(name):
    assert {key for config in CONFIGS for key in config} == HYPERPARAMETERS.keys()
    model, examples = make_model(MODELS[name]), make_examples()
    weights = model.flat.clone()
    trained = batched(model, weights, examples)
    expected = one_by_one(model, weights, examples)
    assert (expected - weights).abs().amax(1).min() > 0.01  # so that agreement says something
    assert_close(trained, expected)
