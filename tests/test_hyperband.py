import itertools

import pytest
from simulated_cluster import completions

from fedtune.errors import InputError
from fedtune.tuning.hyperband import bracket_plans, hyperband
from fedtune.tuning.rungs import rung_rounds
from fedtune.tuning.trial import Trial, Tuner


def draw(number):
    return Trial(number, {}, (({},),))


def plans(max_rounds, **options):
    return bracket_plans(rung_rounds(max_rounds, 1, 3), 3, **options)


def budget(plan):
    """The rounds of a bracket whose jobs all start afresh."""
    return sum(plan.num_configs // 3**i * rounds for i, rounds in enumerate(plan.rung_rounds))


def test_it_is_a_tuner():
    assert isinstance(hyperband(draw, 81), Tuner)


def test_the_brackets_of_81_rounds():
    assert [plan.num_configs for plan in plans(81)] == [81, 34, 15, 8, 5]
    assert [plan.rung_rounds[0] for plan in plans(81)] == [1, 3, 9, 27, 81]
    assert [budget(plan) for plan in plans(81)] == [405, 363, 351, 378, 405]
    assert sum(budget(plan) for plan in plans(81)) == 1902


def test_the_well_known_table_takes_the_floor_first():
    assert [plan.num_configs for plan in plans(81, floor_first=True)] == [81, 27, 9, 6, 5]


def test_243_rounds_have_six_brackets():
    """Not five, as floor(log(243) / log(3)) = 4 would have it. n = ceil(6 * 3^(5 - s) / (6 - s))."""
    assert [plan.num_configs for plan in plans(243)] == [243, 98, 41, 18, 9, 6]


def test_brackets_come_from_the_most_to_the_least_aggressive_and_again():
    """One worker, for twice the budget of all brackets; 1, 1, 1, 2 and 5 of a bracket train for 81 rounds."""
    run = completions(hyperband(draw, 81), 1, lambda job: 1 / (1 + job.trial.number), resumes=False)
    jobs = [job for _, job in itertools.takewhile(lambda event: event[0] <= 2 * 1902, run)]
    drawn = [job.rounds for job in jobs if job.rung == 0]
    once = [1] * 81 + [3] * 34 + [9] * 15 + [27] * 8 + [81] * 5
    assert drawn == 2 * once
    assert len([job for job in jobs if job.rounds == 81]) == 2 * (1 + 1 + 1 + 2 + 5)


def test_a_place_that_would_be_free_goes_to_the_next_bracket():
    tuner = hyperband(draw, 9)
    jobs = [tuner.ask() for _ in range(9 + 5 + 3 + 1)]
    assert [job.rounds for job in jobs] == [1] * 9 + [3] * 5 + [9] * 3 + [1]
    for job in jobs[:9]:
        tuner.tell(job, 0.5)
    assert (tuner.ask().rung, tuner.ask().trial.number) == (1, 1)


def test_options_that_are_not_allowed():
    with pytest.raises(InputError, match="max_rounds must be a multiple of reduction_factor"):
        hyperband(draw, 100)
