"""ASHA: asynchronous successive halving by promotion, Algorithm 3 of the thesis (section 3.3.2; Li et al., MLSys 2020).

     3  repeat
     4      for each free worker: run get_job()                                     `ask`
     8      for each completed job (theta, k) with loss l: enter l in rung k        `tell`
    11  get_job():
    13      for k = floor(log_eta(R / r)) - s - 1, ..., 1, 0:
    14          candidates = top_k(rung k, |rung k| / eta)
    15          promotable = those of the candidates not already promoted
    16-17       if there are any: return promotable[0], k + 1
    20      draw a random configuration theta
    21      return theta, 0

R -> max_rounds, r -> min_rounds, eta -> reduction_factor, s -> early_stopping_rate; rung k ends after r eta^(s + k)
rounds, counted from the trial's start.

Filled in: the k of top_k is rounded down, NaN and inf rank last, and the lower trial number wins a tie. With
`num_configs` no more than that many are drawn (section 3.5.1), and the promotions that follow are still made.
Departures: R / r must be a power of eta, so that the top rung is R itself. A trial whose error is not finite is never
promoted, even where it is among the candidates because too few others did better.
"""

from fedtune.errors import InputError
from fedtune.tuning.rungs import Rung
from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Draw, Job, Trial


class ASHA:
    """A tuner that trains on only those trials that are among the best of their rung so far."""

    def __init__(
        self,
        draw: Draw,
        max_rounds: int,
        min_rounds: int | None = None,
        reduction_factor: int = 3,
        early_stopping_rate: int = 0,
        num_configs: int | None = None,
    ) -> None:
        checked_number("max_rounds", max_rounds, low=1, integer=True)
        checked_number("reduction_factor", reduction_factor, low=2, integer=True)
        if min_rounds is None:
            min_rounds = default_min_rounds(max_rounds, reduction_factor)
        if num_configs is not None:
            checked_number("num_configs", num_configs, low=1, integer=True)
        halvings = num_halvings(max_rounds, min_rounds, reduction_factor)
        checked_number("early_stopping_rate", early_stopping_rate, low=0, high=halvings, integer=True)
        self.num_configs = num_configs
        self.rung_rounds = tuple(min_rounds * reduction_factor**k for k in range(early_stopping_rate, halvings + 1))
        self._draw = draw
        self._rungs = [Rung(reduction_factor) for _ in self.rung_rounds]
        self._trials: list[Trial] = []
        self._running: set[tuple[int, int]] = set()

    def ask(self) -> Job | None:
        """The next job; None once `num_configs` have been drawn and nobody can be promoted."""
        for k in reversed(range(len(self._rungs) - 1)):  # 13
            number = self._rungs[k].promote()  # 14, 15
            if number is not None:  # 16
                return self._start(self._trials[number], k + 1)  # 17
        if len(self._trials) == self.num_configs:
            return None
        self._trials.append(self._draw(len(self._trials)))  # 20
        return self._start(self._trials[-1], 0)  # 21

    def tell(self, job: Job, error: float) -> None:
        """Enter a job's error in its rung."""
        if (job.trial.number, job.rung) not in self._running:
            raise InputError(f"a job must be running to be told, got trial {job.trial.number} in rung {job.rung}")
        self._running.remove((job.trial.number, job.rung))
        self._rungs[job.rung].record(job.trial.number, error)  # 9

    def _start(self, trial: Trial, rung: int) -> Job:
        self._running.add((trial.number, rung))
        return Job(trial, rung, self.rung_rounds[rung])


def num_halvings(max_rounds: int, min_rounds: int, reduction_factor: int) -> int:
    """log_eta(R / r), counted in whole numbers: the logarithms of 243 and 3 divide to less than 5."""
    checked_number("min_rounds", min_rounds, low=1, high=max_rounds, integer=True)
    halvings, rounds = 0, min_rounds
    while rounds < max_rounds:
        halvings, rounds = halvings + 1, rounds * reduction_factor
    if rounds != max_rounds:
        raise InputError(
            f"max_rounds must be min_rounds ({min_rounds}) times a power of reduction_factor ({reduction_factor}), "
            f"got {max_rounds}; {rounds // reduction_factor} or {rounds} would do"
        )
    return halvings


def default_min_rounds(max_rounds: int, reduction_factor: int) -> int:
    """The smallest whole r for which R / r is a power of eta (R >= 1, eta >= 2): 1 for 81 and eta 3, 11 for 99.

    InputError where that is R itself, for then nothing could be stopped early. It names rounds that would do: the
    powers of eta around R, whose rungs start at 1, and the multiples of eta^2 around R, which have three rungs or more.
    """
    min_rounds, power = max_rounds, reduction_factor
    while min_rounds % reduction_factor == 0:
        min_rounds //= reduction_factor
    if min_rounds < max_rounds:
        return min_rounds
    while power * reduction_factor < max_rounds:
        power *= reduction_factor
    multiple = reduction_factor**2 * (max_rounds // reduction_factor**2)
    would_do = {power, power * reduction_factor, multiple, multiple + reduction_factor**2} - {0}
    raise InputError(
        f"max_rounds must be a multiple of reduction_factor ({reduction_factor}), got {max_rounds}; "
        f"{', '.join(map(str, sorted(would_do)))} would do"
    )
