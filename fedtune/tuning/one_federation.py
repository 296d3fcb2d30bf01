"""The tuner of everything that happens within one federation: manual settings, FedEx, and their like."""

from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Draw, Job


class OneFederation:
    """One trial, trained to max_rounds (rung 0) and on to total_rounds (rung 1): a search is compared with both."""

    def __init__(self, draw: Draw, max_rounds: int, total_rounds: int) -> None:
        checked_number("max_rounds", max_rounds, low=1, integer=True)
        checked_number("total_rounds", total_rounds, low=max_rounds, integer=True)
        trial = draw(0)
        self._jobs = [Job(trial, rung, rounds) for rung, rounds in enumerate(sorted({max_rounds, total_rounds}))]
        self._running = False

    def ask(self) -> Job | None:
        """The next stretch of the trial, once the one before is told; None after the last."""
        if self._running or not self._jobs:
            return None
        self._running = True
        return self._jobs.pop(0)

    def tell(self, job: Job, error: float) -> None:
        self._running = False
