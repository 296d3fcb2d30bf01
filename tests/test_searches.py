"""The made-up federations of experiments/searches."""

import pytest
from experiment_script import load_script

from fedtune import rng
from fedtune.tuning.trial import Job, Trial


@pytest.fixture(scope="module")
def experiment():
    return load_script("searches")


def test_training_is_the_closed_form_in_any_number_of_jobs(experiment):
    """At a = b + 4 = 0, with 0.1 * 0.5^2 and 0.1^2 above the best; one error an interval, or all at once."""
    config = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "dropout": 0.3}
    limit = 0.04 + 0.025 + 0.01
    for landscape, share in {"tell": 0.06, "mislead": 0.125}.items():
        error = 0.9
        for rounds in (1, 2, 6):
            error = experiment.after(error, landscape, config, rounds)
        assert error == pytest.approx(limit + (0.9 - limit) * (1 - share) ** 9)


def test_random_search_has_the_best_of_those_that_ended(experiment):
    """25 at a time, each told after 81 rounds: the incumbent after 162 is the best told of 50."""
    trials = [experiment.draw_trial(3, number) for number in range(50)]
    true = [experiment.after(0.9, "mislead", trial.pool[0][0], 81) for trial in trials]
    told = [error + 0.01 * rng.stream(3, "noise", n, 81).standard_normal() for n, error in enumerate(true)]
    errors = experiment.simulate("mislead", "random", 3)
    assert errors[:2] == [pytest.approx(true[told.index(min(told[:n]))]) for n in (25, 50)]


def test_a_copy_starts_from_what_its_parent_had(experiment):
    parent, config = experiment.draw_trial(0, 0), experiment.draw_trial(0, 1).pool[0][0]
    federations = experiment.MadeUpFederations("tell", 0)
    federations.deliver(federations.start(Job(parent, 0, 3), 0, 0.0))
    attempt = federations.start(Job(Trial(1, {}, ((config,),), parent=0), 1, 6), 0, 3.0)
    assert attempt.finish_time == 6.0  # three rounds more
    federations.deliver(attempt)
    before = experiment.after(0.9, "tell", parent.pool[0][0], 3)
    assert federations._state[1] == (6, pytest.approx(experiment.after(before, "tell", config, 3)))
