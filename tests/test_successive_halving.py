import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_cluster import completions

from fedtune.errors import InputError
from fedtune.tuning.successive_halving import successive_halving
from fedtune.tuning.trial import Job, Trial, Tuner


def draw(number):
    return Trial(number, {}, (({},),))


class LiteralBrackets:
    """Algorithm 2 read anew at every decision; bracket b draws the configurations b n, ..., (b + 1) n - 1."""

    def __init__(self, n, num_rungs, reduction_factor):
        self.n, self.num_rungs, self.reduction_factor = n, num_rungs, reduction_factor
        self.started, self.losses = set(), {}  # (configuration, rung)

    def ask(self):
        job = next(self._could_start())
        self.started.add(job)
        return job

    def _could_start(self):
        for bracket in itertools.count():
            rung = list(range(bracket * self.n, (bracket + 1) * self.n))
            for i in range(self.num_rungs):
                yield from ((number, i) for number in rung if (number, i) not in self.started)
                if any((number, i) not in self.losses for number in rung):
                    break  # it waits
                finite = [(self.losses[number, i], number) for number in rung if math.isfinite(self.losses[number, i])]
                num_best = math.floor(math.floor(self.n / self.reduction_factor**i) / self.reduction_factor)
                rung = [number for _, number in sorted(finite)[:num_best]]  # of the finite: the departure


def test_it_is_a_tuner():
    assert isinstance(successive_halving(draw, 9), Tuner)


def test_the_bracket_of_figure_3_1():
    """n = 9, r = 1, R = 9, eta = 3: nine configurations train for 1 round, three for 3, one for 9; the best go on."""
    errors = [0.5, 0.4, 0.3, 0.2, 0.1, 0.6, 0.7, 0.05, 0.8]
    tuner, jobs = successive_halving(draw, 9), []
    for _ in range(13):
        job = tuner.ask()
        jobs.append((job.trial.number, job.rung, job.rounds))
        tuner.tell(job, errors[job.trial.number])
    assert jobs == [*((number, 0, 1) for number in range(9)), (7, 1, 3), (4, 1, 3), (3, 1, 3), (7, 2, 9)]
    assert tuner.ask() == Job(draw(9), 0, 1)  # a new bracket


@given(
    reduction_factor=st.integers(2, 4),
    halvings=st.integers(0, 3),
    early_stopping_rate=st.integers(0, 3),
    more_configs=st.integers(0, 20),
    workers=st.integers(1, 30),
    dropped=st.sampled_from([0, 0.1]),
    seed=st.integers(0, 2**32),
)
def test_brackets_are_algorithm_2(
    reduction_factor, halvings, early_stopping_rate, more_configs, workers, dropped, seed
):
    """For any losses, any number of workers, any order of completion, and jobs that never come back."""
    s = min(early_stopping_rate, halvings)
    n = reduction_factor ** (halvings - s) + more_configs
    tuner = successive_halving(draw, 2 * reduction_factor**halvings, n, 2, reduction_factor, s)
    literal = LiteralBrackets(n, halvings - s + 1, reduction_factor)
    rng, running = random.Random(seed), []
    for _ in range(200):
        if running and (len(running) == workers or rng.random() < 0.5):
            job = running.pop(rng.randrange(len(running)))
            if rng.random() < dropped:
                continue
            loss = rng.choice([rng.random(), rng.random(), 0.25, math.nan, math.inf, -math.inf])
            tuner.tell(job, loss)
            literal.losses[job.trial.number, job.rung] = loss
            continue
        job = tuner.ask()
        assert (job.trial.number, job.rung) == literal.ask()
        assert job.rounds == 2 * reduction_factor ** (s + job.rung)
        running.append(job)


@pytest.mark.parametrize(("resumes", "first", "finished"), [(False, 359, 33), (True, 272, 43)])
def test_the_workload_of_section_3_3_3_without_noise(resumes, first, finished):
    """n = R = 256, r = 1, eta = 4, 25 workers: the first configuration reaches R at this time, so many by 2000."""
    losses = random.Random(0)
    tuner = successive_halving(draw, 256, 256, 1, 4)
    run = completions(tuner, 25, lambda job: losses.random(), resumes=resumes, until=2000)
    times = [time for time, job in run if job.rounds == 256]
    assert (times[0], len(times)) == (first, finished)


def test_one_that_diverged_does_not_go_on():
    """Three of nine may; with seven NaN two do, and of these only one can."""
    tuner, jobs = successive_halving(draw, 9), []
    for _ in range(12):
        job = tuner.ask()
        jobs.append((job.trial.number, job.rung))
        tuner.tell(job, 0.5 if job.trial.number in (3, 6) else math.nan)
    assert jobs == [*((number, 0) for number in range(9)), (3, 1), (6, 1), (3, 2)]
    assert tuner.ask().trial.number == 9


def test_a_bracket_in_which_all_diverged_is_over():
    tuner = successive_halving(draw, 9)
    for number in range(30):
        job = tuner.ask()
        assert (job.trial.number, job.rung) == (number, 0)
        tuner.tell(job, math.inf)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_rounds": 0}, "max_rounds must be a whole number >= 1, got 0"),
        ({"num_configs": 80}, "num_configs must be a whole number >= 81, got 80"),
        ({"num_configs": 8, "early_stopping_rate": 2}, "num_configs must be a whole number >= 9, got 8"),
        ({"early_stopping_rate": 5}, "early_stopping_rate must be a whole number >= 0 and <= 4, got 5"),
        (
            {"min_rounds": 2},
            "max_rounds must be min_rounds (2) times a power of reduction_factor (3), got 81; 54 and 162 are allowed",
        ),
    ],
)
def test_options_that_are_not_allowed(options, said):
    with pytest.raises(InputError) as raised:
        successive_halving(draw, **{"max_rounds": 81, **options})
    assert str(raised.value) == said
