from types import SimpleNamespace

import numpy as np
import pytest

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


def mixes_up_configs(model, weights, examples, configs, rngs):
    return local_sgd.train_together(model, weights, examples, configs[::-1], rngs)


def mixes_up_streams(model, weights, examples, configs, rngs):
    return local_sgd.train_together(model, weights, examples, configs, rngs[::-1])


def forgets_one(model, weights, examples, configs, rngs):
    return local_sgd.train_together(model, weights, examples, configs, rngs)[:-1]


def rounds_otherwise(model, weights, examples, configs, rngs):
    return [row + 1e-7 for row in local_sgd.train_together(model, weights, examples, configs, rngs)]


@pytest.mark.parametrize("train_together", [mixes_up_configs, mixes_up_streams, forgets_one, rounds_otherwise])
def test_clients_that_train_together_must_get_the_bits_of_each_alone(train_together):
    broken = SimpleNamespace(
        HYPERPARAMETERS=local_sgd.HYPERPARAMETERS,
        train=local_sgd.train,
        train_together=train_together,
        num_together=local_sgd.num_together,
    )
    with pytest.raises(AssertionError, match=r"^train_together must give each client the bits that train gives it$"):
        check_client(broken)


def test_a_train_together_that_does_not_go():
    def train_together(model, weights, examples, configs, rngs):
        return [each.x for each in examples]

    broken = SimpleNamespace(HYPERPARAMETERS=local_sgd.HYPERPARAMETERS, train=local_sgd.train)
    broken.train_together = train_together
    message = "a program with train_together must have num_together too; train_together must take several clients; it"
    with pytest.raises(AssertionError, match=f"^{message} raised AttributeError"):
        check_client(broken)
