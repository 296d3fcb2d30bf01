"""Asynchronous Hyperband: brackets of ASHA that differ in how early they stop (thesis, sections 3.3.2 and 3.5.1).

The user gives n, the number of configurations, and R, the rounds of one; the rest has defaults:

    eta = 4;  r = R / 256, five rungs;  brackets s = 0, 1, 2, bracket s with a base rung of r eta^s rounds
    mean resource of a configuration in bracket s, if nobody is promoted wrongly:  (number of rungs) R / eta^(s_max - s)
    n is shared in inverse proportion to it: 12/17, 15/68 and 5/68, each rounded down; the first bracket also gets
    the remainder

The brackets are filled one after another. Promotions, in any bracket, come before new trials, so that workers idle
only at the end of the last bracket. The promotions of the first bracket come first. Without n the tuner loops through
the brackets without end (section 3.3.2). Each pass draws as many configurations into each bracket as Hyperband would.
A bracket keeps its rungs from pass to pass, which makes its later promotions better (section 3.5.4).

Modes: `standard` runs the more aggressive half of the brackets, rounded up. `aggressive` runs only the first bracket.
`conservative` runs all brackets, and the last one is random search. The text does not say which brackets `aggressive`
and `conservative` run.

Filled in: R / 256 is seldom whole. So r is the smallest whole number of rounds for which R / r is a power of eta and
there are no more than five rungs: 1 for R = 64, 4 for R = 1024. `min_rounds` sets another r. If n is so small that some
bracket might train no configuration for R rounds, that is an error before the run. (The text prints the shares as 70.5,
22.1 and 7.1 %, which don't add up.)
"""

from collections.abc import Iterator
from fractions import Fraction
from itertools import count

from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.asha import ASHA
from fedtune.tuning.hyperband import bracket_plans
from fedtune.tuning.rungs import default_min_rounds, num_halvings, rung_rounds
from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Draw, Job, check_more_configs

MODES = ("aggressive", "standard", "conservative")
MOST_RUNGS = 5


class AsyncHyperband:
    """A tuner that runs several brackets of ASHA. In each pass, bracket s gets `widths[s]` new configurations."""

    def __init__(
        self,
        draw: Draw,
        max_rounds: int,
        num_configs: int | None = None,
        min_rounds: int | None = None,
        reduction_factor: int = 4,
        mode: str = "standard",
    ) -> None:
        if min_rounds is None:
            min_rounds = few_rungs_min_rounds(max_rounds, reduction_factor)
        rounds = rung_rounds(max_rounds, min_rounds, reduction_factor)
        num_brackets = how_many_brackets(mode, len(rounds))
        self.num_configs = num_configs
        self._num_rungs = len(rounds)
        self._reduction_factor = reduction_factor
        if num_configs is None:
            plans = bracket_plans(rounds, reduction_factor)[:num_brackets]
            self.widths = [plan.num_configs for plan in plans]
        else:
            checked_number("num_configs", num_configs, low=1, integer=True)
            check_enough(num_configs, len(rounds), reduction_factor, num_brackets)
            self.widths = shares(num_configs, len(rounds), reduction_factor, num_brackets)
        draws = map(draw, count())
        self._brackets = [
            ASHA(lambda _: next(draws), max_rounds, min_rounds, reduction_factor, s, width)
            for s, width in enumerate(self.widths)
        ]
        self._turns = self._passes(1 if num_configs is not None else None)
        self._filling = next(self._turns)
        self._bracket_of: dict[int, ASHA] = {}  # by the number of the trial

    def ask(self) -> Job | None:
        """The next job; None if n configurations have been drawn and no trial can be promoted."""
        for bracket in self._brackets:
            job = bracket.promote()
            if job is not None:
                return job
        return self._grow()

    def raise_num_configs(self, num_configs: int) -> None:
        """Lets the tuner draw up to `num_configs` in all, and fills the brackets in turn up to their new shares."""
        if self.num_configs is None:
            raise InputError("num_configs can be raised only if it was set; without it the brackets never end")
        check_more_configs(num_configs, self.num_configs, self.num_configs)
        widths = self._shares(num_configs)
        if widths[0] < self.widths[0]:  # only the first share can shrink: it includes what rounding leaves
            enough = next(n for n in count(num_configs) if self._shares(n)[0] >= self.widths[0])
            raise InputError(
                f"num_configs must be >= {enough} to leave the first bracket its {self.widths[0]} configurations, "
                f"got {num_configs}"
            )
        self.num_configs, self.widths = num_configs, widths
        self._turns = self._passes(1)
        self._filling = next(self._turns)

    def tell(self, job: Job, error: float) -> None:
        """Enter a job's error in its bracket."""
        self._bracket_of.get(job.trial.number, self._brackets[0]).tell(job, error)

    def _shares(self, num_configs: int) -> list[int]:
        return shares(num_configs, self._num_rungs, self._reduction_factor, len(self.widths))

    def _grow(self) -> Job | None:
        """The job of a new trial in the bracket that is being filled, or in the next bracket if that one is full."""
        job = self._filling.grow()
        if job is None:
            bracket = next(self._turns, None)
            if bracket is None:
                return None
            self._filling = bracket
            job = bracket.grow()
            assert job is not None
        self._bracket_of[job.trial.number] = self._filling
        return job

    def _passes(self, num_passes: int | None) -> Iterator[ASHA]:
        """The brackets in turn. Each gets room for the configurations of one more pass. None means endless passes."""
        for passed in count() if num_passes is None else range(num_passes):
            for bracket, width in zip(self._brackets, self.widths, strict=True):
                bracket.num_configs = (passed + 1) * width
                yield bracket


def few_rungs_min_rounds(max_rounds: int, reduction_factor: int) -> int:
    """The smallest whole r for which R / r is a power of eta and there are no more than five rungs."""
    checked_number("max_rounds", max_rounds, low=1, integer=True)
    checked_number("reduction_factor", reduction_factor, low=2, integer=True)
    min_rounds = default_min_rounds(max_rounds, reduction_factor)
    while num_halvings(max_rounds, min_rounds, reduction_factor) >= MOST_RUNGS:
        min_rounds *= reduction_factor
    return min_rounds


def how_many_brackets(mode: str, num_rungs: int) -> int:
    """How many brackets a mode runs. There are as many brackets as rungs: of five brackets, 1, 3 or 5 run."""
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    return {"aggressive": 1, "standard": (num_rungs + 1) // 2, "conservative": num_rungs}[mode]


def shares(num_configs: int, num_rungs: int, reduction_factor: int, num_brackets: int) -> list[int]:
    """How many of n configurations each bracket gets, so that all are expected to train equally many rounds."""
    inverse = [Fraction(reduction_factor ** (num_rungs - s - 1), num_rungs - s) for s in range(num_brackets)]
    widths = [int(num_configs * share / sum(inverse)) for share in inverse]
    return [num_configs - sum(widths[1:]), *widths[1:]]


def check_enough(num_configs: int, num_rungs: int, reduction_factor: int, num_brackets: int) -> None:
    """Raises InputError if n is so small that some bracket might train no configuration for R rounds."""

    def too_narrow(n: int) -> list[int]:
        widths = shares(n, num_rungs, reduction_factor, num_brackets)
        return [s for s, width in enumerate(widths) if width < reduction_factor ** (num_rungs - s - 1)]

    if too_narrow(num_configs):
        enough = next(n for n in count(num_configs) if not too_narrow(n))
        raise InputError(
            f"num_configs must be >= {enough} for each of {num_brackets} brackets to train one to max_rounds, "
            f"got {num_configs}; a larger min_rounds needs fewer"
        )
