import re

import numpy as np
import pytest

from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.asha import ASHA
from fedtune.tuning.async_hyperband import AsyncHyperband
from fedtune.tuning.bohb import BOHB
from fedtune.tuning.elimination import EliminationSettings
from fedtune.tuning.fedex import FedExSettings
from fedtune.tuning.one_federation import OneFederation
from fedtune.tuning.pbt import PBT
from fedtune.tuning.policy import EliminationPolicy, EliminationThenFedEx, FedExPolicy, Policy, RSWSPolicy
from fedtune.tuning.pool import perturbed_pool, product_pool, whole_space_pool
from fedtune.tuning.random_search import RandomSearch
from fedtune.tuning.space import LogUniform, SearchSpace
from fedtune.tuning.successive_halving import SynchronousBrackets
from fedtune.tuning.trial import Job, Trial, Tuner
from fedtune.tuning.tuners import (
    TUNERS,
    base_name,
    elimination_settings,
    ends_after_num_configs,
    fedex_settings,
    make_policy,
    make_trial_pool,
    make_tuner,
    uses_fedex,
    within_one_federation,
)

DOMAINS = {"learning_rate": LogUniform(1e-3, 1.0)}
CENTRE = {"learning_rate": 0.1, "epochs": 2}


def draw(number):
    return Trial(number, {}, (({"learning_rate": 0.1},),))


def make(name, **options):
    def compose(number, server, client):
        return Trial(number, server, ((client,),))

    rounds = {"max_rounds": 64 if name.startswith("async_hyperband") else 81, "total_rounds": 405}
    return make_tuner(name, draw, **rounds, options=options, compose=compose, space=SearchSpace(DOMAINS, {}))


def make_policy_of(name, trial=None, **options):
    trial = trial or Trial(0, {}, make_trial_pool(name, options, CENTRE, DOMAINS, np.random.default_rng(0)))
    return make_policy(name, options, trial, max_rounds=81, num_classes=10, domains=DOMAINS, seed=0)


KINDS = [
    ("manual", OneFederation, "manual", False),
    ("fedex", OneFederation, "fedex", True),
    ("uniform", OneFederation, "uniform", False),
    ("rsws", OneFederation, "rsws", False),
    ("elimination", OneFederation, "elimination", False),
    ("elimination+fedex", OneFederation, "elimination", True),
    ("random", RandomSearch, "random", False),
    ("sha", SynchronousBrackets, "sha", False),
    ("asha", ASHA, "asha", False),
    ("hyperband", SynchronousBrackets, "hyperband", False),
    ("async_hyperband", AsyncHyperband, "async_hyperband", False),
    ("pbt", PBT, "pbt", False),
    ("bohb", BOHB, "bohb", False),
    ("random+fedex", RandomSearch, "random", True),
    ("sha+fedex", SynchronousBrackets, "sha", True),
    ("asha+fedex", ASHA, "asha", True),
    ("hyperband+fedex", SynchronousBrackets, "hyperband", True),
    ("async_hyperband+fedex", AsyncHyperband, "async_hyperband", True),
    ("pbt+fedex", PBT, "pbt", True),
    ("bohb+fedex", BOHB, "bohb", True),
]


@pytest.mark.parametrize(("name", "kind", "base", "fedex"), KINDS)
def test_the_tuners_by_name(name, kind, base, fedex):
    tuner = make(name)
    assert isinstance(tuner, Tuner)
    assert type(tuner) is kind
    assert base_name(name) == base
    assert uses_fedex(name) == fedex
    assert within_one_federation(name) == (kind is OneFederation)


def test_whom_num_configs_ends():
    names = ("random", "asha", "async_hyperband")
    assert {name for name in TUNERS if ends_after_num_configs(name)} == {*names, *(f"{name}+fedex" for name in names)}


def test_this_test_knows_every_tuner():
    assert list(TUNERS) == [name for name, *_ in KINDS]


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_trains_within_the_rounds_and_takes_any_error(name):
    tuner = make(name)
    for error in [0.5, float("nan"), 0.2, float("inf"), 0.9, 0.1]:
        job = tuner.ask()
        if job is None:
            break
        assert job.rounds <= (405 if within_one_federation(name) else 81)
        tuner.tell(job, error)


@pytest.mark.parametrize("name", [name for name, kind, *_ in KINDS if kind not in (OneFederation, RandomSearch)])
def test_a_tuner_that_stops_trials_is_told_of_a_job_once_and_only_if_it_asked_for_it(name):
    tuner = make(name)
    job = tuner.ask()
    tuner.tell(job, 0.5)
    for wrong in (job, Job(draw(5), 0, 1)):
        with pytest.raises(
            InputError, match=f"a job must be running to be told, got trial {wrong.trial.number} in rung 0"
        ):
            tuner.tell(wrong, 0.5)


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_has_a_pool_and_a_policy_for_its_trials(name):
    """The pool of a trial, the policy that drives it, and the settings of FedEx where there are any."""
    pool = make_trial_pool(name, {}, CENTRE, DOMAINS, np.random.default_rng(0))
    plain, perturbed = ((CENTRE,),), perturbed_pool(CENTRE, DOMAINS, np.random.default_rng(0), 9, 0.1)
    whole = whole_space_pool(CENTRE, DOMAINS, np.random.default_rng(0), 27)
    off, loss = FedExSettings(step_size="off"), FedExSettings(signal="loss")
    expected_pool, kind, settings = {
        "uniform": (perturbed, FedExPolicy, off),
        "rsws": (whole, RSWSPolicy, None),
        "elimination": (whole, EliminationPolicy, None),
        "elimination+fedex": (whole, EliminationThenFedEx, loss),
    }.get(name, (perturbed, FedExPolicy, FedExSettings()) if uses_fedex(name) else (plain, FedExPolicy, None))
    assert pool == expected_pool
    assert fedex_settings(name, {}) == settings
    policy = make_policy_of(name)
    assert isinstance(policy, Policy)
    assert type(policy) is kind
    assert policy.pool == pool
    if kind is FedExPolicy:
        assert policy.settings == (settings or FedExSettings())


def test_options_reach_the_pool_and_the_policy():
    product = {"form": "product", "pool_size": 4, "perturbation": 0.3}
    pool = make_trial_pool("uniform", product, CENTRE, DOMAINS, np.random.default_rng(0))
    assert pool == product_pool(CENTRE, DOMAINS, np.random.default_rng(0), 4, 0.3)
    assert fedex_settings("uniform", product) == FedExSettings(step_size="off", **product)
    assert fedex_settings("elimination+fedex", {"signal": "error", "num_configs": 3}) == FedExSettings(signal="error")
    for name in ("elimination", "elimination+fedex", "rsws"):
        assert len(make_trial_pool(name, {"num_configs": 5}, CENTRE, DOMAINS, np.random.default_rng(0))[0]) == 5
    assert elimination_settings("elimination", {"rounds_per_halving": 7}) == EliminationSettings(27, 7)
    assert make_policy_of("fedex", baseline="client").needs_error_before


def test_elimination_must_be_over_by_max_rounds_and_that_is_found_before_the_run():
    with pytest.raises(InputError, match="max_rounds must be >= 84 to eliminate all but one of 27 configurations"):
        make("elimination", rounds_per_halving=21)


def test_options_of_the_searches_reach_them():
    assert make("asha", infinite_horizon=True).infinite_horizon is True
    assert make("async_hyperband", mode="aggressive", num_configs=64).widths == [64]
    assert (make("pbt").population_size, make("pbt", population_size=7).population_size) == (5, 7)
    assert make("pbt", interval=9).interval == 9
    first = make("hyperband", floor_first=True)
    assert [first.ask().rounds for _ in range(81 + 27 + 1)] == [1] * 81 + [3] * 27 + [9]
    assert [make("sha", num_configs=90, min_rounds=3, early_stopping_rate=1).ask().rounds for _ in range(3)] == [9] * 3
    assert make("bohb", reduction_factor=9, min_rounds=9).ask().rounds == 9


def test_options_reach_the_tuner_and_fedex():
    options = {"reduction_factor": 9, "early_stopping_rate": 1, "num_configs": 9, "pool_size": 27, "discount": 1}
    tuner = make("asha+fedex", **options)
    assert (tuner.rung_rounds, tuner.num_configs) == ((9, 81), 9)
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
        ("asha", "infinite_horizon", 1, "infinite_horizon must be true or false, got 1"),
        ("async_hyperband", "mode", "bold", "unknown mode 'bold'; known: aggressive, conservative, standard"),
        (
            "uniform",
            "step_size",
            "auto",
            "unknown option of tuner uniform 'step_size'; known: form, perturbation, pool",
        ),
        ("rsws", "rounds_per_halving", 4, "unknown option of tuner rsws 'rounds_per_halving'; known: num_configs"),
        ("rsws", "num_configs", 0, "num_configs must be a whole number >= 1, got 0"),
        ("elimination", "pool_size", 9, "unknown option of tuner elimination 'pool_size'; known: num_configs, rounds"),
        ("pbt", "population_size", 4, "population_size must be a whole number >= 5, got 4"),
        ("asha+fedex", "step_size", 0.1, "unknown step_size '0.1'; known: adaptive"),
        ("asha+fedex", "perturbation", 2, "perturbation must be a finite number >= 0 and <= 1, got 2"),
    ],
)
def test_options_that_are_not_allowed(name, option, value, said):
    with pytest.raises(InputError) as raised:
        make(name, **{option: value})
    assert str(raised.value).startswith(said)
