"""The tuners by name, and what is made of a tuner's [tuner.NAME] table.

Every search has a second name that ends in "+fedex", with FedEx inside each of its trials; "elimination+fedex" is one
federation in which FedEx follows elimination.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from fedtune import rng
from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.asha import ASHA
from fedtune.tuning.async_hyperband import AsyncHyperband
from fedtune.tuning.bohb import BOHB
from fedtune.tuning.elimination import EliminationSettings
from fedtune.tuning.fedex import FedExSettings
from fedtune.tuning.hyperband import hyperband
from fedtune.tuning.one_federation import OneFederation
from fedtune.tuning.pbt import PBT, default_population_size, make_explore
from fedtune.tuning.policy import EliminationPolicy, EliminationThenFedEx, FedExPolicy, Policy, RSWSPolicy
from fedtune.tuning.pool import make_pool, whole_space_pool
from fedtune.tuning.random_search import RandomSearch
from fedtune.tuning.space import Config, Domain, SearchSpace, checked_number
from fedtune.tuning.successive_halving import successive_halving
from fedtune.tuning.trial import Compose, Draw, Pool, Trial, Tuner

SEARCHES: dict[str, Callable[..., Tuner]] = {
    "random": RandomSearch,
    "sha": successive_halving,
    "asha": ASHA,
    "hyperband": hyperband,
    "async_hyperband": AsyncHyperband,
    "pbt": PBT,
    "bohb": BOHB,
}
TUNERS: dict[str, Callable[..., Tuner]] = {
    **dict.fromkeys(("manual", "fedex", "uniform", "rsws", "elimination", "elimination+fedex"), OneFederation),
    **SEARCHES,
    **{f"{name}+fedex": search for name, search in SEARCHES.items()},
}

# What [tuner.NAME] may set beside the settings of what goes on within a federation.
OPTIONS: dict[Callable[..., Tuner], dict[str, type]] = {
    OneFederation: {},
    RandomSearch: {"num_configs": int},
    successive_halving: {"num_configs": int, "min_rounds": int, "reduction_factor": int, "early_stopping_rate": int},
    ASHA: {
        **{"min_rounds": int, "reduction_factor": int, "early_stopping_rate": int, "num_configs": int},
        "infinite_horizon": bool,
    },
    hyperband: {"min_rounds": int, "reduction_factor": int, "floor_first": bool},
    AsyncHyperband: {"num_configs": int, "min_rounds": int, "reduction_factor": int, "mode": str},
    PBT: {"population_size": int, "interval": int},
    BOHB: {"min_rounds": int, "reduction_factor": int},
}

FEDEX_OPTIONS: dict[str, type] = {field.name: type(field.default) for field in fields(FedExSettings)}
ELIMINATION_OPTIONS: dict[str, type] = {field.name: int for field in fields(EliminationSettings)}
WITHIN_OPTIONS: dict[str, dict[str, type]] = {
    **{name: FEDEX_OPTIONS for name in TUNERS if "fedex" in name.split("+")},
    "uniform": {name: FEDEX_OPTIONS[name] for name in ("pool_size", "perturbation", "form")},
    "rsws": {"num_configs": int},
    "elimination": ELIMINATION_OPTIONS,
    "elimination+fedex": {**ELIMINATION_OPTIONS, **FEDEX_OPTIONS},
}
WHOLE_SPACE = ("rsws", "elimination", "elimination+fedex")  # their pools are drawn from it
FEDEX_PRESETS: dict[str, dict[str, Any]] = {"uniform": {"step_size": "off"}, "elimination+fedex": {"signal": "loss"}}


def uses_fedex(name: str) -> bool:
    """Whether the trials of this tuner weigh a pool of configurations with FedEx."""
    return "fedex" in name.split("+")


def base_name(name: str) -> str:
    """The tuner without the FedEx inside its trials: "asha" for "asha+fedex", and "fedex" for itself."""
    return name.removesuffix("+fedex")


def goes_on_without(tuner: Tuner) -> bool:
    """Whether the tuner does as well where it is never told of some job; others wait for every one they asked for."""
    return isinstance(tuner, (RandomSearch, ASHA, AsyncHyperband))


def ends_after_num_configs(name: str) -> bool:
    """Whether `num_configs` is all that the tuner draws, and not the size of a bracket or a pool."""
    return hasattr(TUNERS.get(name), "raise_num_configs")  # as an Extendable has


def within_one_federation(name: str) -> bool:
    """Whether all of this tuner happens in one trial, around the fixed values."""
    return TUNERS[name] is OneFederation


def ends_at_max_rounds(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a trial that has had max_rounds rounds is never asked for again."""
    return not within_one_federation(name) and not options.get("infinite_horizon", False)


def make_tuner(
    name: str,
    draw: Draw,
    *,
    max_rounds: int,
    total_rounds: int,
    options: Mapping[str, Any],
    compose: Compose,
    space: SearchSpace,
    seed: int = 0,
) -> Tuner:
    """The tuner of that name; `options` is its [tuner.NAME] table, all of which is checked here.

    `compose` and the space are for those that choose values themselves, pbt and bohb.
    """
    chosen = checked_options(name, options)
    fedex_settings(name, options)
    if name in WHOLE_SPACE:
        settings = elimination_settings(name, options)
        if name != "rsws":
            settings.resolve(max_rounds)
    build = TUNERS[name]
    own = {option: chosen[option] for option in OPTIONS[build] if option in chosen}
    if build is OneFederation:
        return OneFederation(draw, max_rounds, total_rounds)
    if build is PBT:
        if "population_size" not in own:
            own["population_size"] = default_population_size(max_rounds, total_rounds)
        return PBT(draw, make_explore(compose, space, seed), seed, max_rounds, **own)
    if build is BOHB:
        return BOHB(draw, compose, space, seed, max_rounds, **own)
    return build(draw, max_rounds, **own)


def make_trial_pool(
    name: str, options: Mapping[str, Any], centre: Config, domains: Mapping[str, Domain], draws: np.random.Generator
) -> Pool:
    """The client configurations of a trial of this tuner, around a whole client configuration."""
    if name in WHOLE_SPACE:
        return whole_space_pool(centre, domains, draws, elimination_settings(name, options).num_configs)
    fedex = fedex_settings(name, options)
    return ((dict(centre),),) if fedex is None else make_pool(fedex, centre, domains, draws)


def make_policy(
    name: str,
    options: Mapping[str, Any],
    trial: Trial,
    *,
    max_rounds: int,
    num_classes: int,
    domains: Mapping[str, Domain],
    seed: int,
) -> Policy:
    """What goes on within a trial of this tuner; `domains` is the clients' search space."""
    if name == "rsws":
        return RSWSPolicy(trial.pool)
    settings = fedex_settings(name, options) or FedExSettings()
    if base_name(name) != "elimination":
        return FedExPolicy(trial.pool, settings, num_classes)

    def fedex_around(centre: Config) -> FedExPolicy:
        draws = rng.stream(seed, "pool around the survivor", trial.number)
        return FedExPolicy(make_pool(settings, centre, domains, draws), settings, num_classes)

    m = elimination_settings(name, options).resolve(max_rounds)
    elimination = EliminationPolicy(trial.pool, m, num_classes)
    return EliminationThenFedEx(elimination, fedex_around) if uses_fedex(name) else elimination


def fedex_settings(name: str, options: Mapping[str, Any]) -> FedExSettings | None:
    """FedEx's settings out of a tuner's [tuner.NAME] table; None for a tuner without FedEx."""
    chosen = checked_options(name, options)
    if not uses_fedex(name) and name != "uniform":
        return None
    own = {option: value for option, value in chosen.items() if option in FEDEX_OPTIONS}
    return FedExSettings(**{**FEDEX_PRESETS.get(name, {}), **own})


def elimination_settings(name: str, options: Mapping[str, Any]) -> EliminationSettings:
    """The settings of elimination out of a tuner's [tuner.NAME] table; rsws has only the size of the pool."""
    chosen = checked_options(name, options)
    return EliminationSettings(**{option: chosen[option] for option in ELIMINATION_OPTIONS if option in chosen})


def checked_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as whole or real numbers, strings and booleans. Raises UnknownNameError or InputError."""
    if name not in TUNERS:
        raise UnknownNameError("tuner", name, TUNERS)
    known = {**OPTIONS[TUNERS[name]], **WITHIN_OPTIONS.get(name, {})}
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of tuner {name}", option, known or ["none"])
    return {option: _checked(known[option], option, value) for option, value in options.items()}


def _checked(kind: type, name: str, value: Any) -> Any:
    if kind is bool and not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {value!r}")
    return checked_number(name, value, integer=kind is int) if kind in (int, float) else kind(value)
