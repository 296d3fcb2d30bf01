"""The tuner that trains one federation. What happens inside it (manual settings, FedEx, ...) is its policy."""

from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Draw, Job


class OneFederation:
    """One trial, trained to max_rounds (rung 0) and then to total_rounds (rung 1): both results are reported."""

    def __init__(self, draw: Draw, max_rounds: int, total_rounds: int) -> None:
        checked_number("max_rounds", max_rounds, low=1, integer=True)
        checked_number("total_rounds", total_rounds, low=max_rounds, integer=True)
        self._draw = draw
        self._stretches = list(enumerate(sorted({max_rounds, total_rounds})))  # (rung, rounds) still to be asked for
        self._running = False

    def ask(self) -> Job | None:
        """The next job of the trial. None while a job is not reported yet, and after the last job."""
        if self._running or not self._stretches:
            return None
        self._running = True
        return Job(self._draw(0), *self._stretches.pop(0))

    def tell(self, job: Job, error: float) -> None:
        """Let the next job start; the error changes nothing."""
        self._running = False
