import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.domains import Choice, Domain, Integer, LogUniform, PowerOfTwo, Uniform, parse_domain

DOMAINS = [
    Uniform(-2.0, 0.5),
    LogUniform(1e-4, 1.0),
    Integer(1, 5),
    Integer(-3, 40),
    PowerOfTwo(8, 128),
    Choice((0.0, 0.9, 4)),
]
domains = st.sampled_from(DOMAINS)
seeds = st.integers(0, 2**32)


def scale(domain: Domain, value: float) -> float:
    """Where a value lies on the scale that the domain is perturbed on."""
    if isinstance(domain, LogUniform):
        return math.log(value)
    return math.log2(value) if isinstance(domain, PowerOfTwo) else float(value)


def reach(domain: Domain, fraction: float) -> float:
    """How far a perturbation may go on that scale."""
    if isinstance(domain, Choice):
        return 0.0
    width = fraction * (scale(domain, domain.high) - scale(domain, domain.low))
    return math.ceil(width) if isinstance(domain, Integer | PowerOfTwo) else width


@given(domains, seeds)
def test_samples_are_plain_numbers_of_the_domain(domain, seed):
    value = domain.sample(np.random.default_rng(seed))
    assert type(value) in (int, float)
    assert domain.contains(value)


@given(domains, seeds)
def test_to_unit_and_back(domain, seed):
    value = domain.sample(np.random.default_rng(seed))
    unit = domain.to_unit(value)
    assert 0 <= unit <= 1
    back = domain.from_unit(unit)
    assert type(back) is type(value)
    assert back == pytest.approx(value, rel=1e-12, abs=1e-12)
    if not isinstance(domain, Uniform | LogUniform):
        assert back == value
        assert domain.to_unit(back) == unit


@given(domains, st.floats(0, 1))
def test_from_unit_follows_the_scale(domain, unit):
    """Real numbers by their place on the scale; of k values each has the share [i / k, (i + 1) / k)."""
    value = domain.from_unit(unit)
    assert domain.contains(value)
    if isinstance(domain, Uniform | LogUniform):
        low, high = scale(domain, domain.low), scale(domain, domain.high)
        assert scale(domain, value) == pytest.approx(low + unit * (high - low), abs=1e-12)
        return
    options = {
        Integer: lambda: range(domain.low, domain.high + 1),
        PowerOfTwo: lambda: [8, 16, 32, 64, 128],
        Choice: lambda: domain.options,
    }[type(domain)]()
    assert value == options[min(int(unit * len(options)), len(options) - 1)]
    assert domain.to_unit(value) == (list(options).index(value) + 0.5) / len(options)


@pytest.mark.parametrize("domain", [Uniform(-2.0, 0.5), LogUniform(1e-4, 1.0)])
def test_samples_are_uniform_on_the_scale(domain):
    """False alarm below 2 exp(-2 * 4000 * 0.05^2) = 4e-9 (Dvoretzky, Kiefer and Wolfowitz, with Massart's constant)."""
    rng = np.random.default_rng(0)
    low, high = scale(domain, domain.low), scale(domain, domain.high)
    quantiles = np.sort([(scale(domain, domain.sample(rng)) - low) / (high - low) for _ in range(4000)])
    assert np.abs(quantiles - np.linspace(0, 1, 4000)).max() < 0.05


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        (Integer(1, 5), {1, 2, 3, 4, 5}),
        (PowerOfTwo(8, 128), {8, 16, 32, 64, 128}),
        (Choice((0.0, 0.9)), {0.0, 0.9}),
    ],
)
def test_every_value_of_a_finite_domain_is_sampled_equally_often(domain, values):
    """False alarm below 5 * 2 exp(-2 * 4000 * 0.05^2) = 2e-8 (Hoeffding, for each value)."""
    rng = np.random.default_rng(0)
    drawn = [domain.sample(rng) for _ in range(4000)]
    assert set(drawn) == values
    assert all(abs(drawn.count(value) / 4000 - 1 / len(values)) < 0.05 for value in values)


@given(domains, seeds, st.floats(-1e6, 1e6) | st.integers(-100, 300), st.floats(0, 1))
def test_a_perturbed_value_is_inside_and_near(domain, seed, value, fraction):
    perturbed = domain.perturb(value, np.random.default_rng(seed), fraction)
    assert type(perturbed) in (int, float)
    assert domain.contains(perturbed)
    moved = abs(scale(domain, perturbed) - scale(domain, domain.clip(value)))
    assert moved <= reach(domain, fraction) + 1e-9


@pytest.mark.parametrize("domain", [Uniform(-2.0, 0.5), LogUniform(1e-4, 1.0)])
def test_a_real_number_moves_as_far_as_it_may_and_no_distance_is_likelier(domain):
    """False alarm below 2 exp(-2 * 4000 * 0.05^2) = 4e-9 (Dvoretzky, Kiefer and Wolfowitz, with Massart's constant)."""
    rng = np.random.default_rng(0)
    centre = domain.from_unit(0.5)  # so far from both ends that nothing is clipped
    moves = [scale(domain, domain.perturb(centre, rng, 0.2)) - scale(domain, centre) for _ in range(4000)]
    quantiles = np.sort(moves) / (2 * reach(domain, 0.2)) + 0.5
    assert np.abs(quantiles - np.linspace(0, 1, 4000)).max() < 0.05


@given(domains, seeds)
def test_a_fraction_of_zero_changes_no_bit(domain, seed):
    rng = np.random.default_rng(seed)
    value = domain.sample(rng)
    assert domain.perturb(value, rng, 0.0) == value


@pytest.mark.parametrize(
    ("domain", "value", "expected"),
    [
        (Integer(1, 5), 3, {2, 3, 4}),  # ceil(0.1 * (5 - 1)) = 1
        (Integer(1, 5), 5, {4, 5}),
        (Integer(0, 100), 50, set(range(40, 61))),
        (PowerOfTwo(8, 128), 32, {16, 32, 64}),  # ceil(0.1 * (7 - 3)) = 1
        (PowerOfTwo(8, 128), 10, {8, 16}),  # 10 is no power of two: the nearest by ratio is 8
        (PowerOfTwo(8, 128), 1, {8, 16}),
        (Choice((0.0, 0.9)), 0.9, {0.9}),
        (Choice((0.0, 0.9)), 0.5, {0.9}),
    ],
)
def test_whole_steps(domain, value, expected):
    """False alarm below 21 (20 / 21)^1000 = 1e-20."""
    rng = np.random.default_rng(0)
    assert {domain.perturb(value, rng, 0.1) for _ in range(1000)} == expected


def test_a_centre_outside_is_clipped_before_it_is_moved():
    rng = np.random.default_rng(0)
    perturbed = [LogUniform(1e-4, 1.0).perturb(10.0, rng, 0.1) for _ in range(200)]
    assert min(perturbed) < 0.9
    assert max(perturbed) <= 1.0
    assert LogUniform(1e-5, 1e-1).perturb(0.0, rng, 0.1) <= 1e-5 * (1e4**0.1) * (1 + 1e-12)


def test_an_enormous_range_does_not_overflow():
    rng = np.random.default_rng(0)
    for domain in (LogUniform(5e-324, 1e300), Uniform(-1e300, 1e300)):
        values = [domain.perturb(1.0, rng, 1.0) for _ in range(100)] + [domain.sample(rng) for _ in range(100)]
        assert all(domain.contains(value) for value in values)


@pytest.mark.parametrize(
    ("value", "domain"),
    [
        ({"uniform": [0, 0.5]}, Uniform(0, 0.5)),
        ({"log_uniform": [1e-4, 1]}, LogUniform(1e-4, 1)),
        ({"integer": [1, 5]}, Integer(1, 5)),
        ({"power_of_two": [8, 128]}, PowerOfTwo(8, 128)),
        ({"choice": [0.0, 0.9]}, Choice((0.0, 0.9))),
        ({"choice": [7]}, Choice((7,))),
    ],
)
def test_parse_domain(value, domain):
    assert parse_domain("it", value) == domain


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.1, "a table with one key"),
        ({}, "a table with one key"),
        ({"uniform": [0, 1], "integer": [0, 1]}, "a table with one key"),
        ({"uniform": 3}, "[low, high]"),
        ({"uniform": [0, 1, 2]}, "[low, high]"),
        ({"uniform": [1, 0]}, "low < high"),
        ({"uniform": [1, 1]}, "low < high"),
        ({"uniform": [0, math.inf]}, "finite"),
        ({"uniform": [math.nan, 1]}, "finite"),
        ({"uniform": [0, 10**400]}, "finite"),
        ({"uniform": ["0", 1]}, "numbers only"),
        ({"uniform": [False, 1]}, "numbers only"),
        ({"log_uniform": [0, 1]}, "0 < low < high"),
        ({"log_uniform": [-1, 1]}, "0 < low < high"),
        ({"log_uniform": [1, 0.1]}, "0 < low < high"),
        ({"integer": [1, 5.0]}, "whole numbers only"),
        ({"integer": [5, 1]}, "low < high"),
        ({"integer": [1, 2**60]}, "2^53"),
        ({"power_of_two": [8, 100]}, "powers of two"),
        ({"power_of_two": [0, 8]}, "powers of two"),
        ({"power_of_two": [8.0, 16]}, "whole numbers only"),
        ({"power_of_two": [16, 8]}, "powers of two low < high"),
        ({"choice": []}, "one or more"),
        ({"choice": ["sgd"]}, "numbers only"),
        ({"choice": 3}, "a list"),
    ],
)
def test_a_bad_domain_is_one_line_with_name_value_and_what_is_allowed(value: Any, said: str):
    with pytest.raises(InputError) as raised:
        parse_domain("space.client.dropout", value)
    message = str(raised.value)
    assert message.startswith("space.client.dropout")
    assert said in message
    assert "\n" not in message
    got = value if not isinstance(value, dict) or len(value) != 1 else next(iter(value.values()))
    assert repr(got) in message


def test_an_unknown_domain_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="'normal'; known: choice, integer, log_uniform, power_of_two, uniform"):
        parse_domain("dropout", {"normal": [0, 1]})
