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

Filled in: the k of top_k is rounded down, NaN and inf rank last, and the lower trial number wins a tie. `num_configs`
limits how many configurations are drawn (section 3.5.1). It must be at least eta^(s_max - s). Promotions continue after
the last draw.
Departures: R / r must be a power of eta, so that the top rung is R itself. The default eta is 3 and not the 4 of
section 3.5.1, since the default R of 81 rounds is a power of 3; `async_hyperband` has 4. A trial whose error is not
finite is never promoted, even if it is among the candidates because too few other trials did better. With
`infinite_horizon` the rungs have no top (section 3.3.4): line 13 starts at the highest rung that exists, and max_rounds
only places the first rungs.
"""

from fedtune.errors import InputError
from fedtune.tuning.rungs import Rung, rung_rounds
from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Draw, Job, Trial, check_more_configs


class ASHA:
    """A tuner that promotes a trial to the next rung if it is among the best of its rung so far."""

    def __init__(
        self,
        draw: Draw,
        max_rounds: int,
        min_rounds: int | None = None,
        reduction_factor: int = 3,
        early_stopping_rate: int = 0,
        num_configs: int | None = None,
        infinite_horizon: bool = False,
    ) -> None:
        self.rung_rounds = rung_rounds(max_rounds, min_rounds, reduction_factor, early_stopping_rate)
        if num_configs is not None:
            # Line 3 of Algorithm 2 too: with fewer configurations perhaps none would be trained to max_rounds.
            fewest = 1 if infinite_horizon else reduction_factor ** (len(self.rung_rounds) - 1)
            checked_number("num_configs", num_configs, low=fewest, integer=True)
        self.num_configs = num_configs
        self.infinite_horizon = infinite_horizon
        self._draw = draw
        self._rungs = [Rung(reduction_factor) for _ in self.rung_rounds]
        self._trials: dict[int, Trial] = {}
        self._running: set[tuple[int, int]] = set()

    def ask(self) -> Job | None:
        """The next job; None if `num_configs` have been drawn and no trial can be promoted."""
        return self.promote() or self.grow()

    def promote(self) -> Job | None:
        """The job of a trial that can be promoted, from the highest rung that has one; None if no trial can be."""
        promoting = self._rungs if self.infinite_horizon else self._rungs[:-1]
        for k in reversed(range(len(promoting))):  # 13
            number = self._rungs[k].promote()  # 14, 15
            if number is not None:  # 16
                return self._start(self._trials[number], k + 1)  # 17
        return None

    def grow(self) -> Job | None:
        """The job of a new trial in the base rung; None if `num_configs` have been drawn."""
        if len(self._trials) == self.num_configs:
            return None
        trial = self._draw(len(self._trials))  # 20
        self._trials[trial.number] = trial
        return self._start(trial, 0)  # 21

    def raise_num_configs(self, num_configs: int) -> None:
        """Lets the tuner draw more configurations, up to `num_configs` in all."""
        check_more_configs(num_configs, self.num_configs, len(self._trials))
        self.num_configs = num_configs

    def tell(self, job: Job, error: float) -> None:
        """Enter a job's error in its rung."""
        if (job.trial.number, job.rung) not in self._running:
            raise InputError(f"a job must be running to be reported, got trial {job.trial.number} in rung {job.rung}")
        self._running.remove((job.trial.number, job.rung))
        self._rungs[job.rung].record(job.trial.number, error)  # 9

    def _start(self, trial: Trial, rung: int) -> Job:
        if rung == len(self._rungs):
            self._rungs.append(Rung(self._rungs[0].reduction_factor))
            self.rung_rounds += (self.rung_rounds[-1] * self._rungs[0].reduction_factor,)
        self._running.add((trial.number, rung))
        return Job(trial, rung, self.rung_rounds[rung])
