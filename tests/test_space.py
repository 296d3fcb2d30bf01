import math

import numpy as np
import pytest

from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.domains import Choice, Domain, Integer, LogUniform, PowerOfTwo, Uniform
from fedtune.tuning.space import Hyperparameter, check_space, perturb, sample

CLIENT = {
    "learning_rate": Hyperparameter(0.1, low=0.0, low_open=True),
    "momentum": Hyperparameter(0.0, low=0.0, high=1.0, high_open=True),
    "weight_decay": Hyperparameter(0.0, low=0.0),
    "batch_size": Hyperparameter(10, low=1, integer=True),
    "epochs": Hyperparameter(1, low=1, integer=True),
    "dropout": Hyperparameter(0.0, low=0.0, high=1.0, high_open=True),
    "proximal_mu": Hyperparameter(0.0, low=0.0),
}

# The spaces of Khodak et al., NeurIPS 2021 (arXiv 2106.04502), but momentum stops
# at 0.999, since at 1 the velocity never decays.
FEDEX_CLIENT_SPACE: dict[str, Domain] = {
    "learning_rate": LogUniform(1e-4, 1.0),
    "momentum": Uniform(0.0, 0.999),
    "weight_decay": LogUniform(1e-5, 1e-1),
    "epochs": Integer(1, 5),
    "batch_size": PowerOfTwo(8, 128),
    "proximal_mu": LogUniform(1e-5, 1.0),
    "dropout": Uniform(0.0, 0.5),
}
FEDEX_SERVER_SPACE: dict[str, Domain] = {
    "learning_rate": LogUniform(0.1, 10.0),
    "momentum": Choice((0.0, 0.9)),
    "decay": LogUniform(1e-4, 1e-2),
}


def test_only_what_is_in_the_space_is_perturbed():
    config = {"learning_rate": 0.1, "epochs": 3, "batch_size": 10}
    perturbed = perturb({"learning_rate": LogUniform(1e-4, 1.0)}, config, np.random.default_rng(0), 0.1)
    assert perturbed["learning_rate"] != 0.1
    assert {name: perturbed[name] for name in ("epochs", "batch_size")} == {"epochs": 3, "batch_size": 10}
    assert config["learning_rate"] == 0.1
    with pytest.raises(KeyError):
        perturb({"dropout": Uniform(0.0, 0.5)}, config, np.random.default_rng(0), 0.1)


def test_the_order_of_a_space_does_not_matter():
    space = dict(FEDEX_CLIENT_SPACE)
    backwards = dict(reversed(space.items()))
    drawn = sample(space, np.random.default_rng(3))
    assert drawn == sample(backwards, np.random.default_rng(3))
    assert drawn.keys() == space.keys()
    assert perturb(space, drawn, np.random.default_rng(4), 0.1) == perturb(
        backwards, drawn, np.random.default_rng(4), 0.1
    )


@pytest.mark.parametrize(
    ("hyperparameter", "value", "message"),
    [
        (CLIENT["learning_rate"], 0, "it must be a finite number > 0.0, got 0"),
        (CLIENT["learning_rate"], math.inf, "it must be a finite number > 0.0, got inf"),
        (CLIENT["learning_rate"], math.nan, "it must be a finite number > 0.0, got nan"),
        (CLIENT["learning_rate"], "0.1", "it must be a finite number > 0.0, got '0.1'"),
        (CLIENT["momentum"], 1.0, "it must be a finite number >= 0.0 and < 1.0, got 1.0"),
        (CLIENT["weight_decay"], -1e-9, "it must be a finite number >= 0.0, got -1e-09"),
        (CLIENT["batch_size"], 0, "it must be a whole number >= 1, got 0"),
        (CLIENT["batch_size"], 2.0, "it must be a whole number >= 1, got 2.0"),
        (CLIENT["batch_size"], True, "it must be a whole number >= 1, got True"),
        (Hyperparameter(1.0), math.nan, "it must be a finite number, got nan"),
        (Hyperparameter(1.0, high=2.0), 3, "it must be a finite number <= 2.0, got 3"),
    ],
)
def test_a_value_outside_a_hyperparameter(hyperparameter, value, message):
    with pytest.raises(InputError) as raised:
        hyperparameter.check("it", value)
    assert str(raised.value) == message


def test_a_checked_value_is_a_float_or_an_int():
    assert type(CLIENT["learning_rate"].check("it", 1)) is float
    assert type(CLIENT["batch_size"].check("it", 1)) is int
    assert CLIENT["weight_decay"].check("it", 0) == 0.0
    with pytest.raises(InputError, match="default"):
        Hyperparameter(2.0, high=1.0)


def test_the_authors_spaces_are_allowed_to_clients_and_server():
    server = {
        "learning_rate": Hyperparameter(1.0, low=0.0, low_open=True),
        "momentum": Hyperparameter(0.0, low=0.0, high=1.0, high_open=True),
        "decay": Hyperparameter(0.0, low=0.0, high=1.0, high_open=True),
    }
    check_space(FEDEX_CLIENT_SPACE, CLIENT, "client hyperparameter")
    check_space(FEDEX_SERVER_SPACE, server, "server hyperparameter")


@pytest.mark.parametrize(
    ("name", "domain", "said"),
    [
        ("learning_rate", Uniform(0.0, 1.0), "learning_rate must be a finite number > 0.0, got 0.0"),
        ("momentum", Uniform(0.0, 1.0), "momentum must be a finite number >= 0.0 and < 1.0, got 1.0"),
        ("momentum", Choice((0.0, 0.9, 1.5)), "momentum must be a finite number >= 0.0 and < 1.0, got 1.5"),
        ("epochs", Integer(0, 3), "epochs must be a whole number >= 1, got 0"),
        ("epochs", Uniform(1, 3), "epochs must be searched by integer, power_of_two or choice"),
        ("batch_size", Choice((8, 16.5)), "batch_size must be a whole number >= 1, got 16.5"),
    ],
)
def test_a_space_that_reaches_too_far(name, domain, said):
    with pytest.raises(InputError, match="client hyperparameter") as raised:
        check_space({name: domain}, CLIENT, "client hyperparameter")
    assert said in str(raised.value)
    assert repr(domain) in str(raised.value)


def test_a_space_of_an_unknown_hyperparameter():
    with pytest.raises(UnknownNameError, match="unknown client hyperparameter 'rate'; known: batch_size, dropout"):
        check_space({"rate": Uniform(0.0, 1.0)}, CLIENT, "client hyperparameter")
