import math

import pytest

from fedtune.errors import InputError
from fedtune.tuning.random_search import RandomSearch
from fedtune.tuning.trial import Job, Trial, Tuner


def draw(number):
    return Trial(number, {"learning_rate": float(number)}, (({},),))


def test_every_trial_is_drawn_afresh_and_trained_to_the_end():
    tuner = RandomSearch(draw, 81)
    assert isinstance(tuner, Tuner)
    jobs = [tuner.ask() for _ in range(3)]  # without a tell in between: nobody waits
    for job in jobs:
        tuner.tell(job, math.nan)
    assert [*jobs, tuner.ask()] == [Job(draw(number), 0, 81) for number in range(4)]


def test_it_ends_after_so_many_configurations():
    tuner = RandomSearch(draw, 81, num_configs=2)
    assert [job and job.trial.number for job in (tuner.ask(), tuner.ask(), tuner.ask())] == [0, 1, None]


def test_more_can_be_asked_for_and_no_fewer():
    tuner = RandomSearch(draw, 81, num_configs=2)
    for _ in range(3):
        tuner.ask()
    with pytest.raises(InputError, match="num_configs must be a whole number >= 3, got 2"):
        tuner.raise_num_configs(2)
    tuner.raise_num_configs(3)
    assert [job and job.trial.number for job in (tuner.ask(), tuner.ask())] == [2, None]
    endless = RandomSearch(draw, 81)
    endless.ask()
    endless.raise_num_configs(2)
    assert [job and job.trial.number for job in (endless.ask(), endless.ask())] == [1, None]


@pytest.mark.parametrize(("max_rounds", "num_configs"), [(0, None), (81, 0)])
def test_options_that_are_not_allowed(max_rounds, num_configs):
    with pytest.raises(InputError, match="must be a whole number >= 1, got 0"):
        RandomSearch(draw, max_rounds, num_configs)
