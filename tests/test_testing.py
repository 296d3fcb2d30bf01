from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.testing import check_client, check_dataset
from fedtune.tuning.space import Hyperparameter
from fedtune_clients import local_sgd
from fedtune_datasets import digits


def test_what_fedtune_ships_passes():
    check_dataset(digits.load)
    check_dataset(digits.load, num_clients=7, seed=3)
    check_client(local_sgd)


def test_a_data_set_that_differs_each_time_fails():
    draws = np.random.default_rng(0)

    def load():
        return FederatedDataset.from_clients({"a": (draws.normal(size=(20, 2)), np.arange(20) % 2)}, name="own")

    with pytest.raises(AssertionError, match=r"^x must be the same each time it is loaded$"):
        check_dataset(load)


def test_all_that_is_wrong_is_listed():
    def load():
        return FederatedDataset.from_clients({"a": (np.full((20, 2), np.nan), np.arange(20))}, name="", num_classes=5)

    with pytest.raises(AssertionError, match=r"client 'a': x must be finite.*; client 'a': labels.*; name must not be"):
        check_dataset(load)


def program(train):
    return SimpleNamespace(
        HYPERPARAMETERS={"learning_rate": Hyperparameter(0.1, low=0.0)},
        train=lambda *arguments: train(local_sgd.train(*arguments), *arguments),
    )


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (lambda trained, model, weights, *rest: weights.add_(1), "must not change the weights it is sent"),
        (lambda trained, model, weights, examples, *rest: (examples.x.add_(1), trained)[1], "change the examples"),
        (lambda trained, *rest: trained.double(), "must return float32 of shape"),
        (
            lambda trained, *rest: trained + np.random.default_rng().random(),
            "must give the same weights for the same arguments",
        ),
        (lambda trained, model, weights, *rest: weights, "must change the weights at the default values"),
        (
            lambda trained, model, weights, examples, *rest: trained / (len(examples.y) - 1),
            "must give finite weights for a client with one example",
        ),
    ],
)
def test_a_broken_client_program_fails_for_its_fault(train, message):
    with pytest.raises(AssertionError, match=message):
        check_client(program(train))


def test_an_end_of_a_range_that_is_not_taken():
    broken = SimpleNamespace(HYPERPARAMETERS={"learning_rate": Hyperparameter(0.1, low=0.0)}, train=local_sgd.train)
    with pytest.raises(
        AssertionError, match=r"^train must take learning_rate = 0\.0, which is in its range; it raised"
    ):
        check_client(broken)


class Compiled:
    """A compiled model that trains and measures in torch; `changes` replace its functions."""

    digest = "kernel-1"

    def __init__(self, model, **changes):
        self._model = model
        vars(self).update(changes)

    def train(self, weights, examples, config, rng):
        self._model.compiled = None
        return local_sgd.train(self._model, weights, examples, config, rng)

    def measure(self, weights, examples):
        self._model.load(weights)
        self._model.module.eval()
        with torch.no_grad():
            losses, errors = self._model.measure(self._model.module(examples.all().x), examples.all().y)
        return losses.numpy(), errors.numpy()


def compiling(compile_model):
    """Local SGD with this compile_model."""
    return SimpleNamespace(
        HYPERPARAMETERS=local_sgd.HYPERPARAMETERS,
        SPACE=local_sgd.SPACE,
        train=local_sgd.train,
        compile_model=compile_model,
    )


def test_a_model_that_is_compiled_or_not_passes():
    check_client(compiling(lambda model, spec: Compiled(model)))
    check_client(compiling(lambda model, spec: "it has no such layer"))


def trains(change):
    """A compile_model whose trained weights are changed."""

    def compile_model(model, spec):
        plain = Compiled(model)
        return Compiled(model, train=lambda weights, *rest: change(plain.train(weights, *rest), weights, rest[1]))

    return compile_model


@pytest.mark.parametrize(
    ("compile_model", "message"),
    [
        (
            lambda model, spec: None,
            r"^compile_model must return a CompiledModel .* or a str, got NoneType$",
        ),
        (lambda model, spec: Compiled(model, digest=""), "must return a CompiledModel with a digest"),
        (
            trains(lambda trained, sent, config: trained + 2e-4 * (trained - sent)),
            "the weights of torch for 20 examples",
        ),
        (trains(lambda trained, sent, config: trained * float("nan")), "the weights of torch for 1 examples"),
        (
            trains(lambda trained, sent, config: trained + (trained - sent) * (config["dropout"] > 0)),
            r"^compiled, train must give the weights of torch for 20 examples with \{[^}]*'dropout': 0.25",
        ),
        (
            trains(lambda trained, sent, config: trained + 1e-5 * np.random.default_rng().random() * (trained - sent)),
            "^compiled, train must give the same weights for the same arguments",
        ),
        (
            lambda model, spec: Compiled(model, measure=lambda *arguments: Compiled(model).measure(*arguments)[::-1]),
            "compiled, measure must give the losses and errors of torch for 9 examples",
        ),
    ],
)
def test_a_model_that_is_compiled_wrongly_fails(compile_model, message):
    with pytest.raises(AssertionError, match=message):
        check_client(compiling(compile_model))
