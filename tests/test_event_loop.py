import math
from dataclasses import replace

import pytest

from fedtune import rng
from fedtune.simulation.event_loop import Attempt, EventLoop
from fedtune.tuning.asha import ASHA
from fedtune.tuning.random_search import RandomSearch
from fedtune.tuning.successive_halving import successive_halving
from fedtune.tuning.trial import Job, Trial


def draw(number):
    return Trial(number, {}, (({},),))


class Synthetic:
    """Jobs as long as their rounds, or as the rounds since the trial's last job; errors at random, one a trial."""

    def __init__(self, until=math.inf, *, afresh=False, drops=()):
        self.until, self.afresh, self.drops = until, afresh, set(drops)  # (trial, attempt) that are dropped
        self.trained, self.done, self.log = {}, [], []

    def start(self, job, number, now):
        if now >= self.until:
            return None
        self.log.append((job.trial.number, job.rung, number))
        duration = job.rounds - (0 if self.afresh else self.trained.get(job.trial.number, 0))
        return Attempt(job, number, now + duration, (job.trial.number, number) in self.drops)

    def ready(self, attempt):
        return True

    def deliver(self, attempt):
        self.trained[attempt.job.trial.number] = attempt.job.rounds
        self.done.append((attempt.finish_time, attempt.job))
        return rng.stream(0, "error", attempt.job.trial.number).random()

    def fail(self, attempt, then):
        self.log.append(("dropped", attempt.job.trial.number, then))


def run(tuner, workload, parallel_jobs, **options):
    assert list(EventLoop(tuner, workload, parallel_jobs, **options).run()) == []  # it never waits
    return workload


@pytest.mark.parametrize(("afresh", "first", "finished"), [(True, 359, 33), (False, 272, 43)])
def test_synchronous_halving_without_noise(afresh, first, finished):
    """Thesis, section 3.3.3: 25 workers, 256 configurations a bracket; the values do not depend on the errors."""
    tuner = successive_halving(draw, 256, num_configs=256, min_rounds=1, reduction_factor=4)
    workload = run(tuner, Synthetic(2000, afresh=afresh), 25, tells_first=True)
    times = [time for time, job in workload.done if job.rounds == 256 and time <= 2000]
    assert (times[0], len(times)) == (first, finished)


@pytest.mark.parametrize(("afresh", "first"), [(True, 13), (False, 9)])
def test_figure_3_1(afresh, first):
    """Nine workers, one bracket of nine: one configuration is trained to 9 by 1 + 3 + 9 rounds, or 9 in all."""
    tuner = ASHA(draw, 9, 1, 3, num_configs=9)
    workload = run(tuner, Synthetic(afresh=afresh), 9, tells_first=True)
    assert [time for time, job in workload.done if job.rounds == 9] == [first]


def test_a_dropped_job_is_retried_before_anything_new():
    workload = run(RandomSearch(draw, 5, num_configs=3), Synthetic(drops=[(0, 0), (0, 1)]), 1)
    assert workload.log == [
        *((0, 0, 0), ("dropped", 0, "retry"), (0, 0, 1), ("dropped", 0, "retry"), (0, 0, 2)),
        *((1, 0, 0), (2, 0, 0)),
    ]
    assert [time for time, _ in workload.done] == [15, 20, 25]


def test_dropped_jobs_are_retried_in_the_order_in_which_they_were_dropped():
    workload = run(RandomSearch(draw, 5, num_configs=3), Synthetic(drops=[(0, 0), (1, 0)]), 2, tells_first=True)
    assert workload.log[2:6] == [("dropped", 0, "retry"), ("dropped", 1, "retry"), (0, 0, 1), (1, 0, 1)]


def test_a_lost_job_is_never_told():
    tuner = ASHA(draw, 9, 1, 3, num_configs=9)
    workload = run(tuner, Synthetic(drops=[(4, 0)]), 1, on_drop="lose", forgets_jobs=True)
    assert ("dropped", 4, "lose") in workload.log
    assert 4 not in {job.trial.number for _, job in workload.done}
    assert len([job for _, job in workload.done if job.rung == 0]) == 8
    assert len([job for _, job in workload.done if job.rung == 1]) == 8 // 3


@pytest.mark.parametrize("on_drop", ["lose", "worst"])
def test_a_bracket_does_not_wait_for_a_job_that_is_gone(on_drop):
    tuner = successive_halving(draw, 9, num_configs=9, min_rounds=1, reduction_factor=3)
    workload = run(tuner, Synthetic(40, drops=[(4, 0)]), 3, on_drop=on_drop)
    assert ("dropped", 4, "worst") in workload.log  # SHA would wait for it for ever
    assert any(job.rounds == 9 for _, job in workload.done)
    assert 4 not in {job.trial.number for _, job in workload.done}


def test_nothing_is_asked_for_once_the_budget_is_out():
    workload = run(RandomSearch(draw, 5), Synthetic(until=12), 2)
    assert [time for time, _ in workload.done] == [5, 5, 10, 10, 15, 15]


class Limited(Synthetic):
    """As long as rounds are left; a job that needs more is shortened to them."""

    def __init__(self, left, **options):
        super().__init__(**options)
        self.left = left

    def start(self, job, number, now):
        if number == 0:
            before = self.trained.get(job.trial.number, 0)
            if self.left == 0:
                return None
            if job.rounds - before > self.left:
                job = replace(job, rounds=before + self.left, shortened=True)
            self.left -= job.rounds - before
        return super().start(job, number, now)


class Told(RandomSearch):
    """Random search that keeps what it is told."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.told = []

    def tell(self, job, error):
        self.told.append((job.trial.number, job.rounds))


def test_a_shortened_job_is_trained_and_not_told_and_is_the_last():
    tuner = Told(draw, 5)
    workload = run(tuner, Limited(17), 2)
    assert [(time, job.trial.number, job.rounds) for time, job in workload.done] == [
        *((5, 0, 5), (5, 1, 5)),
        *((7, 3, 2), (10, 2, 5)),
    ]
    assert tuner.told == [(0, 5), (1, 5), (2, 5)]


def test_a_shortened_job_is_asked_for_in_full_when_the_budget_grows():
    tuner = Told(draw, 5)
    workload = Limited(7)
    loop = EventLoop(tuner, workload, 1)
    for more, told in ((0, [0]), (2, [0]), (3, [0, 1])):
        workload.left += more
        assert list(loop.run()) == []
        assert [number for number, _ in tuner.told] == told
    assert [job for _, job in workload.done] == [
        Job(draw(0), 0, 5),
        Job(draw(1), 0, 2, shortened=True),
        Job(draw(1), 0, 4, shortened=True),
        Job(draw(1), 0, 5),
        Job(draw(2), 0, 2, shortened=True),
    ]
    assert loop.time == 12


@pytest.mark.parametrize("on_drop", ["retry", "lose", "worst"])
def test_an_attempt_at_a_shortened_job_that_fails(on_drop):
    """It is retried as it is, or not at all; after an extension the job is asked for in full, whatever happened."""
    tuner = Told(draw, 5)
    workload = Limited(7, drops=[(1, 0)])
    loop = EventLoop(tuner, workload, 1, on_drop, forgets_jobs=True)
    assert list(loop.run()) == []
    assert ("dropped", 1, on_drop) in workload.log
    assert [job.rounds for _, job in workload.done] == ([5, 2] if on_drop == "retry" else [5])
    assert tuner.told == [(0, 5)]
    workload.drops.clear()
    workload.left += 5
    assert list(loop.run()) == []
    assert tuner.told == [(0, 5), (1, 5)]


def test_tells_first_asks_after_all_that_ends_at_once():
    """Of three that end together the third is the best: told first, it is promoted; else the first free place grows."""
    first_asks = {}
    for tells_first in (False, True):
        tuner = ASHA(draw, 3, 1, 3)
        workload = run(tuner, Synthetic(until=1.5), 3, tells_first=tells_first)
        first_asks[tells_first] = workload.log[3][:2]
    assert first_asks[False] == (3, 0)
    assert first_asks[True][1] == 1
