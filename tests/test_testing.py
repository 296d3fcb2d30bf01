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
