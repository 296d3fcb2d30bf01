import pytest

from fedtune.errors import InputError
from fedtune.tuning.one_federation import OneFederation
from fedtune.tuning.trial import Job, Trial, Tuner


def draw(number):
    return Trial(number, {}, (({},),))


def test_one_trial_to_max_rounds_and_on_to_total_rounds():
    tuner = OneFederation(draw, 81, 405)
    assert isinstance(tuner, Tuner)
    first = tuner.ask()
    assert first == Job(draw(0), 0, 81)
    assert tuner.ask() is None  # the trial is busy
    tuner.tell(first, 0.5)
    second = tuner.ask()
    assert second == Job(draw(0), 1, 405)
    tuner.tell(second, 0.4)
    assert tuner.ask() is None


def test_one_job_when_there_is_no_more_to_spend():
    tuner = OneFederation(draw, 81, 81)
    job = tuner.ask()
    assert job == Job(draw(0), 0, 81)
    tuner.tell(job, 0.5)
    assert tuner.ask() is None


@pytest.mark.parametrize(
    ("max_rounds", "total_rounds", "said"),
    [
        (0, 10, "max_rounds must be a whole number >= 1, got 0"),
        (81, 80, "total_rounds must be a whole number >= 81, got 80"),
    ],
)
def test_rounds_that_are_not_allowed(max_rounds, total_rounds, said):
    with pytest.raises(InputError, match=said):
        OneFederation(draw, max_rounds, total_rounds)
