import re

import pytest

from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.asha import ASHA
from fedtune.tuning.fedex import FedExSettings
from fedtune.tuning.one_federation import OneFederation
from fedtune.tuning.random_search import RandomSearch
from fedtune.tuning.space import LogUniform, SearchSpace
from fedtune.tuning.trial import Trial, Tuner
from fedtune.tuning.tuners import TUNERS, base_name, fedex_settings, make_tuner, uses_fedex, within_one_federation


def draw(number):
    return Trial(number, {}, (({"learning_rate": 0.1},),))


def make(name, **options):
    def compose(number, server, client):
        return Trial(number, server, ((client,),))

    space = SearchSpace({"learning_rate": LogUniform(1e-3, 1.0)}, {})
    return make_tuner(name, draw, max_rounds=81, total_rounds=405, options=options, compose=compose, space=space)


KINDS = [
    ("manual", OneFederation, "manual", False),
    ("fedex", OneFederation, "fedex", True),
    ("random", RandomSearch, "random", False),
    ("random+fedex", RandomSearch, "random", True),
    ("asha", ASHA, "asha", False),
    ("asha+fedex", ASHA, "asha", True),
]


@pytest.mark.parametrize(("name", "kind", "base", "fedex"), KINDS)
def test_the_tuners_by_name(name, kind, base, fedex):
    tuner = make(name)
    assert isinstance(tuner, Tuner)
    assert type(tuner) is kind
    assert base_name(name) == base
    assert uses_fedex(name) == fedex
    assert fedex_settings(name, {}) == (FedExSettings() if fedex else None)


def test_this_test_knows_every_tuner():
    searches = {"sha", "sha+fedex", "hyperband", "async_hyperband", "pbt", "bohb"}  # each has a test file of its own
    within = {"uniform", "rsws", "elimination", "elimination+fedex"}
    assert set(TUNERS) == {name for name, *_ in KINDS} | searches | within


@pytest.mark.parametrize("name", sorted(set(TUNERS) - {"async_hyperband"}))  # 81 is no power of its 4
def test_every_tuner_trains_within_the_rounds_and_takes_any_error(name):
    tuner = make(name)
    for error in [0.5, float("nan"), 0.2, float("inf"), 0.9, 0.1]:
        job = tuner.ask()
        if job is None:
            break
        assert job.rounds <= (405 if within_one_federation(name) else 81)
        tuner.tell(job, error)


def test_options_reach_the_tuner_and_fedex():
    options = {"reduction_factor": 9, "early_stopping_rate": 1, "num_configs": 5, "pool_size": 27, "discount": 1}
    tuner = make("asha+fedex", **options)
    assert (tuner.rung_rounds, tuner.num_configs) == ((9, 81), 5)
    assert fedex_settings("asha+fedex", options) == FedExSettings(pool_size=27, discount=1.0)
    assert make("random", num_configs=3).num_configs == 3


@pytest.mark.parametrize("name", ["shah", "fedex+asha", "manual+fedex", ""])
def test_an_unknown_tuner_lists_the_known_ones(name):
    with pytest.raises(UnknownNameError, match=f"known: {re.escape(', '.join(sorted(TUNERS)))}$"):
        make(name)


@pytest.mark.parametrize(
    ("name", "option", "value", "said"),
    [
        ("manual", "pool_size", 9, "unknown option of tuner manual 'pool_size'; known: none"),
        ("random", "reduction_factor", 3, "unknown option of tuner random 'reduction_factor'; known: num_configs"),
        (
            "asha",
            "pool_size",
            9,
            "unknown option of tuner asha 'pool_size'; known: early_stopping_rate, infinite_horizon",
        ),
        ("asha+fedex", "eta", 3, "unknown option of tuner asha+fedex 'eta'; known: baseline, discount, early_stopping"),
        ("asha", "reduction_factor", 3.0, "reduction_factor must be a whole number, got 3.0"),
        ("asha", "reduction_factor", 1, "reduction_factor must be a whole number >= 2, got 1"),
        ("random", "num_configs", "many", "num_configs must be a whole number, got 'many'"),
        ("fedex", "pool_size", "nine", "pool_size must be a whole number, got 'nine'"),
        ("fedex", "pool_size", True, "pool_size must be a whole number, got True"),
        ("random+fedex", "discount", "0.9", "discount must be a finite number, got '0.9'"),
        ("asha+fedex", "step_size", 0.1, "unknown step_size '0.1'; known: adaptive"),
        ("asha+fedex", "perturbation", 2, "perturbation must be a finite number >= 0 and <= 1, got 2"),
    ],
)
def test_options_that_are_not_allowed(name, option, value, said):
    with pytest.raises(InputError) as raised:
        make(name, **{option: value})
    assert str(raised.value).startswith(said)
