import math

import pytest

from fedtune.tuning.trial import Score, incumbent, longer_incumbent, rank_key


def test_nan_and_inf_rank_last_and_ties_go_to_the_lower_number():
    errors = [0.5, math.nan, 0.1, math.inf, 0.5, -math.inf, 0.1]
    ranked = sorted(range(len(errors)), key=lambda number: rank_key(errors[number], number))
    assert ranked == [2, 6, 0, 4, 1, 3, 5]


def test_the_incumbent_is_the_best_at_the_highest_number_of_rounds():
    assert incumbent([]) is None
    assert incumbent([Score(0, 1, 0.1), Score(1, 3, 0.4), Score(2, 3, 0.3), Score(3, 3, 0.3)]) == Score(2, 3, 0.3)


def test_a_trial_that_diverged_is_the_incumbent_only_where_all_did():
    assert incumbent([Score(0, 1, 0.5), Score(1, 9, math.nan)]) == Score(0, 1, 0.5)
    assert incumbent([Score(1, 9, math.inf), Score(0, 9, math.nan), Score(2, 3, math.nan)]).trial == 0


@pytest.mark.parametrize(
    ("shortened", "wins"),
    [
        (Score(1, 47, 0.2), True),
        (Score(1, 28, 0.3), True),  # trained on, and no worse
        (Score(1, 28, 0.31), False),  # one round more is no reason
        (Score(0, 47, 0.2), True),  # the incumbent itself, trained on
        (Score(0, 47, 0.4), False),  # it got worse: its earlier state is the answer
        (Score(1, 20, 0.1), False),  # with fewer rounds it is not compared
        (Score(1, 47, math.nan), False),
    ],
)
def test_a_shortened_job_never_makes_the_incumbent_worse(shortened, wins):
    best = Score(0, 27, 0.3)
    assert longer_incumbent(best, shortened) == (shortened if wins else best)


def test_a_shortened_job_is_better_than_one_that_diverged():
    assert longer_incumbent(Score(0, 27, math.nan), Score(1, 1, 0.5)) == Score(1, 1, 0.5)
    assert longer_incumbent(Score(0, 27, math.nan), Score(1, 1, math.inf)) == Score(0, 27, math.nan)
