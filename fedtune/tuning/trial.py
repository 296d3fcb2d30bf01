"""The protocol of tuners: a study asks a tuner for a job, trains its trial, and reports the error.

Lower errors are better. NaN and inf are the worst.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from fedtune.tuning.space import Config as Config
from fedtune.tuning.space import checked_number

# A product of factors. A flat pool is one factor of whole client configurations, and ((config,),) is plain FedAvg. With
# several factors, a client configuration is one element of each factor, merged.
Pool = tuple[tuple[Config, ...], ...]


@dataclass(frozen=True)
class Trial:
    """One federation: the server's configuration, and the pool of client configurations.

    `parent` is the number of the trial whose state this trial inherits; None means that this trial starts from the
    initial weights. When its first job is asked for, this trial takes the state after the parent's last reported job,
    even if a later job of the parent is running at that time. Its round number continues from the round of that state.
    """

    number: int
    server: Config
    pool: Pool
    parent: int | None = None

    @property
    def num_configs(self) -> int:
        """How many client configurations the pool stands for; 1 is plain federated averaging."""
        return math.prod(len(factor) for factor in self.pool)

    @property
    def centre(self) -> Config:
        """The client configuration that the pool was made around: the first element of each factor."""
        return {name: value for factor in self.pool for name, value in factor[0].items()}


# Makes trial number n from a random stream of its own.
Draw = Callable[[int], Trial]
# Makes trial number n from values of the searched hyperparameters: the server's, and the client's.
Compose = Callable[[int, Config, Config], Trial]


@dataclass(frozen=True)
class Job:
    """An order to train a trial until it has had `rounds` rounds in all; `rung` is its level in the tuner.

    `given_up` are the numbers of the trials that the tuner has given up since its last job. They are never trained on,
    and no later trial inherits their state.

    A job is `shortened` if the budget had too few rounds left for it: then it ends before its rung does, and the tuner
    that asked for it gets no report.
    """

    trial: Trial
    rung: int
    rounds: int
    given_up: tuple[int, ...] = ()
    shortened: bool = False


@runtime_checkable
class Tuner(Protocol):
    """Decides what to train next."""

    def ask(self) -> Job | None:
        """The next job. None means: ask again after the next `tell`; if no job is running, the tuner is done."""

    def tell(self, job: Job, error: float) -> None:
        """Report a job's validation error; each job that is trained to its end is reported once."""


@runtime_checkable
class Extendable(Tuner, Protocol):
    """A tuner that can draw more configurations later, also after `ask` has returned None (section 3.5.4)."""

    def raise_num_configs(self, num_configs: int) -> None:
        """Lets the tuner draw up to `num_configs` in all. Raises InputError unless that is more than before."""


def check_more_configs(num_configs: int, before: int | None, num_drawn: int) -> None:
    """Raises InputError unless num_configs is above the previous limit `before`.

    If there was no limit (`before` is None), num_configs must be at least num_drawn.
    """
    checked_number("num_configs", num_configs, low=num_drawn if before is None else before + 1, integer=True)


TAIL = 0.75  # rounds after this share of a federation's rounds enter its tail mean: the last quarter


class Score(NamedTuple):
    """A trial's validation error after `rounds` rounds."""

    trial: int
    rounds: int
    error: float


def rank_key(error: float, number: int) -> tuple[bool, float, int]:
    """The key that sorts trials, best first: NaN and inf come last, and the lower trial number wins a tie."""
    return (False, error, number) if math.isfinite(error) else (True, 0.0, number)


def incumbent(scores: Iterable[Score]) -> Score | None:
    """The score of the best trial now: the lowest error at the highest number of rounds; None without scores.

    A trial that diverged is picked only if all trials diverged, however far it was trained.
    """

    def key(score: Score) -> tuple[bool, int, float, int]:
        diverged, error, number = rank_key(score.error, score.trial)
        return diverged, -score.rounds, error, number

    return min(scores, key=key, default=None)


def longer_incumbent(best: Score, shortened: Score) -> Score:
    """The incumbent, given the incumbent of all whole jobs and the score of a shortened job.

    The shortened job's trial may have more rounds than any other trial, by as little as one. Rounds alone would then
    make it the incumbent, whatever its error. So it must also have no higher error: the shortened job can only lower
    the incumbent's error. With fewer rounds than the incumbent it is not compared.
    """
    picked = incumbent([best, shortened])
    assert picked is not None
    no_worse = rank_key(shortened.error, 0) <= rank_key(best.error, 0)
    return picked if no_worse else best
