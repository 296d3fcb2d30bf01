import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import InputError
from fedtune.tuning.domains import Choice, Integer, LogUniform, PowerOfTwo, Uniform
from fedtune.tuning.pbt import PBT, Member, Population, default_population_size, explore_config, make_explore, moved
from fedtune.tuning.space import SearchSpace
from fedtune.tuning.trial import Job, Trial, Tuner


def draw(number):
    return Trial(number, {"learning_rate": float(number)}, (({},),))


def explore(parent, number):
    return Trial(number, {"learning_rate": parent.server["learning_rate"] + 0.5}, parent.pool)


def make(max_rounds=9, **options):
    return PBT(draw, explore, 0, max_rounds, **{"population_size": 5, "interval": 1, **options})


def test_it_is_a_tuner():
    assert isinstance(make(), Tuner)


def test_a_population_by_hand():
    """Five members on one worker; the error is the trial's number over 10, but that of 5 is 0.05, so 4 is the worst.

    When 4 is to train on, the best has had two rounds: trial 5 starts from them. Then 3 is the worst.
    """
    tuner, jobs = make(), []
    for _ in range(15):
        job = tuner.ask()
        jobs.append((job.trial.number, job.trial.parent, job.rounds))
        tuner.tell(job, 0.05 if job.trial.number == 5 else job.trial.number / 10)
    assert jobs == [
        (0, None, 1), (1, None, 1), (2, None, 1), (3, None, 1), (4, None, 1),
        (0, None, 2), (1, None, 2), (2, None, 2), (3, None, 2), (5, 0, 3),
        (0, None, 3), (1, None, 3), (2, None, 3), (6, 0, 4), (5, 0, 4),
    ]  # fmt: skip


def test_a_trial_is_given_up_when_a_copy_takes_its_place():
    """For any errors: those that are neither trained on nor copied later, each once."""
    tuner, rng, jobs = make(max_rounds=30), random.Random(0), []
    for _ in range(300):
        jobs.append(tuner.ask())
        tuner.tell(jobs[-1], rng.random())
    seen, given_up = set(), set()
    for job in jobs:
        copied = {job.trial.parent} - {None} if job.trial.number not in seen else set()
        assert len(job.given_up) == len(copied)
        assert not {job.trial.number, *copied, *job.given_up} & given_up
        given_up |= set(job.given_up)
        seen.add(job.trial.number)
    ended = {job.trial.number for job in jobs if job.rounds == 30}
    in_training = {job.trial.number for job in jobs[-5:]}
    assert seen == given_up | ended | in_training


def test_the_copy_has_the_explored_values_of_its_parent():
    tuner = make()
    for job in [tuner.ask() for _ in range(5)]:
        tuner.tell(job, job.trial.number / 10)
    copy = [tuner.ask() for _ in range(5)][-1].trial
    assert copy == Trial(5, {"learning_rate": 0.5}, (({},),), parent=0)


def test_a_parent_is_copied_as_its_last_told_job_left_it():
    """Trial 0 trains its second round when trial 5 is asked for: 5 starts from the first."""
    tuner = make()
    for job in [tuner.ask() for _ in range(5)]:
        tuner.tell(job, job.trial.number / 10)
    jobs = [tuner.ask() for _ in range(5)]
    assert jobs[0] == Job(draw(0), 1, 2)
    assert (jobs[-1].trial.parent, jobs[-1].rung, jobs[-1].rounds) == (0, 1, 2)


class LiteralPopulation:
    """Who may train and whom it should copy, from nothing but the members; the rules written out."""

    def __init__(self, members, max_rounds, interval):
        self.members, self.max_rounds, self.interval = members, max_rounds, interval

    def furthest_start(self):
        """One interval more, and nobody is more than two ahead."""
        return min(member.rounds for member in self.members) + 2 * self.interval - self.interval

    def donors(self, member, errors):
        told = [each for each in self.members if each in errors]
        told.sort(
            key=lambda each: (
                not math.isfinite(errors[each]),
                errors[each] if math.isfinite(errors[each]) else 0,
                each.trial.number,
            )
        )
        fifth = math.floor(0.2 * len(told))
        diverged = member in errors and not math.isfinite(errors[member])
        among_the_worst = member in told and told.index(member) >= len(told) - fifth
        if not diverged and not among_the_worst:
            return []
        best = told[: max(fifth, 1)]
        return [
            each
            for each in best
            if math.isfinite(errors[each]) and each.rounds <= self.furthest_start() and each.rounds < self.max_rounds
        ]


@given(
    size=st.integers(5, 27),
    max_rounds=st.integers(1, 12),
    interval=st.integers(1, 5),
    workers=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_a_population_keeps_to_the_rules(size, max_rounds, interval, workers, seed):
    """For any errors and any order of completion, all that `Population` keeps in order is as the literal rules say."""
    interval = min(interval, max_rounds)
    population = Population(size, max_rounds, interval)
    members = list(population.waiting)
    literal = LiteralPopulation(members, max_rounds, interval)
    rng, running, errors, number = random.Random(seed), [], {}, 0
    for _ in range(150):
        if running and (len(running) == workers or rng.random() < 0.5):
            member = running.pop(rng.randrange(len(running)))
            errors[member] = rng.choice([rng.random(), rng.random(), rng.random(), 0.5, math.nan, math.inf])
            population.report(member, min(member.rounds + interval, max_rounds), errors[member])
            continue
        waiting = [each for each in members if each not in running and each.rounds < max_rounds]
        member = population.next_member()
        if member is None:
            assert all(each.rounds > literal.furthest_start() for each in waiting)
            if not running:
                return
            continue
        assert member in waiting
        assert member.rounds == min(each.rounds for each in waiting) <= literal.furthest_start()
        donors = population.donors(member)
        assert donors == literal.donors(member, errors)
        population.waiting.remove(member)
        if donors:
            donor = rng.choice(donors)
            population.copy(member, donor, Trial(number := number + 1, {}, (({},),)))
            del errors[member]
            assert member.rounds == donor.rounds
        elif member.trial is None:
            member.trial = Trial(number := number + 1, {}, (({},),))
        elif not math.isfinite(errors[member]):
            population.forget(member)
            members.remove(member)
            continue
        running.append(member)
        ends = [each.rounds + interval for each in running]
        assert max(ends) - min(each.rounds for each in members) <= 2 * interval


def test_a_new_population_is_started_where_nobody_may_train():
    tuner = make()
    jobs = [tuner.ask() for _ in range(12)]
    assert [job.trial.number for job in jobs] == list(range(12))
    for job in jobs[:4]:
        tuner.tell(job, 0.5)  # trial 4 is still in its first interval
    second = [tuner.ask() for _ in range(4)]
    assert [(job.trial.number, job.rounds) for job in second] == [(0, 2), (1, 2), (2, 2), (3, 2)]
    for job in second:
        tuner.tell(job, 0.5)
    assert tuner.ask() == Job(draw(12), 0, 1)  # two ahead of 4, they wait
    tuner.tell(jobs[4], 0.1)
    assert tuner.ask() == Job(draw(4), 1, 2)


def test_a_member_that_diverged_copies_the_best_or_is_given_up():
    tuner = make()
    jobs = [tuner.ask() for _ in range(5)]
    tuner.tell(jobs[0], math.nan)
    assert tuner.ask() == Job(draw(5), 0, 1, given_up=(0,))  # there was nobody to copy
    tuner.tell(jobs[1], 0.3)
    tuner.tell(jobs[2], math.inf)
    asked = [tuner.ask() for _ in range(2)]
    assert [job.trial.parent for job in asked] == [None, 1]
    assert [job.given_up for job in asked] == [(), (2,)]


def test_nobody_trains_longer_than_max_rounds():
    tuner, rng = make(max_rounds=10, interval=4), random.Random(0)
    jobs = []
    for _ in range(300):
        jobs.append(tuner.ask())
        tuner.tell(jobs[-1], rng.random())
    assert {job.rounds for job in jobs} == {4, 8, 10}
    assert {(job.rung, job.rounds) for job in jobs} == {(0, 4), (1, 8), (2, 10)}


def test_the_defaults():
    tuner = PBT(draw, explore, 0, 300)
    assert (tuner.population_size, tuner.interval) == (25, 10)
    assert PBT(draw, explore, 0, 81).interval == 3
    assert PBT(draw, explore, 0, 5).interval == 1
    assert [default_population_size(81, total) for total in (405, 900, 100_000)] == [5, 11, 25]


def test_the_seed_decides_who_is_copied():
    def parents(seed):
        tuner, rng = PBT(draw, explore, seed, 30, 25), random.Random(0)
        jobs = []
        for _ in range(400):
            jobs.append(tuner.ask())
            tuner.tell(jobs[-1], rng.random())
        return [job.trial.parent for job in jobs]

    assert parents(0) == parents(0) != parents(1)


def test_donors_are_chosen_uniformly():
    """The best five of 25. False alarm below 5 * 2 exp(-2 * 400 * 0.12^2) = 1e-4 (Hoeffding)."""
    counts = np.zeros(5)
    for seed in range(400):
        tuner = PBT(draw, explore, seed, 30, 25)
        for job in [tuner.ask() for _ in range(25)]:
            tuner.tell(job, job.trial.number / 25)
        counts[next(job.trial.parent for job in iter(tuner.ask, None) if job.trial.parent is not None)] += 1
    np.testing.assert_allclose(counts / 400, 0.2, atol=0.12)


@pytest.mark.parametrize(
    ("domain", "value", "down", "up"),
    [
        (Uniform(0.0, 1.0), 0.5, 0.4, 0.6),
        (Uniform(0.0, 1.0), 0.9, 0.9 * 0.8, 1.0),
        (Uniform(-2.0, 0.0), -0.5, -0.4, -0.6),
        (LogUniform(1e-3, 1.0), 0.1, 0.1 * 0.8, 0.1 * 1.2),
        (LogUniform(1e-3, 1.0), 1e-3, 1e-3, 1e-3 * 1.2),
        (Integer(1, 100), 50, 40, 60),
        (Integer(1, 5), 2, 1, 3),
        (Integer(1, 5), 5, 4, 5),
        (PowerOfTwo(8, 128), 32, 16, 64),
        (PowerOfTwo(8, 128), 8, 8, 16),
        (Choice((0.9, 0.0, 0.5)), 0.5, 0.0, 0.9),
        (Choice((0.9, 0.0, 0.5)), 0.9, 0.5, 0.9),
    ],
)
def test_where_a_value_moves(domain, value, down, up):
    assert moved(domain, value, up=False) == pytest.approx(down, rel=1e-15)
    assert moved(domain, value, up=True) == pytest.approx(up, rel=1e-15)


def test_a_quarter_is_resampled_and_the_rest_moves_either_way():
    """False alarm below 3 * 2 exp(-2 * 4000 * 0.04^2) = 2e-5 (Hoeffding)."""
    draws, domains = np.random.default_rng(0), {"a": Uniform(0.0, 1.0), "b": Uniform(0.0, 1.0)}
    explored = [explore_config(domains, {"a": 0.5, "b": 0.5, "c": 1}, draws) for _ in range(4000)]
    assert explored[0].keys() == {"a", "b"}
    values = np.array([config["a"] for config in explored])
    shares = [(values == 0.6).mean(), (values == 0.4).mean(), (~np.isin(values, [0.4, 0.6])).mean()]
    np.testing.assert_allclose(shares, [0.375, 0.375, 0.25], atol=0.04)
    both = np.array([(config["a"], config["b"]) for config in explored])
    assert ((both == [0.4, 0.6]).all(axis=1)).any()  # each hyperparameter goes its own way


def test_make_explore_changes_what_is_searched_and_depends_on_the_number_alone():
    space = SearchSpace({"learning_rate": LogUniform(1e-4, 1.0)}, {"momentum": Uniform(0.0, 1.0)})

    def compose(number, server, client):
        return Trial(number, {"decay": 0.1, **server}, (({"epochs": 2, **client},),))

    parent = Trial(3, {"decay": 0.1, "momentum": 0.5}, (({"epochs": 2, "learning_rate": 0.1},),))
    children = [make_explore(compose, space, 0)(parent, number) for number in (7, 7, 8)]
    assert children[0] == children[1]
    assert children[0].server.keys() == parent.server.keys()
    assert children[0].pool[0][0].keys() == parent.pool[0][0].keys()
    assert children[0].server != children[2].server
    assert children[0].server["momentum"] != 0.5
    assert children[0].pool[0][0]["learning_rate"] != 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_rounds": 0}, "max_rounds must be a whole number >= 1, got 0"),
        ({"population_size": 4}, "population_size must be a whole number >= 5, got 4"),
        ({"interval": 10}, "interval must be a whole number >= 1 and <= 9, got 10"),
    ],
)
def test_options_that_are_not_allowed(options, said):
    with pytest.raises(InputError) as raised:
        make(**options)
    assert str(raised.value) == said


def test_a_budget_that_trains_fewer_than_five():
    with pytest.raises(InputError) as raised:
        default_population_size(81, 404)
    assert str(raised.value) == "total_rounds must be a whole number >= 405, got 404"


def test_a_member_is_itself_alone():
    assert Member() != Member()
