"""Search spaces: what values a hyperparameter may take, how one is drawn, and how one is moved a little.

A configuration maps hyperparameter names to plain floats and ints. Every domain can `sample` a value, `perturb` one,
`clip` one to the nearest it allows, and say whether it `contains` one; `to_unit` and `from_unit` map it to [0, 1] and
back on its own scale, where each of finitely many values has an equal share of [0, 1] and sits in the middle of it.
Perturbing moves by at most a fraction of the
range on the domain's own scale, and first clips a value that lies outside, so that the result is always inside.

The spaces at the end are those of Khodak et al., NeurIPS 2021 (arXiv 2106.04502). Departure: momentum stops at 0.999,
since at 1 the velocity never decays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.errors import InputError, UnknownNameError

Number = float | int
Config = Mapping[str, Number]

LARGEST = 1e300  # the largest finite number here, so that differences of two are finite too
LARGEST_WHOLE = 2**53  # up to here floats count exactly


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
    """The value as an int or a finite float; InputError unless it is one and lies in the range."""
    allowed = (
        _is_number(value)
        and (isinstance(value, int) or not integer)
        and abs(value) <= LARGEST
        and (low < value if low_open else low <= value)
        and (value < high if high_open else value <= high)
    )
    if not allowed:
        kind = "a whole number" if integer else "a finite number"
        ends = [f"{'>' if low_open else '>='} {low}"] if low > -math.inf else []
        ends += [f"{'<' if high_open else '<='} {high}"] if high < math.inf else []
        raise InputError(f"{name} must be {' '.join([kind, ' and '.join(ends)]).strip()}, got {value!r}")
    return int(value) if integer else float(value)


@dataclass(frozen=True)
class Hyperparameter:
    """The default and the range of one hyperparameter, as whatever reads it declares them.

    The ends belong to the range unless they are open.
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
        """The value as an int or float; InputError if it is not allowed."""
        return checked_number(
            name,
            value,
            low=self.low,
            high=self.high,
            low_open=self.low_open,
            high_open=self.high_open,
            integer=self.integer,
        )


@dataclass(frozen=True)
class Uniform:
    """Real numbers in [low, high], all equally likely."""

    low: Number
    high: Number

    def __post_init__(self) -> None:
        if not -LARGEST <= self.low < self.high <= LARGEST:
            raise InputError(f"uniform must have finite low < high, got [{self.low!r}, {self.high!r}]")

    def sample(self, rng: np.random.Generator) -> float:
        return self.clip(rng.uniform(self.low, self.high))

    def perturb(self, value: Number, rng: np.random.Generator, fraction: float) -> float:
        """The value moved by up to a fraction of the width either way, then clipped."""
        reach = fraction * (self.high - self.low)
        return self.clip(self.clip(value) + rng.uniform(-reach, reach))

    def clip(self, value: Number) -> float:
        return float(min(max(value, self.low), self.high))

    def to_unit(self, value: Number) -> float:
        return (self.clip(value) - self.low) / (self.high - self.low)

    def from_unit(self, unit: float) -> float:
        return self.clip(self.low + unit * (self.high - self.low))

    def contains(self, value: Number) -> bool:
        return self.clip(value) == value


@dataclass(frozen=True)
class LogUniform:
    """Real numbers in [low, high], low > 0, whose logarithms are equally likely."""

    low: Number
    high: Number

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high <= LARGEST:
            raise InputError(f"log_uniform must have finite 0 < low < high, got [{self.low!r}, {self.high!r}]")

    def sample(self, rng: np.random.Generator) -> float:
        return self.clip(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))

    def perturb(self, value: Number, rng: np.random.Generator, fraction: float) -> float:
        """The value multiplied or divided by up to (high / low) ** fraction, then clipped."""
        reach = fraction * (math.log(self.high) - math.log(self.low))
        # A factor, so that a fraction of 0 changes no bit; exp of more than 709 overflows.
        return self.clip(self.clip(value) * math.exp(min(rng.uniform(-reach, reach), 700.0)))

    def clip(self, value: Number) -> float:
        return float(min(max(value, self.low), self.high))

    def to_unit(self, value: Number) -> float:
        return (math.log(self.clip(value)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))

    def from_unit(self, unit: float) -> float:
        return self.clip(math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low))))

    def contains(self, value: Number) -> bool:
        return self.clip(value) == value


@dataclass(frozen=True)
class Integer:
    """Whole numbers in [low, high], all equally likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not -LARGEST_WHOLE <= self.low < self.high <= LARGEST_WHOLE:
            raise InputError(f"integer must have low < high within ±2^53, got [{self.low!r}, {self.high!r}]")

    def sample(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high, endpoint=True))

    def perturb(self, value: Number, rng: np.random.Generator, fraction: float) -> int:
        """The value moved by up to a fraction of the range, rounded up to whole steps, then clipped."""
        return self.clip(self.clip(value) + _whole_step(self.high - self.low, rng, fraction))

    def clip(self, value: Number) -> int:
        return round(min(max(value, self.low), self.high))

    def to_unit(self, value: Number) -> float:
        return _middle(self.clip(value) - self.low, self.high - self.low + 1)

    def from_unit(self, unit: float) -> int:
        return self.low + _share(unit, self.high - self.low + 1)

    def contains(self, value: Number) -> bool:
        return self.clip(value) == value


@dataclass(frozen=True)
class PowerOfTwo:
    """The powers of two from low to high, all equally likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not (self.low.bit_count() == self.high.bit_count() == 1 and 0 < self.low < self.high <= LARGEST_WHOLE):
            raise InputError(f"power_of_two must have powers of two low < high <= 2^53, got [{self.low}, {self.high}]")

    def sample(self, rng: np.random.Generator) -> int:
        return 1 << int(rng.integers(self.low.bit_length() - 1, self.high.bit_length() - 1, endpoint=True))

    def perturb(self, value: Number, rng: np.random.Generator, fraction: float) -> int:
        """The value with its exponent moved by up to a fraction of the exponents' range, rounded up; then clipped."""
        return self.clip(
            self.clip(value) * 2.0 ** _whole_step(self.high.bit_length() - self.low.bit_length(), rng, fraction)
        )

    def clip(self, value: Number) -> int:
        """The nearest power by ratio."""
        return 1 << round(math.log2(min(max(value, self.low), self.high)))

    def to_unit(self, value: Number) -> float:
        return _middle(self.clip(value).bit_length() - self.low.bit_length(), self._num_values)

    def from_unit(self, unit: float) -> int:
        return self.low << _share(unit, self._num_values)

    @property
    def _num_values(self) -> int:
        return self.high.bit_length() - self.low.bit_length() + 1

    def contains(self, value: Number) -> bool:
        return self.clip(value) == value


@dataclass(frozen=True)
class Choice:
    """A few numbers, all equally likely."""

    options: tuple[Number, ...]

    def __post_init__(self) -> None:
        if not self.options or not all(abs(option) <= LARGEST for option in self.options):
            raise InputError(f"choice must have finite numbers, one or more, got {list(self.options)!r}")

    def sample(self, rng: np.random.Generator) -> Number:
        return self.options[int(rng.integers(len(self.options)))]

    def perturb(self, value: Number, rng: np.random.Generator, fraction: float) -> Number:
        """The value as it is when it is an option, for options have no scale to move along; else the nearest option."""
        return self.clip(value)

    def clip(self, value: Number) -> Number:
        return min(self.options, key=lambda option: abs(option - value))

    def to_unit(self, value: Number) -> float:
        return _middle(self.options.index(self.clip(value)), len(self.options))

    def from_unit(self, unit: float) -> Number:
        return self.options[_share(unit, len(self.options))]

    def contains(self, value: Number) -> bool:
        return value in self.options


Domain = Uniform | LogUniform | Integer | PowerOfTwo | Choice

FORMS: dict[str, type[Domain]] = {
    "uniform": Uniform,
    "log_uniform": LogUniform,
    "integer": Integer,
    "power_of_two": PowerOfTwo,
    "choice": Choice,
}


@dataclass(frozen=True)
class SearchSpace:
    """The domains of what is searched: of local training, and of the server's aggregation."""

    client: Mapping[str, Domain]
    server: Mapping[str, Domain]


def sample(domains: Mapping[str, Domain], rng: np.random.Generator) -> dict[str, Number]:
    """One random value for each domain; the order in which the domains were written down does not matter."""
    return {name: domains[name].sample(rng) for name in sorted(domains)}


def perturb(
    domains: Mapping[str, Domain], config: Config, rng: np.random.Generator, fraction: float
) -> dict[str, Number]:
    """The configuration with each hyperparameter that has a domain perturbed; the others keep their value."""
    return {**config, **{name: domains[name].perturb(config[name], rng, fraction) for name in sorted(domains)}}


def parse_domain(name: str, value: Any) -> Domain:
    """The domain of hyperparameter `name` as settings write it, for example {log_uniform = [1e-4, 1.0]}."""
    if not isinstance(value, Mapping) or len(value) != 1:
        raise InputError(f"{name} must be a table with one key, such as {{uniform = [0.0, 0.5]}}, got {value!r}")
    form, given = next(iter(value.items()))
    if form not in FORMS:
        raise UnknownNameError(f"domain of {name}", form, FORMS)
    if not isinstance(given, list | tuple) or (form != "choice" and len(given) != 2):
        raise InputError(f"{name}: {form} must be {'a list' if form == 'choice' else '[low, high]'}, got {given!r}")
    whole = form in ("integer", "power_of_two")
    if not all(_is_number(number) and (isinstance(number, int) or not whole) for number in given):
        raise InputError(f"{name}: {form} must have {'whole ' if whole else ''}numbers only, got {given!r}")
    try:
        return Choice(tuple(given)) if form == "choice" else FORMS[form](*given)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def check_space(domains: Mapping[str, Domain], known: Mapping[str, Hyperparameter], kind: str) -> None:
    """Raise unless every domain is of a known hyperparameter and within its range; `kind` is what to call them."""
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


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _whole_step(width: int, rng: np.random.Generator, fraction: float) -> int:
    """A step in [-reach, reach], 0 included, where reach is the fraction of the width rounded up.

    So the authors' epochs 1..5 and batch sizes 2^3..2^7 move by one at most at their fraction of 0.1, as in their code,
    and nothing moves at 0.
    """
    reach = math.ceil(fraction * width)
    return int(rng.integers(-reach, reach, endpoint=True))


def _middle(index: int, size: int) -> float:
    """The middle of the index-th of `size` equal shares of [0, 1]."""
    return (index + 0.5) / size


def _share(unit: float, size: int) -> int:
    """Which of `size` equal shares of [0, 1] a number lies in."""
    return min(int(unit * size), size - 1)


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
