"""The distributions from which the devices of clients are drawn: the table `[devices]`, parsed and checked."""

import math
from typing import Any, NamedTuple

import numpy as np

from fedtune.errors import InputError
from fedtune.settings import DevicesSettings
from fedtune.tuning.domains import Choice, Domain, parse_domain
from fedtune.tuning.space import checked_number


class LogNormal(NamedTuple):
    """Positive numbers: their logarithms are normal with mean log(median) and standard deviation sigma."""

    median: float
    sigma: float

    def sample(self, draws: np.random.Generator) -> float:
        """One number."""
        return float(self.median * math.exp(self.sigma * draws.standard_normal()))


Distribution = float | Domain | LogNormal  # a number is the same for every client

RANGES: dict[str, dict[str, Any]] = {  # the allowed range of each field of Device
    "seconds_per_example": {"low": 0},
    "download_speed": {"low": 0, "low_open": True},
    "upload_speed": {"low": 0, "low_open": True},
    "availability": {"low": 0, "low_open": True, "high": 1},
}


def distributions(settings: DevicesSettings) -> dict[str, Distribution]:
    """What each field of a Device is drawn from. Raises InputError if a setting has an impossible value."""
    return {name: _distribution(name, getattr(settings, name)) for name in RANGES}


def _distribution(name: str, value: float | dict[str, Any]) -> Distribution:
    """The distribution that the setting `devices.<name>` describes, checked."""
    setting = f"devices.{name}"
    distribution = _parse(setting, value)
    bounds: tuple[Any, ...]
    if isinstance(distribution, float):
        bounds = (distribution,)
    elif isinstance(distribution, Choice):
        bounds = distribution.options
    elif not isinstance(distribution, LogNormal):
        bounds = (distribution.low, distribution.high)
    elif name == "availability":
        raise InputError(f"{setting} must be a probability, got {value!r}, which has no upper end")
    else:
        bounds = (distribution.median,)
    for bound in bounds:
        if not (bound == math.inf and name in ("download_speed", "upload_speed")):
            checked_number(setting, bound, **RANGES[name])
    return distribution


def _parse(setting: str, value: float | dict[str, Any]) -> Distribution:
    if not isinstance(value, dict):
        return float(value)
    if list(value) != ["log_normal"]:
        return parse_domain(setting, value)
    given = value["log_normal"]
    if not isinstance(given, list) or len(given) != 2:
        raise InputError(f"{setting}: log_normal must be [median, sigma], got {given!r}")
    return LogNormal(
        float(checked_number(f"{setting}: the median of log_normal", given[0], low=0, low_open=True)),
        float(checked_number(f"{setting}: the sigma of log_normal", given[1], low=0, high=10)),
    )
