import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.tuning.rungs import Rung


class LiteralRung:
    """Lines 14 to 17 of Algorithm 3 as they stand, a sort at every decision; with the one departure marked."""

    def __init__(self, reduction_factor):
        self.reduction_factor = reduction_factor
        self.completed, self.promoted = {}, set()

    def record(self, number, error):
        self.completed[number] = error

    def promote(self):
        def rank(number):
            error = self.completed[number]
            return (0, error, number) if math.isfinite(error) else (1, 0, number)

        candidates = sorted(self.completed, key=rank)[: len(self.completed) // self.reduction_factor]
        promotable = [number for number in candidates if number not in self.promoted]
        promotable = [number for number in promotable if math.isfinite(self.completed[number])]  # the departure
        if not promotable:
            return None
        self.promoted.add(promotable[0])
        return promotable[0]


errors = st.floats(0, 1) | st.sampled_from([0.25, 0.5, 1.0, -0.0, math.nan, math.inf, -math.inf])


@given(st.integers(2, 5), st.lists(errors, max_size=60), st.randoms(use_true_random=False))
def test_a_rung_decides_as_the_literal_top_k(reduction_factor, told, random):
    """Trials finish in any order, and the rung is asked any number of times in between."""
    rung, literal = Rung(reduction_factor), LiteralRung(reduction_factor)
    numbers = list(range(len(told)))
    random.shuffle(numbers)
    for number, error in zip(numbers, told, strict=True):
        rung.record(number, error)
        literal.record(number, error)
        for _ in range(random.choice([0, 0, 1, 3])):
            assert rung.promote() == literal.promote()
    assert [rung.promote() for _ in told] == [literal.promote() for _ in told]
    assert len(rung) == len(told)


def test_too_few_to_promote_anyone():
    """Syne Tune 0.13 promotes the best of 2 at a reduction factor of 4."""
    rung = Rung(4)
    for number, error in enumerate([0.3, 0.1, 0.2]):
        rung.record(number, error)
        assert rung.promote() is None
    rung.record(3, 0.4)
    assert rung.promote() == 1
    assert rung.promote() is None


def test_ties_go_to_the_lower_number():
    rung = Rung(2)
    for number in (3, 1, 2, 0):
        rung.record(number, 0.5)
    assert [rung.promote(), rung.promote(), rung.promote()] == [0, 1, None]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_trial_that_diverged_is_never_promoted(bad):
    """Not even when it is reported first, nor when only such trials are left among the best."""
    rung = Rung(2)
    rung.record(0, bad)
    rung.record(1, bad)
    assert rung.promote() is None
    rung.record(2, 0.9)
    rung.record(3, bad)
    assert [rung.promote(), rung.promote()] == [2, None]


def test_one_that_is_no_longer_a_candidate_waits():
    """Number 0 is among the best floor(2 / 2) at first, falls out, and is back in once four have finished."""
    rung = Rung(2)
    rung.record(0, 0.5)
    rung.record(1, 0.6)
    rung.record(2, 0.4)
    assert [rung.promote(), rung.promote()] == [2, None]
    rung.record(3, 0.7)
    assert [rung.promote(), rung.promote()] == [0, None]
