"""The tuners by name. To add a tuner, write its module and add its `TunerKind` to SEARCHES or TUNERS below.

Every search gets a second name that ends in "+fedex", with FedEx inside each of its trials. "elimination+fedex" is one
federation in which FedEx follows elimination.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedtune.errors import UnknownNameError
from fedtune.tuning.asha import ASHA
from fedtune.tuning.async_hyperband import AsyncHyperband
from fedtune.tuning.bohb import BOHB
from fedtune.tuning.hyperband import hyperband
from fedtune.tuning.one_federation import OneFederation
from fedtune.tuning.pbt import PBT, default_population_size, make_explore
from fedtune.tuning.policy_kinds import (
    ELIMINATION,
    ELIMINATION_THEN_FEDEX,
    FEDEX,
    ONE_CONFIGURATION,
    RSWS,
    UNIFORM,
    PolicyKind,
)
from fedtune.tuning.random_search import RandomSearch
from fedtune.tuning.successive_halving import successive_halving
from fedtune.tuning.trial import Tuner
from fedtune.tuning.tuner_kind import Budget, TrialSource, TunerKind


def drawing(make: Callable[..., Tuner]) -> Callable[..., Tuner]:
    """The `make` of a kind whose tuner needs only to draw trials: `make(draw, max_rounds, **options)`."""

    def make_from(trials: TrialSource, budget: Budget, **options: Any) -> Tuner:
        return make(trials.draw, budget.max_rounds, **options)

    return make_from


def one_federation(policy: PolicyKind) -> TunerKind:
    """The kind of a tuner that trains one federation with this policy."""
    return TunerKind(
        make=lambda trials, budget: OneFederation(trials.draw, *budget),
        policy=policy,
        searches=False,
        ends_at_max_rounds=lambda options: False,
    )


def make_pbt(trials: TrialSource, budget: Budget, **options: Any) -> PBT:
    """PBT, with as large a population as the budget trains to max_rounds if no size is given."""
    if "population_size" not in options:
        options["population_size"] = default_population_size(*budget)
    explore = make_explore(trials.compose, trials.space, trials.seed)
    return PBT(trials.draw, explore, trials.seed, budget.max_rounds, **options)


def make_bohb(trials: TrialSource, budget: Budget, **options: Any) -> BOHB:
    """BOHB, which composes the trials that its model chooses and draws the others."""
    return BOHB(trials.draw, trials.compose, trials.space, trials.seed, budget.max_rounds, **options)


def with_fedex(search: TunerKind) -> TunerKind:
    """The same search, with FedEx inside each of its trials."""
    return replace(search, policy=FEDEX)


SEARCHES = {
    "random": TunerKind(
        make=drawing(RandomSearch),
        options={"num_configs": int},
        forgets_jobs=True,
        extendable=True,
    ),
    "sha": TunerKind(
        make=drawing(successive_halving),
        options={"num_configs": int, "min_rounds": int, "reduction_factor": int, "early_stopping_rate": int},
    ),
    "asha": TunerKind(
        make=drawing(ASHA),
        options={
            "num_configs": int,
            "min_rounds": int,
            "reduction_factor": int,
            "early_stopping_rate": int,
            "infinite_horizon": bool,
        },
        forgets_jobs=True,
        extendable=True,
        ends_at_max_rounds=lambda options: not options.get("infinite_horizon", False),
    ),
    "hyperband": TunerKind(
        make=drawing(hyperband),
        options={"min_rounds": int, "reduction_factor": int, "floor_first": bool},
    ),
    "async_hyperband": TunerKind(
        make=drawing(AsyncHyperband),
        options={"num_configs": int, "min_rounds": int, "reduction_factor": int, "mode": str},
        forgets_jobs=True,
        extendable=True,
    ),
    "pbt": TunerKind(make=make_pbt, options={"population_size": int, "interval": int}),
    "bohb": TunerKind(make=make_bohb, options={"min_rounds": int, "reduction_factor": int}),
}

TUNERS = {
    "manual": one_federation(ONE_CONFIGURATION),
    "fedex": one_federation(FEDEX),
    "uniform": one_federation(UNIFORM),
    "rsws": one_federation(RSWS),
    "elimination": one_federation(ELIMINATION),
    "elimination+fedex": one_federation(ELIMINATION_THEN_FEDEX),
    **SEARCHES,
    **{f"{name}+fedex": with_fedex(search) for name, search in SEARCHES.items()},
}


def tuner_kind(name: str) -> TunerKind:
    """The kind of the tuner of that name. Raises UnknownNameError, which lists the known ones."""
    if name not in TUNERS:
        raise UnknownNameError("tuner", name, TUNERS)
    return TUNERS[name]
