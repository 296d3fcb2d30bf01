"""The domains: what values a hyperparameter may take, how one is drawn, and how one is moved a little.

Every domain can `sample` a value, `perturb` a value, `clip` a value to the nearest one that it allows, and say whether
it `contains` a value. `to_unit` maps a value to [0, 1] on the domain's own scale, and `from_unit` maps it back. If a
domain has finitely many values, each has an equal share of [0, 1] and is mapped to the middle of its share.

Perturbing first clips a value that lies outside. It then moves the value by at most a fraction of the range on the
domain's own scale, and clips again, so that the result is always inside.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.errors import InputError, UnknownNameError

Number = float | int

LARGEST = 1e300  # the largest finite number here: so the difference of two numbers is finite too
LARGEST_WHOLE = 2**53  # up to here floats count exactly


@dataclass(frozen=True)
class Uniform:
    """Real numbers in [low, high], all equally likely."""

    low: Number
    high: Number

    def __post_init__(self) -> None:
        if not -LARGEST <= self.low < self.high <= LARGEST:
            raise InputError(f"uniform must have finite low < high, got [{self.low!r}, {self.high!r}]")

    def sample(self, rng: np.random.Generator) -> float:
        """A value drawn uniformly."""
        return self.clip(rng.uniform(self.low, self.high))

    def perturb(self, value: Number, rng: np.random.Generator, fraction: float) -> float:
        """The value moved by up to a fraction of the width either way, then clipped."""
        reach = fraction * (self.high - self.low)
        return self.clip(self.clip(value) + rng.uniform(-reach, reach))

    def clip(self, value: Number) -> float:
        """The nearest value in the range."""
        return float(min(max(value, self.low), self.high))

    def to_unit(self, value: Number) -> float:
        """The share of the range that lies below the value."""
        return (self.clip(value) - self.low) / (self.high - self.low)

    def from_unit(self, unit: float) -> float:
        """The value that has this share of the range below it."""
        return self.clip(self.low + unit * (self.high - self.low))

    def contains(self, value: Number) -> bool:
        """Whether the value is allowed as it is."""
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
        """A value whose logarithm is drawn uniformly."""
        return self.clip(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))

    def perturb(self, value: Number, rng: np.random.Generator, fraction: float) -> float:
        """The value multiplied or divided by up to (high / low) ** fraction, then clipped."""
        reach = fraction * (math.log(self.high) - math.log(self.low))
        # A factor, so that a fraction of 0 changes no bit; exp of more than 709 overflows.
        return self.clip(self.clip(value) * math.exp(min(rng.uniform(-reach, reach), 700.0)))

    def clip(self, value: Number) -> float:
        """The nearest value in the range."""
        return float(min(max(value, self.low), self.high))

    def to_unit(self, value: Number) -> float:
        """The share of the logarithmic range that lies below the value."""
        return (math.log(self.clip(value)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))

    def from_unit(self, unit: float) -> float:
        """The value that has this share of the logarithmic range below it."""
        return self.clip(math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low))))

    def contains(self, value: Number) -> bool:
        """Whether the value is allowed as it is."""
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
        """A whole number drawn uniformly."""
        return int(rng.integers(self.low, self.high, endpoint=True))

    def perturb(self, value: Number, rng: np.random.Generator, fraction: float) -> int:
        """The value moved by up to a fraction of the range, rounded up to whole steps, then clipped."""
        return self.clip(self.clip(value) + _whole_step(self.high - self.low, rng, fraction))

    def clip(self, value: Number) -> int:
        """The nearest whole number in the range."""
        return round(min(max(value, self.low), self.high))

    def to_unit(self, value: Number) -> float:
        """The middle of the number's share of [0, 1]."""
        return _middle(self.clip(value) - self.low, self.high - self.low + 1)

    def from_unit(self, unit: float) -> int:
        """The whole number in whose share of [0, 1] this lies."""
        return self.low + _share(unit, self.high - self.low + 1)

    def contains(self, value: Number) -> bool:
        """Whether the value is allowed as it is."""
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
        """A power drawn uniformly."""
        return 1 << int(rng.integers(self.low.bit_length() - 1, self.high.bit_length() - 1, endpoint=True))

    def perturb(self, value: Number, rng: np.random.Generator, fraction: float) -> int:
        """The value with its exponent moved by up to a fraction of the range of exponents, rounded up; then clipped."""
        return self.clip(
            self.clip(value) * 2.0 ** _whole_step(self.high.bit_length() - self.low.bit_length(), rng, fraction)
        )

    def clip(self, value: Number) -> int:
        """The nearest power by ratio."""
        return 1 << round(math.log2(min(max(value, self.low), self.high)))

    def to_unit(self, value: Number) -> float:
        """The middle of the power's share of [0, 1]."""
        return _middle(self.clip(value).bit_length() - self.low.bit_length(), self._num_values)

    def from_unit(self, unit: float) -> int:
        """The power in whose share of [0, 1] this lies."""
        return self.low << _share(unit, self._num_values)

    @property
    def _num_values(self) -> int:
        return self.high.bit_length() - self.low.bit_length() + 1

    def contains(self, value: Number) -> bool:
        """Whether the value is allowed as it is."""
        return self.clip(value) == value


@dataclass(frozen=True)
class Choice:
    """A few numbers, all equally likely."""

    options: tuple[Number, ...]

    def __post_init__(self) -> None:
        if not self.options or not all(abs(option) <= LARGEST for option in self.options):
            raise InputError(f"choice must have finite numbers, one or more, got {list(self.options)!r}")

    def sample(self, rng: np.random.Generator) -> Number:
        """An option drawn uniformly."""
        return self.options[int(rng.integers(len(self.options)))]

    def perturb(self, value: Number, rng: np.random.Generator, fraction: float) -> Number:
        """The nearest option: options have no scale, so an option stays as it is."""
        return self.clip(value)

    def clip(self, value: Number) -> Number:
        """The nearest option; the first one of equally near options."""
        return min(self.options, key=lambda option: abs(option - value))

    def to_unit(self, value: Number) -> float:
        """The middle of the option's share of [0, 1]."""
        return _middle(self.options.index(self.clip(value)), len(self.options))

    def from_unit(self, unit: float) -> Number:
        """The option in whose share of [0, 1] this lies."""
        return self.options[_share(unit, len(self.options))]

    def contains(self, value: Number) -> bool:
        """Whether the value is an option."""
        return value in self.options


Domain = Uniform | LogUniform | Integer | PowerOfTwo | Choice

FORMS: dict[str, type[Domain]] = {
    "uniform": Uniform,
    "log_uniform": LogUniform,
    "integer": Integer,
    "power_of_two": PowerOfTwo,
    "choice": Choice,
}


def parse_domain(name: str, value: Any) -> Domain:
    """The domain of hyperparameter `name` as it is written in settings, for example {log_uniform = [1e-4, 1.0]}."""
    if not isinstance(value, Mapping) or len(value) != 1:
        raise InputError(f"{name} must be a table with one key, such as {{uniform = [0.0, 0.5]}}, got {value!r}")
    form, given = next(iter(value.items()))
    if form not in FORMS:
        raise UnknownNameError(f"domain of {name}", form, FORMS)
    if not isinstance(given, list | tuple) or (form != "choice" and len(given) != 2):
        raise InputError(f"{name}: {form} must be {'a list' if form == 'choice' else '[low, high]'}, got {given!r}")
    whole = form in ("integer", "power_of_two")
    if not all(is_number(number) and (isinstance(number, int) or not whole) for number in given):
        raise InputError(f"{name}: {form} must have {'whole ' if whole else ''}numbers only, got {given!r}")
    try:
        return Choice(tuple(given)) if form == "choice" else FORMS[form](*given)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def is_number(value: Any) -> bool:
    """Whether the value is a float or an int; true and false are not numbers."""
    return isinstance(value, float | int) and not isinstance(value, bool)


def _whole_step(width: int, rng: np.random.Generator, fraction: float) -> int:
    """A step in [-reach, reach], 0 included, where reach is the fraction of the width rounded up.

    At the fraction of 0.1 of Khodak et al. (arXiv 2106.04502), epochs 1..5 and batch sizes 2^3..2^7 move by
    one at most, as in their code. At a fraction of 0 nothing moves.
    """
    reach = math.ceil(fraction * width)
    return int(rng.integers(-reach, reach, endpoint=True))


def _middle(index: int, size: int) -> float:
    """The middle of the index-th of `size` equal shares of [0, 1]."""
    return (index + 0.5) / size


def _share(unit: float, size: int) -> int:
    """[0, 1] is divided into `size` equal shares: the index of the share that contains the number."""
    return min(int(unit * size), size - 1)
