"""The kinds of policies: a policy hands out a trial's client configurations and learns from the clients' errors.

A `PolicyKind` is a part of a tuner's description (`fedtune.tuning.tuner_kind`). It turns options into `PolicySettings`,
which make the pool and the policy of each trial.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fedtune import rng
from fedtune.tuning.config_pool import make_pool, whole_space_pool
from fedtune.tuning.domains import Domain
from fedtune.tuning.elimination import EliminationPolicy, EliminationSettings
from fedtune.tuning.elimination_then_fedex import EliminationThenFedEx
from fedtune.tuning.fedex import FedExPolicy, FedExSettings
from fedtune.tuning.policy import Policy
from fedtune.tuning.rsws import RSWSPolicy
from fedtune.tuning.space import Config
from fedtune.tuning.trial import Pool, Trial

MakePool = Callable[[Config, Mapping[str, Domain], np.random.Generator], Pool]
MakePolicy = Callable[[Trial, int, Mapping[str, Domain], int], Policy]


class PolicySettings(NamedTuple):
    """What happens inside the trials of one tuner, with its options already checked.

    `make_pool(centre, domains, draws)` is the pool around a whole client configuration. `make_policy(trial,
    num_classes, domains, seed)` is the policy of a new trial. `domains` is the search space of the clients.
    """

    make_pool: MakePool
    make_policy: MakePolicy


@dataclass(frozen=True)
class PolicyKind:
    """One way to train a federation's clients: with one configuration, or with a pool of them.

    `make(max_rounds, **options)` is called with options of the right types, and raises InputError if a value is out of
    its bounds.
    """

    make: Callable[..., PolicySettings]
    options: Mapping[str, type] = field(default_factory=dict)


def _one_configuration(max_rounds: int) -> PolicySettings:
    return PolicySettings(
        lambda centre, domains, draws: ((dict(centre),),),
        lambda trial, num_classes, domains, seed: FedExPolicy(trial.pool, FedExSettings(), num_classes),
    )


def _fedex(max_rounds: int, **options: Any) -> PolicySettings:
    settings = FedExSettings(**options)
    return PolicySettings(
        partial(make_pool, settings),
        lambda trial, num_classes, domains, seed: FedExPolicy(trial.pool, settings, num_classes),
    )


def _rsws(max_rounds: int, **options: Any) -> PolicySettings:
    settings = EliminationSettings(**options)
    return PolicySettings(
        partial(whole_space_pool, size=settings.num_configs),
        lambda trial, num_classes, domains, seed: RSWSPolicy(trial.pool),
    )


def _elimination(max_rounds: int, **options: Any) -> PolicySettings:
    settings = EliminationSettings(**options)
    rounds_per_halving = settings.resolve(max_rounds)
    return PolicySettings(
        partial(whole_space_pool, size=settings.num_configs),
        lambda trial, num_classes, domains, seed: EliminationPolicy(trial.pool, rounds_per_halving, num_classes),
    )


def _elimination_then_fedex(max_rounds: int, **options: Any) -> PolicySettings:
    own = {name: value for name, value in options.items() if name in ELIMINATION.options}
    settings = EliminationSettings(**own)
    rounds_per_halving = settings.resolve(max_rounds)
    later = {name: value for name, value in options.items() if name in FEDEX.options}
    fedex = replace(FedExSettings(signal="loss"), **later)

    def make_policy(trial: Trial, num_classes: int, domains: Mapping[str, Domain], seed: int) -> Policy:
        def fedex_around(centre: Config) -> FedExPolicy:
            draws = rng.stream(seed, "pool around the survivor", trial.number)
            return FedExPolicy(make_pool(fedex, centre, domains, draws), fedex, num_classes)

        return EliminationThenFedEx(EliminationPolicy(trial.pool, rounds_per_halving, num_classes), fedex_around)

    return PolicySettings(partial(whole_space_pool, size=settings.num_configs), make_policy)


ONE_CONFIGURATION = PolicyKind(_one_configuration)
FEDEX = PolicyKind(
    _fedex,
    {option.name: type(option.default) for option in fields(FedExSettings)} | {"base_step_size": float},
)
UNIFORM = PolicyKind(
    partial(_fedex, step_size="off"),
    {name: FEDEX.options[name] for name in ("pool_size", "perturbation", "form")},
)
RSWS = PolicyKind(_rsws, {"num_configs": int})
ELIMINATION = PolicyKind(_elimination, {"num_configs": int, "rounds_per_halving": int})
ELIMINATION_THEN_FEDEX = PolicyKind(_elimination_then_fedex, {**ELIMINATION.options, **FEDEX.options})
