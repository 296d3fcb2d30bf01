import itertools
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_cluster import completions

from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.async_hyperband import AsyncHyperband, shares
from fedtune.tuning.trial import Job, Trial, Tuner


def draw(number):
    return Trial(number, {}, (({},),))


def run(tuner, workers=1, count=10_000, seed=0):
    errors = random.Random(seed)
    jobs = completions(tuner, workers, lambda job: errors.random(), resumes=True)
    return [job for _, job in itertools.islice(jobs, count)]


@pytest.mark.parametrize(("n", "widths"), [(1000, [707, 220, 73]), (256, [182, 56, 18]), (68, [48, 15, 5])])
def test_the_shares_of_section_3_5_1(n, widths):
    """12/17, 15/68 and 5/68 of n, rounded down, and the rest to the first."""
    assert [Fraction(12, 17), Fraction(15, 68), Fraction(5, 68)] == [
        share / (Fraction(256, 5) + 16 + Fraction(16, 3))
        for share in (Fraction(256, 5), Fraction(64, 4), Fraction(16, 3))
    ]
    down = [n * 12 // 17, n * 15 // 68, n * 5 // 68]
    assert shares(n, 5, 4, 3) == widths == [n - down[1] - down[2], down[1], down[2]]


@given(st.integers(1, 5000), st.integers(1, 6), st.integers(2, 5), st.integers(1, 6))
def test_shares_add_up_and_train_for_equally_long(n, num_rungs, reduction_factor, num_brackets):
    num_brackets = min(num_brackets, num_rungs)
    widths = shares(n, num_rungs, reduction_factor, num_brackets)
    assert sum(widths) == n
    mean = [Fraction(num_rungs - s, reduction_factor ** (num_rungs - s - 1)) for s in range(num_brackets)]
    resources = [width * each for width, each in zip(widths, mean, strict=True)]
    # Each got its share but for less than one configuration, and the first up to one for each of the others more.
    even = n / sum(1 / each for each in mean)
    assert all(even - each < resource <= even for resource, each in zip(resources[1:], mean[1:], strict=True))
    assert even <= resources[0] < even + num_brackets * mean[0]


def test_the_defaults():
    tuner = AsyncHyperband(draw, 256, 1000)
    assert isinstance(tuner, Tuner)
    assert tuner.widths == [707, 220, 73]
    jobs = run(tuner)
    base = [job.rounds for job in jobs if job.rung == 0]
    assert base == [1] * 707 + [4] * 220 + [16] * 73
    assert {job.rounds for job in jobs} == {1, 4, 16, 64, 256}
    assert tuner.ask() is None
    by_bracket = [
        [job for job in jobs if lowest <= job.trial.number < highest]
        for lowest, highest in [(0, 707), (707, 927), (927, 1000)]
    ]
    for s, bracket in enumerate(by_bracket):
        assert {job.rounds for job in bracket} == {4 ** (s + k) for k in range(5 - s)}


@pytest.mark.parametrize(("mode", "num_brackets"), [("aggressive", 1), ("standard", 3), ("conservative", 5)])
def test_modes(mode, num_brackets):
    assert len(AsyncHyperband(draw, 256, mode=mode).widths) == num_brackets


def test_rungs_when_a_256th_is_no_whole_number_of_rounds():
    for max_rounds, reduction_factor, base in [
        (64, 4, [1, 4]),
        (1024, 4, [4, 16, 64]),
        (80, 4, [5, 20]),
        (81, 3, [1, 3, 9]),
    ]:
        tuner = AsyncHyperband(draw, max_rounds, reduction_factor=reduction_factor)
        jobs = run(tuner, count=sum(tuner.widths) * 2)
        assert sorted({job.rounds for job in jobs if job.rung == 0}) == base
    with pytest.raises(InputError) as raised:
        AsyncHyperband(draw, 81)
    assert (
        str(raised.value)
        == "max_rounds must be a multiple of reduction_factor (4), got 81; 64, 80, 96, 256 are allowed"
    )
    assert len(AsyncHyperband(draw, 81, min_rounds=81).widths) == 1


def test_without_n_it_loops_through_the_brackets():
    """R = 9, eta = 3: Hyperband's 9, 5 and 3; the standard mode runs the first two."""
    tuner = AsyncHyperband(draw, 9, reduction_factor=3)
    jobs = run(tuner, count=200)
    assert [job.rounds for job in jobs if job.rung == 0][:42] == 3 * ([1] * 9 + [3] * 5)


def test_a_bracket_keeps_its_rungs_from_pass_to_pass():
    """The second nine compete with the first, which all were better: nobody of them is promoted."""
    tuner = AsyncHyperband(draw, 9, reduction_factor=3, mode="aggressive")
    jobs = [
        job for _, job in itertools.islice(completions(tuner, 1, lambda job: job.trial.number / 100, resumes=True), 30)
    ]
    promoted = [job.trial.number for job in jobs if job.rung == 1]
    assert promoted == sorted(promoted)
    assert set(promoted) <= set(range(9))
    assert max(job.trial.number for job in jobs) >= 17


def test_promotions_of_any_bracket_go_before_new_configurations():
    tuner = AsyncHyperband(draw, 9, reduction_factor=3)
    jobs = [tuner.ask() for _ in range(14 + 1)]  # both brackets, and one of the next pass
    for job in jobs[9:12]:
        tuner.tell(job, 0.5)
    assert tuner.ask() == Job(draw(9), 1, 9)
    for job in jobs[:3]:
        tuner.tell(job, 0.5)
    assert tuner.ask() == Job(draw(0), 1, 3)
    assert tuner.ask().rung == 0


def test_promotions_of_the_first_bracket_go_first():
    tuner = AsyncHyperband(draw, 9, reduction_factor=3)
    jobs = [tuner.ask() for _ in range(14)]
    for job in (*jobs[9:12], *jobs[:3]):  # a trial of each bracket can be promoted
        tuner.tell(job, 0.5)
    assert [tuner.ask() for _ in range(2)] == [Job(draw(0), 1, 3), Job(draw(9), 1, 9)]


def test_more_configurations_are_shared_out_as_if_they_had_been_allowed_from_the_start():
    """R = 9 and eta = 3 share n in the ratio of 9 / 3 and 3 / 2; the first is filled up before the second."""
    tuner = AsyncHyperband(draw, 9, 17, reduction_factor=3)
    before = run(tuner)
    assert tuner.widths == shares(17, 3, 3, 2) == [12, 5]
    tuner.raise_num_configs(32)
    assert tuner.widths == shares(32, 3, 3, 2) == [22, 10]
    jobs = run(tuner)
    assert [job.rounds for job in jobs if job.rung == 0] == [1] * 10 + [3] * 5
    assert sum(job.rung == 0 for job in [*before, *jobs]) == 32
    assert {job.trial.number for job in jobs if job.rung == 0} == set(range(17, 32))


def test_what_more_can_be_asked_for():
    with pytest.raises(InputError, match="num_configs can be raised only if it was set"):
        AsyncHyperband(draw, 9, reduction_factor=3).raise_num_configs(100)
    tuner = AsyncHyperband(draw, 9, 17, reduction_factor=3)
    with pytest.raises(InputError, match="num_configs must be a whole number >= 18, got 17"):
        tuner.raise_num_configs(17)
    tuner = AsyncHyperband(draw, 4, 13, min_rounds=1, reduction_factor=2, mode="conservative")
    assert (shares(13, 3, 2, 3)[0], shares(14, 3, 2, 3)[0], shares(15, 3, 2, 3)[0]) == (7, 6, 7)
    with pytest.raises(InputError, match="num_configs must be >= 15 to leave the first bracket its 7 configurations"):
        tuner.raise_num_configs(14)


@pytest.mark.parametrize(("n", "enough"), [(360, 361), (68, 361)])
def test_too_few_configurations_for_a_bracket(n, enough):
    """256 are needed in the first bracket: of 360 it gets 360 - 79 - 26 = 255."""
    assert shares(360, 5, 4, 3) == [255, 79, 26]
    with pytest.raises(InputError) as raised:
        AsyncHyperband(draw, 256, n)
    assert str(raised.value) == (
        f"num_configs must be >= {enough} for each of 3 brackets to train one to max_rounds, got {n}; "
        "a larger min_rounds needs fewer"
    )
    jobs = run(AsyncHyperband(draw, 256, enough))
    assert all(
        any(job.rounds == 256 and job.trial.number in range(*bracket) for job in jobs)
        for bracket in [(0, 256), (256, 335), (335, 361)]
    )


def test_an_unknown_mode():
    with pytest.raises(UnknownNameError, match="unknown mode 'bold'; known: aggressive, conservative, standard"):
        AsyncHyperband(draw, 256, mode="bold")
