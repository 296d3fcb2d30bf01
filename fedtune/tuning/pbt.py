"""Population based training (Jaderberg et al., arXiv 1711.09846) as section 3.6.2 of the thesis sets it up.

    a population of P configurations drawn at random
    whenever a member has trained for another interval:
        exploit: if it is among the worst 20 % of the population, it takes over the weights and the hyperparameters
                 of one of the best 20 %, chosen uniformly                                        `Population.donors`
        explore: every inherited hyperparameter is multiplied by 1.2 or 0.8, or moves to an adjacent choice, with
                 probability 3/4; else it is drawn anew                                              `explore_config`
    no member is ever more than two intervals ahead of another
    if no member of any population may train, a new population is started

In the thesis a population has 25 members, and an interval is 1/30 of R. A member that exploits becomes a new trial,
whose `parent` is the trial that it copies. 20 % are floor(P' / 5) of the P' members that have reported an error.

Filled in: who exploits whom is decided when the member's next job is asked for, from the errors last reported. A member
that would be too far ahead of the slowest member, or that has trained for R rounds, is not copied. A member whose error
is not finite exploits whatever its rank; if no member has a finite error, it is removed. Left out: sampling until half
the population is better than guessing. Departure: if the budget can't train 25 members to R, the population has as many
members as the budget can train (`default_population_size`).
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count

import numpy as np

from fedtune import rng
from fedtune.errors import InputError
from fedtune.tuning.domains import Choice, Domain, Integer, PowerOfTwo
from fedtune.tuning.rungs import Key
from fedtune.tuning.space import Config, Number, SearchSpace, checked_number
from fedtune.tuning.trial import Compose, Draw, Job, Trial, rank_key

POPULATION_SIZE = 25
INTERVALS = 30
FIFTH = 5
MOST_AHEAD = 2  # intervals

Explore = Callable[[Trial, int], Trial]  # (parent, new number) -> a trial like the parent, with new hyperparameters


@dataclass(eq=False)
class Member:
    """A place in a population, and the trial that holds it now (None before the first job)."""

    trial: Trial | None = None
    rounds: int = 0  # the trial's rounds when its last error was reported
    key: Key | None = None  # how it ranks, by the last error reported for this trial

    @property
    def diverged(self) -> bool:
        """Whether its last error was not finite."""
        return self.key is not None and bool(self.key[0])


class Population:
    """Members that train side by side, kept in the orders that a decision needs."""

    def __init__(self, size: int, max_rounds: int, interval: int) -> None:
        self.max_rounds = max_rounds
        self.interval = interval
        self.waiting = [Member() for _ in range(size)]  # members that neither run nor are done, the slowest first
        self._ranked: list[Member] = []  # members that have reported an error, the best first
        self._rounds = [0] * size  # of all members, ascending

    def next_member(self) -> Member | None:
        """The slowest member that waits, if it may train; else None."""
        return self.waiting[0] if self.waiting and self.waiting[0].rounds <= self._furthest_start() else None

    def donors(self, member: Member) -> list[Member]:
        """The members that this member may copy; empty if it should not copy any."""
        fifth = len(self._ranked) // FIFTH
        worst = self._ranked[len(self._ranked) - fifth :]
        if member.key is None or not (member.diverged or (worst and member.key >= _key(worst[0]))):
            return []
        limit = min(self._furthest_start(), self.max_rounds - 1)
        best = self._ranked[: max(1, fifth)]
        return [donor for donor in best if not donor.diverged and donor.rounds <= limit]

    def report(self, member: Member, rounds: int, error: float) -> None:
        """Enters the error of a member after it has trained."""
        assert member.trial is not None
        self.forget(member)
        member.rounds, member.key = rounds, rank_key(error, member.trial.number)
        insort(self._rounds, rounds)
        insort(self._ranked, member, key=_key)
        if rounds < self.max_rounds:
            insort(self.waiting, member, key=lambda waiting: waiting.rounds)

    def copy(self, member: Member, donor: Member, trial: Trial) -> None:
        """Gives a member the trial `trial`, a copy of its donor, and the donor's rounds. It has no error yet."""
        self.forget(member)
        insort(self._rounds, donor.rounds)
        member.trial, member.rounds, member.key = trial, donor.rounds, None

    def forget(self, member: Member) -> None:
        """Takes a member out of the rankings."""
        self._rounds.remove(member.rounds)
        if member.key is not None:
            del self._ranked[bisect_left(self._ranked, member.key, key=_key)]

    def _furthest_start(self) -> int:
        """The most rounds that a member may have and still train."""
        return self._rounds[0] + (MOST_AHEAD - 1) * self.interval


class PBT:
    """A tuner whose trials copy one another while they train. It never ends: it starts new populations as needed."""

    def __init__(
        self,
        draw: Draw,
        explore: Explore,
        seed: int,
        max_rounds: int,
        population_size: int = POPULATION_SIZE,
        interval: int | None = None,
    ) -> None:
        checked_number("max_rounds", max_rounds, low=1, integer=True)
        checked_number("population_size", population_size, low=FIFTH, integer=True)
        interval = -(-max_rounds // INTERVALS) if interval is None else interval
        checked_number("interval", interval, low=1, high=max_rounds, integer=True)
        self.max_rounds = max_rounds
        self.population_size = population_size
        self.interval = interval
        self._draw = draw
        self._explore = explore
        self._choices = rng.stream(seed, "pbt donors")
        self._numbers = count()
        self._num_populations = 0
        self._open: list[tuple[int, Population]] = []  # a heap: populations in which a member may be able to train
        self._running: dict[int, tuple[int, Population, Member]] = {}  # by the number of the trial
        self._given_up: list[int] = []  # trials that lost their place in a population since the last job

    def ask(self) -> Job:
        """The next interval of a member, in the oldest population in which one may train, or in a new population."""
        while True:
            if not self._open:
                self._start_population()
            number, population = self._open[0]
            member = population.next_member()
            if member is None:
                heappop(self._open)
                continue
            del population.waiting[0]
            trial = self._prepare(population, member)
            if trial is not None:
                self._running[trial.number] = number, population, member
                rounds = min(member.rounds + self.interval, self.max_rounds)
                given_up, self._given_up = tuple(self._given_up), []
                return Job(trial, member.rounds // self.interval, rounds, given_up)

    def tell(self, job: Job, error: float) -> None:
        """Enter a member's error."""
        if job.trial.number not in self._running:
            raise InputError(f"a job must be running to be reported, got trial {job.trial.number} in rung {job.rung}")
        number, population, member = self._running.pop(job.trial.number)
        population.report(member, job.rounds, error)
        if (number, population) not in self._open:
            heappush(self._open, (number, population))

    def _start_population(self) -> None:
        population = Population(self.population_size, self.max_rounds, self.interval)
        heappush(self._open, (self._num_populations, population))
        self._num_populations += 1

    def _prepare(self, population: Population, member: Member) -> Trial | None:
        """The trial that the member trains next, after exploiting and exploring; None if the member is removed."""
        donors = population.donors(member)
        if member.trial is None:
            member.trial = self._draw(next(self._numbers))
        elif donors:
            donor = donors[int(self._choices.integers(len(donors)))]
            assert donor.trial is not None
            number = next(self._numbers)
            copy = replace(self._explore(donor.trial, number), number=number, parent=donor.trial.number)
            self._given_up.append(member.trial.number)
            population.copy(member, donor, copy)
        elif member.diverged:
            self._given_up.append(member.trial.number)
            population.forget(member)
            return None
        return member.trial


def default_population_size(max_rounds: int, total_rounds: int) -> int:
    """How many members total_rounds can train to max_rounds, 25 at most. Raises InputError for fewer than five."""
    checked_number("total_rounds", total_rounds, low=FIFTH * max_rounds, integer=True)
    return min(POPULATION_SIZE, total_rounds // max_rounds)


def make_explore(compose: Compose, space: SearchSpace, seed: int) -> Explore:
    """A function that explores a trial's server configuration and the centre of its pool."""

    def explore(parent: Trial, number: int) -> Trial:
        draws = rng.stream(seed, "pbt explore", number)
        server = explore_config(space.server, parent.server, draws)
        return compose(number, server, explore_config(space.client, parent.centre, draws))

    return explore


def explore_config(domains: Mapping[str, Domain], config: Config, draws: np.random.Generator) -> dict[str, Number]:
    """A new value for each hyperparameter that has a domain."""
    explored = {}
    for name in sorted(domains):
        resample, up = draws.random(2) < (1 / 4, 1 / 2)
        fresh = domains[name].sample(draws)
        explored[name] = fresh if resample else moved(domains[name], config[name], up=bool(up))
    return explored


def moved(domain: Domain, value: Number, *, up: bool) -> Number:
    """The value times 1.2 or 0.8, or the adjacent option, clipped. Whole numbers move by at least one."""
    value, direction = domain.clip(value), 1 if up else -1
    if isinstance(domain, PowerOfTwo):
        return domain.clip(value * 2.0**direction)
    if isinstance(domain, Choice):
        options = sorted(domain.options)
        adjacent = options.index(value) + direction
        return options[min(max(adjacent, 0), len(options) - 1)]
    if isinstance(domain, Integer):
        return domain.clip(value + direction * max(1, round(0.2 * abs(value))))
    return domain.clip(value * (1.2 if up else 0.8))


def _key(member: Member) -> Key:
    assert member.key is not None
    return member.key
