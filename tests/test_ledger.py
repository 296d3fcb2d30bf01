"""What the budget pays for, and which trial is the incumbent."""

import itertools

import pytest

from fedtune import rng
from fedtune.runs.ledger import Ledger
from fedtune.settings import ExtensionSettings, resolve
from fedtune.simulation.event_loop import Attempt, EventLoop
from fedtune.tuning.domains import Uniform
from fedtune.tuning.random_search import RandomSearch
from fedtune.tuning.space import SearchSpace
from fedtune.tuning.trial import Job, Score, Trial
from fedtune.tuning.tuner_kind import Budget, TrialSource
from fedtune.tuning.tuners import SEARCHES

SPACE = SearchSpace({"learning_rate": Uniform(0.0, 1.0)}, {})


def trial(number, server=None, client=None):
    return Trial(number, {}, ((client or {"learning_rate": rng.stream(0, "draw", number).random()},),))


def ledger(max_rounds=9, total_rounds=20, **options):
    budget = {"max_rounds": max_rounds, "total_rounds": total_rounds}
    return Ledger(resolve([{"data": {"name": "digits"}, **budget}]), **options)


def scored(kept, job, error):
    """Enters a score as if the job had been trained."""
    kept.trials[job.trial.number].tail = lambda name: error
    return kept.score(job, time=0.0)


class MadeUpJobs:
    """Jobs of a real ledger, with made-up errors and durations."""

    def __init__(self, kept, seed):
        self.kept, self.seed, self.spent = kept, seed, 0

    def start(self, job, number, now):
        charged = self.kept.charge(job, number)
        if charged is None:
            return None
        job, history = charged
        num_rounds = job.rounds - history.reported_rounds
        self.spent += num_rounds
        slow = rng.stream(self.seed, "slow", job.trial.number, job.rounds).random()
        return Attempt(job, number, now + num_rounds * (1 + slow), failed=False)

    def ready(self, attempt):
        return True

    def deliver(self, attempt):
        job = attempt.job
        return scored(self.kept, job, rng.stream(self.seed, "error", job.trial.number, job.rounds).random())

    def fail(self, attempt, then):
        raise AssertionError("no attempt fails here")


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_spends_its_budget_to_the_last_round(search):
    options = {"async_hyperband": {"reduction_factor": 3}}.get(search, {})
    for (max_rounds, total_rounds), parallel_trials in itertools.product([(9, 47), (27, 200), (81, 405)], [1, 4, 25]):
        settings = SEARCHES[search].parse(search, options, Budget(max_rounds, total_rounds))
        tuner = settings.make_tuner(TrialSource(trial, trial, SPACE, seed=0))
        jobs = MadeUpJobs(ledger(max_rounds, total_rounds), seed=0)
        assert list(EventLoop(tuner, jobs, parallel_trials).run()) == []
        assert jobs.spent == total_rounds


def test_a_search_that_ends_by_itself_leaves_the_rest():
    settings = SEARCHES["random"].parse("random", {"num_configs": 2}, Budget(9, 20))
    jobs = MadeUpJobs(ledger(), 0)
    assert list(EventLoop(settings.make_tuner(TrialSource(trial, trial, SPACE, 0)), jobs, 4).run()) == []
    assert jobs.spent == 18


def test_a_job_is_shortened_to_what_is_left_and_paid_for_once():
    kept = ledger(total_rounds=20)
    assert [kept.charge(Job(trial(n), 0, 9), 0)[0].rounds for n in (0, 1)] == [9, 9]
    job = Job(trial(2), 0, 9)
    shortened, _ = kept.charge(job, 0)
    assert shortened == Job(trial(2), 0, 2, shortened=True)
    assert kept.charge(Job(trial(3), 0, 1), 0) is None
    assert kept.charge(shortened, 1)[0] == shortened  # a second attempt costs nothing
    scored(kept, shortened, 0.5)
    kept.extend(RandomSearch(trial, 9), ExtensionSettings(total_rounds=26))
    assert kept.charge(job, 0)[0] == Job(trial(2), 0, 8, shortened=True)
    kept.extend(RandomSearch(trial, 9), ExtensionSettings(total_rounds=40))
    scored(kept, Job(trial(2), 0, 8, shortened=True), 0.5)
    assert kept.charge(job, 0)[0] == job


def test_by_the_older_rule_the_rest_is_not_spent():
    kept = ledger(total_rounds=20, format_3=True)
    for number in (0, 1):
        kept.charge(Job(trial(number), 0, 9), 0)
    assert kept.charge(Job(trial(2), 0, 9), 0) is None
    assert kept.trials.keys() == {0, 1}
    assert kept.charge(Job(trial(3), 0, 2), 0)[0].rounds == 2


def test_the_incumbent_after_a_shortened_job_does_not_depend_on_what_ends_first():
    """It has more rounds than trial 0, and no higher error; then trial 1 ends with a lower error than both."""
    jobs = [(Job(trial(0), 0, 9), 0.3), (Job(trial(2), 1, 11, shortened=True), 0.25), (Job(trial(1), 0, 9), 0.2)]
    for order in itertools.permutations(jobs):
        kept = ledger(max_rounds=27, total_rounds=29)
        for job, _ in jobs:
            kept.charge(job, 0)
        for job, error in order:
            scored(kept, job, error)
        assert kept.best == Score(1, 9, 0.2)
