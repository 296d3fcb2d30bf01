"""What a tuner and a study say to each other: trials, jobs, scores. Lower errors are better; NaN and inf are worst."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from fedtune.tuning.space import Config as Config
from fedtune.tuning.space import checked_number

# A product of factors. One factor of whole client configurations is a flat pool, and ((config,),) is plain FedAvg;
# with several factors, a client configuration is one element of each, merged.
Pool = tuple[tuple[Config, ...], ...]


@dataclass(frozen=True)
class Trial:
    """One federation: the server's configuration and the client configurations that FedEx weighs.

    `parent` is the number of the trial whose state it starts from, as of the ask of this one's first job: the state
    that the parent's last told job left, though a later job of the parent may be running by then. Rounds are counted on
    from the parent's. None: it starts afresh.
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


Draw = Callable[[int], Trial]  # makes trial number n from a random stream of its own
Compose = Callable[
    [int, Config, Config], Trial
]  # makes it from the values of what is searched: the server's, the client's


@dataclass(frozen=True)
class Job:
    """Train a trial on until it has had `rounds` rounds in all."""

    trial: Trial
    rung: int
    rounds: int


@runtime_checkable
class Tuner(Protocol):
    """Decides what to train next."""

    def ask(self) -> Job | None:
        """The next job; None when there is nothing to run before the next `tell`, or ever if nothing is running."""

    def tell(self, job: Job, error: float) -> None:
        """Take note of a job's validation error."""


@runtime_checkable
class Extendable(Tuner, Protocol):
    """A tuner of which more configurations can be asked, also once `ask` has returned None (section 3.5.4)."""

    def raise_num_configs(self, num_configs: int) -> None:
        """Lets it draw up to so many in all. Raises InputError unless that is more than before."""


def check_more_configs(num_configs: int, before: int | None, num_drawn: int) -> None:
    """Raises InputError unless it is more than the limit was before, or where there was none, no fewer than drawn."""
    checked_number("num_configs", num_configs, low=num_drawn if before is None else before + 1, integer=True)


TAIL = 0.75  # what comes after this share of the rounds enters a federation's tail mean: the last quarter


class Score(NamedTuple):
    """A trial's validation error after so many rounds."""

    trial: int
    rounds: int
    error: float


def rank_key(error: float, number: int) -> tuple[bool, float, int]:
    """What to sort trials by, best first: NaN and inf come last, and the lower trial number wins a tie."""
    return (False, error, number) if math.isfinite(error) else (True, 0.0, number)


def incumbent(scores: Iterable[Score]) -> Score | None:
    """The score of the trial one would pick now: the best at the highest number of rounds; None without scores.

    A trial that diverged is picked only where all did, however far it was trained.
    """

    def key(score: Score) -> tuple[bool, int, float, int]:
        diverged, error, number = rank_key(score.error, score.trial)
        return diverged, -score.rounds, error, number

    return min(scores, key=key, default=None)
