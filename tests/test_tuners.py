import re

import numpy as np
import pytest

from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.asha import ASHA
from fedtune.tuning.async_hyperband import AsyncHyperband
from fedtune.tuning.bohb import BOHB
from fedtune.tuning.config_pool import perturbed_pool, product_pool, whole_space_pool
from fedtune.tuning.domains import LogUniform
from fedtune.tuning.elimination import EliminationPolicy
from fedtune.tuning.elimination_then_fedex import EliminationThenFedEx
from fedtune.tuning.fedex import FedExPolicy, FedExSettings
from fedtune.tuning.one_federation import OneFederation
from fedtune.tuning.pbt import PBT
from fedtune.tuning.policy import Policy
from fedtune.tuning.random_search import RandomSearch
from fedtune.tuning.rsws import RSWSPolicy
from fedtune.tuning.space import SearchSpace
from fedtune.tuning.successive_halving import SynchronousBrackets
from fedtune.tuning.trial import Extendable, Job, Trial, Tuner
from fedtune.tuning.tuner_kind import Budget, TrialSource
from fedtune.tuning.tuners import TUNERS, tuner_kind

DOMAINS = {"learning_rate": LogUniform(1e-3, 1.0)}
SPACE = SearchSpace(DOMAINS, {})
CENTRE = {"learning_rate": 0.1, "epochs": 2}


def draw(number):
    return Trial(number, {}, (({"learning_rate": 0.1},),))


def compose(number, server, client):
    return Trial(number, server, ((client,),))


def parse(name, **options):
    max_rounds = 64 if name.startswith("async_hyperband") else 81
    return tuner_kind(name).parse(name, options, Budget(max_rounds, total_rounds=405))


def make(name, **options):
    return parse(name, **options).make_tuner(TrialSource(draw, compose, SPACE, seed=0))


def make_pool(name, **options):
    return parse(name, **options).policy.make_pool(CENTRE, DOMAINS, np.random.default_rng(0))


def make_policy(name, **options):
    trial = Trial(0, {}, make_pool(name, **options))
    return parse(name, **options).policy.make_policy(trial, 10, DOMAINS, 0)


KINDS = [
    ("manual", OneFederation),
    ("fedex", OneFederation),
    ("uniform", OneFederation),
    ("rsws", OneFederation),
    ("elimination", OneFederation),
    ("elimination+fedex", OneFederation),
    ("random", RandomSearch),
    ("sha", SynchronousBrackets),
    ("asha", ASHA),
    ("hyperband", SynchronousBrackets),
    ("async_hyperband", AsyncHyperband),
    ("pbt", PBT),
    ("bohb", BOHB),
    ("random+fedex", RandomSearch),
    ("sha+fedex", SynchronousBrackets),
    ("asha+fedex", ASHA),
    ("hyperband+fedex", SynchronousBrackets),
    ("async_hyperband+fedex", AsyncHyperband),
    ("pbt+fedex", PBT),
    ("bohb+fedex", BOHB),
]


@pytest.mark.parametrize(("name", "made"), KINDS)
def test_the_tuners_by_name(name, made):
    tuner = make(name)
    assert isinstance(tuner, Tuner)
    assert type(tuner) is made
    assert tuner_kind(name).searches == (made is not OneFederation)


def test_which_tuners_forget_jobs_and_can_be_extended():
    names = ("random", "asha", "async_hyperband")
    expected = {*names, *(f"{name}+fedex" for name in names)}
    assert {name for name, kind in TUNERS.items() if kind.forgets_jobs} == expected
    assert {name for name, kind in TUNERS.items() if kind.extendable} == expected
    assert {name for name in TUNERS if isinstance(make(name), Extendable)} == expected


def test_whose_trials_end_at_max_rounds():
    assert [name for name, made in KINDS if not parse(name).ends_at_max_rounds] == [
        name for name, made in KINDS if made is OneFederation
    ]
    assert not parse("asha", infinite_horizon=True).ends_at_max_rounds
    assert not parse("asha+fedex", infinite_horizon=True).ends_at_max_rounds
    assert parse("asha", infinite_horizon=False).ends_at_max_rounds


@pytest.mark.parametrize("name", TUNERS)
def test_a_tuner_is_checked_without_drawing_a_trial(name):
    parse(name).check(SPACE)


def test_a_check_finds_what_making_the_tuner_finds():
    with pytest.raises(InputError, match="reduction_factor must be a whole number >= 2, got 1"):
        parse("asha", reduction_factor=1).check(SPACE)


def test_this_test_knows_every_tuner():
    assert list(TUNERS) == [name for name, made in KINDS]


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_trains_within_the_rounds_and_takes_any_error(name):
    tuner = make(name)
    for error in [0.5, float("nan"), 0.2, float("inf"), 0.9, 0.1]:
        job = tuner.ask()
        if job is None:
            break
        assert job.rounds <= (81 if tuner_kind(name).searches else 405)
        tuner.tell(job, error)


@pytest.mark.parametrize("name", [name for name, made in KINDS if made not in (OneFederation, RandomSearch)])
def test_a_tuner_that_stops_trials_is_told_of_a_job_once_and_only_if_it_asked_for_it(name):
    tuner = make(name)
    job = tuner.ask()
    tuner.tell(job, 0.5)
    for wrong in (job, Job(draw(5), 0, 1)):
        with pytest.raises(
            InputError, match=f"a job must be running to be reported, got trial {wrong.trial.number} in rung 0"
        ):
            tuner.tell(wrong, 0.5)


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_has_a_pool_and_a_policy_for_its_trials(name):
    """The pool of a trial, the policy that drives it, and the settings of FedEx if there are any."""
    plain, perturbed = ((CENTRE,),), perturbed_pool(CENTRE, DOMAINS, np.random.default_rng(0), 9, 0.1)
    whole = whole_space_pool(CENTRE, DOMAINS, np.random.default_rng(0), 27)
    expected_pool, kind, settings = {
        "uniform": (perturbed, FedExPolicy, FedExSettings(step_size="off")),
        "rsws": (whole, RSWSPolicy, None),
        "elimination": (whole, EliminationPolicy, None),
        "elimination+fedex": (whole, EliminationThenFedEx, None),
    }.get(name, (perturbed if name.endswith("fedex") else plain, FedExPolicy, FedExSettings()))
    assert make_pool(name) == expected_pool
    policy = make_policy(name)
    assert isinstance(policy, Policy)
    assert type(policy) is kind
    assert policy.pool == expected_pool
    assert getattr(policy, "settings", None) == settings


def test_options_reach_the_pool_and_the_policy():
    product = {"form": "product", "pool_size": 4, "perturbation": 0.3}
    pool = make_pool("uniform", **product)
    assert pool == product_pool(CENTRE, DOMAINS, np.random.default_rng(0), 4, 0.3)
    assert make_policy("uniform", **product).settings == FedExSettings(step_size="off", **product)
    for name in ("elimination", "elimination+fedex", "rsws"):
        assert len(make_pool(name, num_configs=5)[0]) == 5
    assert make_policy("fedex", baseline="client").needs_error_before


def test_rounds_per_halving_reaches_elimination():
    """Three configurations are halved to one at the end of m rounds, and not before."""
    policy = make_policy("elimination", num_configs=3, rounds_per_halving=7)
    for t in range(7):
        assert np.count_nonzero(policy.probabilities()[0]) == 3
        drawn = policy.draw(np.random.default_rng(t), 5)
        policy.update(drawn, np.linspace(0, 1, 5), np.ones(5))
    assert np.count_nonzero(policy.probabilities()[0]) == 1


@pytest.mark.parametrize(("options", "signal"), [({}, "loss"), ({"signal": "error"}, "error")])
def test_fedex_after_elimination_has_its_own_options_and_losses_unless_set(options, signal):
    policy = make_policy("elimination+fedex", num_configs=1, pool_size=4, **options)  # one: elimination is over
    assert policy.signal == signal
    assert len(policy.pool[0]) == 4


def test_elimination_must_be_over_by_max_rounds_and_that_is_found_before_the_run():
    with pytest.raises(InputError, match="max_rounds must be >= 84 to reduce 27 configurations to one"):
        parse("elimination", rounds_per_halving=21)


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
    assert make_policy("asha+fedex", **options).settings == FedExSettings(pool_size=27, discount=1.0)
    assert make("random", num_configs=3).num_configs == 3


@pytest.mark.parametrize("name", [name for name in TUNERS if name.endswith("fedex")])
def test_the_step_sizes_and_the_cutoff_reach_every_fedex(name):
    """The entropy of any theta is below a cut-off of 100: after one update the best configuration is drawn alone."""
    single = {"num_configs": 1} if name == "elimination+fedex" else {}  # one: elimination is over
    policy = make_policy(name, step_size="scale", base_step_size=0.25, entropy_cutoff=100, pool_size=2, **single)
    num_validation = np.array([1, 1])
    policy.update(np.array([[0], [1]]), np.array([0.5, 0.25]), num_validation)
    assert policy.probabilities()[0].tolist() == [0.0, 1.0]
    policy = make_policy(name, step_size="scale", base_step_size=0.25, pool_size=2, **single)
    policy.update(np.array([[0], [1]]), np.array([0.5, 0.25]), num_validation)
    (theta,) = policy.probabilities()
    gradient = [0.5 * (0.5 - 0.25) / 0.5, 0.5 * (0.25 - 0.5) / 0.5]  # leave one out
    step = 0.25 * np.sqrt(2 * np.log(2))
    assert np.log(theta[1] / theta[0]) == pytest.approx(step * (gradient[0] - gradient[1]))


@pytest.mark.parametrize("name", ["shah", "fedex+asha", "manual+fedex", ""])
def test_an_unknown_tuner_lists_the_known_ones(name):
    known = re.escape(", ".join(sorted(TUNERS)))
    with pytest.raises(UnknownNameError, match=rf"known: {known}(; did you mean .+\?)?$"):
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
        (
            "asha+fedex",
            "eta",
            3,
            "unknown option of tuner asha+fedex 'eta'; known: base_step_size, baseline, discount, ",
        ),
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
        ("sha+fedex", "base_step_size", -1, "base_step_size must be a finite number > 0 and <= 1000000.0, got -1"),
        ("fedex", "entropy_cutoff", "low", "entropy_cutoff must be a finite number, got 'low'"),
        ("asha+fedex", "perturbation", 2, "perturbation must be a finite number >= 0 and <= 1, got 2"),
    ],
)
def test_options_that_are_not_allowed(name, option, value, said):
    with pytest.raises(InputError) as raised:
        make(name, **{option: value})
    assert str(raised.value).startswith(said)
