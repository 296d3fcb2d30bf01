"""The tuners by name. A name that ends in "+fedex" is a search with FedEx inside each of its trials."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from fedtune.errors import UnknownNameError
from fedtune.tuning.asha import ASHA
from fedtune.tuning.fedex import FedExSettings
from fedtune.tuning.one_federation import OneFederation
from fedtune.tuning.random_search import RandomSearch
from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Draw, Tuner

TUNERS: dict[str, Callable[..., Tuner]] = {
    "manual": OneFederation,
    "fedex": OneFederation,
    "random": RandomSearch,
    "random+fedex": RandomSearch,
    "asha": ASHA,
    "asha+fedex": ASHA,
}

# What [tuner.NAME] may set beside FedEx's own settings, whole numbers all.
OPTIONS: dict[Callable[..., Tuner], tuple[str, ...]] = {
    OneFederation: (),
    RandomSearch: ("num_configs",),
    ASHA: ("min_rounds", "reduction_factor", "early_stopping_rate", "num_configs"),
}

FEDEX_DEFAULTS = {field.name: field.default for field in fields(FedExSettings)}


def uses_fedex(name: str) -> bool:
    """Whether the trials of this tuner weigh a pool of configurations with FedEx."""
    return "fedex" in name.split("+")


def base_name(name: str) -> str:
    """The tuner without the FedEx inside its trials: "asha" for "asha+fedex", and "fedex" for itself."""
    return name.removesuffix("+fedex")


def make_tuner(name: str, draw: Draw, *, max_rounds: int, total_rounds: int, options: Mapping[str, Any]) -> Tuner:
    """The tuner of that name; `options` is its [tuner.NAME] table, in which FedEx's settings are checked too."""
    fedex_settings(name, options)
    build = TUNERS[name]
    if build is OneFederation:
        return build(draw, max_rounds, total_rounds)
    chosen = [option for option in OPTIONS[build] if option in options]
    return build(
        draw, max_rounds, **{option: checked_number(option, options[option], integer=True) for option in chosen}
    )


def fedex_settings(name: str, options: Mapping[str, Any]) -> FedExSettings | None:
    """FedEx's settings out of a tuner's [tuner.NAME] table; None for a tuner without FedEx."""
    if name not in TUNERS:
        raise UnknownNameError("tuner", name, TUNERS)
    known = [*OPTIONS[TUNERS[name]], *(FEDEX_DEFAULTS if uses_fedex(name) else ())]
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of tuner {name}", option, known or ["none"])
    if not uses_fedex(name):
        return None
    return FedExSettings(
        **{
            option: _like(default, option, options[option])
            for option, default in FEDEX_DEFAULTS.items()
            if option in options
        }
    )


def _like(default: Any, name: str, value: Any) -> Any:
    """The value as a string, whole or real number, whichever the default is."""
    return str(value) if isinstance(default, str) else checked_number(name, value, integer=isinstance(default, int))
