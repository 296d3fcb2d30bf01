import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import InputError
from fedtune.executors.fair_share import fair_share


def test_the_example_of_section_3_5_3():
    """32 workers. A job of 8 configurations with kappa = 4 gets all; with a second that could use 64, 16 each."""
    assert fair_share(32, [8 * 4]) == [32]
    assert fair_share(32, [8 * 4, 64]) == [16, 16]


def test_what_one_cannot_use_goes_to_the_others():
    assert fair_share(32, [4, 64, 64]) == [4, 14, 14]
    assert fair_share(32, [4, 10, 64]) == [4, 10, 18]
    assert fair_share(32, [4, 10, 6]) == [4, 10, 6]  # 12 stay idle
    assert fair_share(32, [0, 64]) == [0, 32]


def test_weights():
    assert fair_share(32, [64, 64], [3, 1]) == [24, 8]
    assert fair_share(32, [12, 64, 64], [3, 1, 1]) == [12, 10, 10]
    assert fair_share(30, [64, 64, 64], [0.5, 0.25, 0.25]) == [16, 7, 7]  # of 15, 7.5 and 7.5


def test_fewer_workers_than_jobs():
    assert fair_share(2, [5, 5, 5]) == [1, 1, 0]
    assert fair_share(0, [5]) == [0]
    assert fair_share(5, []) == []


def water_level(num_workers, limits, weights):
    """The real-valued shares min(limit, level weight), with the level at which all workers are used, exactly."""
    if num_workers >= sum(limits):
        return [Fraction(limit) for limit in limits]
    left, weight, level = Fraction(num_workers), Fraction(sum(weights)), Fraction(0)
    for limit, each in sorted(zip(limits, weights, strict=True), key=lambda job: Fraction(job[0]) / job[1]):
        level = left / weight
        if level * each < limit:
            break
        left, weight = left - limit, weight - each
    return [min(Fraction(limit), level * each) for limit, each in zip(limits, weights, strict=True)]


@given(st.integers(0, 200), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)), min_size=1, max_size=8))
def test_shares_are_water_filling_in_whole_workers(num_workers, jobs):
    limits, weights = [limit for limit, _ in jobs], [weight for _, weight in jobs]
    shares = fair_share(num_workers, limits, weights)
    assert sum(shares) == min(num_workers, sum(limits))
    assert all(0 <= share <= limit for share, limit in zip(shares, limits, strict=True))
    # Nobody who could use one more has fewer for its weight than another would keep without it.
    for share, limit, weight in zip(shares, limits, weights, strict=True):
        if share < limit:
            assert all(
                Fraction(other, its) <= Fraction(share + 1, weight) for other, its in zip(shares, weights, strict=True)
            )
    # Rounded down, everybody has at least what the water gives.
    exact = water_level(num_workers, limits, weights)
    assert all(share >= math.floor(each) for share, each in zip(shares, exact, strict=True))


@given(st.integers(0, 100), st.lists(st.integers(0, 60), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_another_worker_takes_nobodys_away(num_workers, limits, random):
    weights = [random.randint(1, 5) for _ in limits]
    fewer, more = (fair_share(workers, limits, weights) for workers in (num_workers, num_workers + 1))
    assert all(a <= b for a, b in zip(fewer, more, strict=True))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((-1, [1]), "num_workers must be a whole number >= 0, got -1"),
        ((1, [1, -2]), "limit of study 1 must be a whole number >= 0, got -2"),
        ((1, [1], [0]), "weight of study 0 must be a finite number > 0, got 0"),
        ((1, [1, 1], [1]), "weights must be as many as limits, 2, got 1"),
    ],
)
def test_what_is_not_allowed(args, said):
    with pytest.raises(InputError) as raised:
        fair_share(*args)
    assert str(raised.value) == said
