"""Hyperparameters and search spaces: the range of each hyperparameter, and what a tuner may search.

A configuration maps hyperparameter names to plain floats and ints.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.domains import LARGEST, LARGEST_WHOLE, Choice, Domain, LogUniform, Uniform, is_number
from fedtune.tuning.domains import Number as Number

Config = Mapping[str, Number]

LARGEST_SINGLE = 3.4e38  # about the largest number of single precision, in which clients train


def checked_number(
    name: str,
    value: Any,
    *,
    low: Number = -math.inf,
    high: Number = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    integer: bool = False,
) -> Number:
    """The value as an int or a finite float. Raises InputError if it is no number of this kind or is out of range."""
    allowed = (
        is_number(value)
        and (isinstance(value, int) or not integer)
        and abs(value) <= LARGEST
        and (low < value if low_open else low <= value)
        and (value < high if high_open else value <= high)
    )
    if not allowed:
        kind = "a whole number" if integer else "a finite number"
        bounds = [f"{'>' if low_open else '>='} {low}"] if low > -math.inf else []
        bounds += [f"{'<' if high_open else '<='} {high}"] if high < math.inf else []
        raise InputError(f"{name} must be {' '.join([kind, ' and '.join(bounds)]).strip()}, got {value!r}")
    return int(value) if integer else float(value)


@dataclass(frozen=True)
class Hyperparameter:
    """The default and the range of one hyperparameter, declared by the client program or the server that uses it.

    `low` and `high` belong to the range unless `low_open` or `high_open` is set.
    """

    default: Number
    low: Number = -math.inf
    high: Number = math.inf
    low_open: bool = False
    high_open: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        self.check("default", self.default)

    def check(self, name: str, value: Any) -> Number:
        """The value as an int or float; InputError if it is not allowed, or no number that single precision holds."""
        number = checked_number(
            name,
            value,
            low=self.low,
            high=self.high,
            low_open=self.low_open,
            high_open=self.high_open,
            integer=self.integer,
        )
        largest = LARGEST_WHOLE if self.integer else LARGEST_SINGLE
        if abs(number) > largest:
            raise InputError(f"{name} must be at most {largest:.8g}, got {value!r}")
        return number


@dataclass(frozen=True)
class SearchSpace:
    """The domains of the hyperparameters that are searched: in local training, and in the server's aggregation."""

    client: Mapping[str, Domain]
    server: Mapping[str, Domain]


def sample(domains: Mapping[str, Domain], rng: np.random.Generator) -> dict[str, Number]:
    """One random value for each domain; the order of the mapping does not matter."""
    return {name: domains[name].sample(rng) for name in sorted(domains)}


def perturb(
    domains: Mapping[str, Domain], config: Config, rng: np.random.Generator, fraction: float
) -> dict[str, Number]:
    """The configuration with every hyperparameter that has a domain perturbed; the others keep their value."""
    return {**config, **{name: domains[name].perturb(config[name], rng, fraction) for name in sorted(domains)}}


def check_space(domains: Mapping[str, Domain], known: Mapping[str, Hyperparameter], kind: str) -> None:
    """Raises InputError unless every name is a known hyperparameter and its domain is within the allowed range.

    `kind` is what an error calls the hyperparameters, for example "client hyperparameter".
    """
    for name, domain in domains.items():
        if name not in known:
            raise UnknownNameError(kind, name, known)
        if known[name].integer and isinstance(domain, Uniform | LogUniform):
            raise InputError(f"{kind} {name} must be searched by integer, power_of_two or choice, got {domain}")
        for value in domain.options if isinstance(domain, Choice) else (domain.low, domain.high):
            try:
                known[name].check(name, value)
            except InputError as error:
                raise InputError(f"{kind} outside its range in {domain}: {error}") from None
