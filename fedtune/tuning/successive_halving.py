"""Synchronous successive halving (SHA), Algorithm 2 of the thesis (sections 2.3 and 3.3.1).

     1  input: number of configurations n, minimum resource r, maximum R, reduction factor eta, early-stopping rate s
     2  s_max = floor(log_eta(R / r))
     3  assert n >= eta^(s_max - s), so that at least one configuration is allocated R
     4  T = n configurations drawn at random
     5  for i in 0, ..., s_max - s:                       a rung
     6      n_i = floor(n eta^-i)
     7      r_i = r eta^(i + s)
     8      L = the losses of all of T after r_i rounds
     9      T = top_k(T, L, floor(n_i / eta))
    12  return the best of T

R -> max_rounds, r -> min_rounds, eta -> reduction_factor, s -> early_stopping_rate. One run of the algorithm is a
bracket. A new bracket is opened if a worker is free and no open bracket has a job that can start now.
The oldest bracket that has a job goes first (section 3.3.1).

Departures: line 3 has > in the text, but its own example (n = 9, r = 1, R = 9, eta = 3) needs >=. No trial is cut
after the last rung. R / r must be a power of eta, so that the last rung is R itself. A trial whose error is not finite
is not promoted, even if too few other trials did better.
"""

import math
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count, repeat
from typing import NamedTuple

from fedtune.errors import InputError
from fedtune.tuning.rungs import Key, rung_rounds
from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Draw, Job, Trial, rank_key


class BracketPlan(NamedTuple):
    """The plan of a bracket: how many configurations it draws, and after how many rounds each rung ends."""

    num_configs: int
    rung_rounds: tuple[int, ...]


class Bracket:
    """One run of Algorithm 2; every decision is O(log n)."""

    def __init__(self, plan: BracketPlan, reduction_factor: int) -> None:
        self.plan = plan
        self._reduction_factor = reduction_factor
        self._rung = 0
        self._unstarted = plan.num_configs  # jobs of this rung
        self._running = 0
        self._entrants: list[tuple[Key, Trial]] = []  # a heap: the trials that finished the rung below
        self._finished: list[tuple[Key, Trial]] = []  # a heap: the trials that finished this rung with a finite error

    @property
    def waits(self) -> bool:
        """Whether no job can be started now: the bracket waits for the next `tell`, or it is finished."""
        return self._unstarted == 0

    def ask(self, draw: Iterator[Trial]) -> Job:
        """The next job of this rung, the best of the rung below first."""
        self._unstarted -= 1
        self._running += 1
        trial = heappop(self._entrants)[1] if self._rung > 0 else next(draw)  # 4
        return Job(trial, self._rung, self.plan.rung_rounds[self._rung])  # 8

    def tell(self, job: Job, error: float) -> None:
        """Enter a job's error; after the last job of a rung, the best trials enter the next rung."""
        self._running -= 1
        if math.isfinite(error):
            heappush(self._finished, (rank_key(error, job.trial.number), job.trial))
        if self._unstarted == self._running == 0 and self._rung + 1 < len(self.plan.rung_rounds):
            self._rung += 1  # 5
            self._entrants, self._finished = self._finished, []
            num_best = self.plan.num_configs // self._reduction_factor**self._rung  # 6
            self._unstarted = min(num_best, len(self._entrants))  # 9


class SynchronousBrackets:
    """A tuner that runs brackets of successive halving, as many at once as it takes to keep every worker busy."""

    def __init__(self, draw: Draw, plans: Iterator[BracketPlan], reduction_factor: int) -> None:
        self._draws = map(draw, count())
        self._plans = plans
        self._reduction_factor = reduction_factor
        self._num_opened = 0
        self._ready: list[tuple[int, Bracket]] = []  # a heap: the brackets with a job to start, the oldest first
        self._running: dict[tuple[int, int], tuple[int, Bracket]] = {}  # by trial and rung

    def ask(self) -> Job:
        """The next job of the oldest bracket that has one, otherwise the first job of a new bracket."""
        if not self._ready:
            heappush(self._ready, (self._num_opened, Bracket(next(self._plans), self._reduction_factor)))
            self._num_opened += 1
        number, bracket = self._ready[0]
        job = bracket.ask(self._draws)
        if bracket.waits:
            heappop(self._ready)
        self._running[job.trial.number, job.rung] = number, bracket
        return job

    def tell(self, job: Job, error: float) -> None:
        """Enter a job's error in its bracket."""
        if (job.trial.number, job.rung) not in self._running:
            raise InputError(f"a job must be running to be reported, got trial {job.trial.number} in rung {job.rung}")
        number, bracket = self._running.pop((job.trial.number, job.rung))
        waited = bracket.waits
        bracket.tell(job, error)
        if waited and not bracket.waits:
            heappush(self._ready, (number, bracket))


def successive_halving(
    draw: Draw,
    max_rounds: int,
    num_configs: int | None = None,
    min_rounds: int | None = None,
    reduction_factor: int = 3,
    early_stopping_rate: int = 0,
) -> SynchronousBrackets:
    """Synchronous SHA: equal brackets one after another, by default with as few configurations as line 3 allows."""
    rounds = rung_rounds(max_rounds, min_rounds, reduction_factor, early_stopping_rate)
    fewest = reduction_factor ** (len(rounds) - 1)
    if num_configs is None:
        num_configs = fewest
    checked_number("num_configs", num_configs, low=fewest, integer=True)  # 3
    return SynchronousBrackets(draw, repeat(BracketPlan(num_configs, rounds)), reduction_factor)
