"""The tuner of what happens within one federation: manual settings, FedEx, and the other policies over a pool."""

from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Draw, Job


class OneFederation:
    """One trial, trained to max_rounds (rung 0) and then to total_rounds (rung 1): a search is compared with both."""

    def __init__(self, draw: Draw, max_rounds: int, total_rounds: int) -> None:
        checked_number("max_rounds", max_rounds, low=1, integer=True)
        checked_number("total_rounds", total_rounds, low=max_rounds, integer=True)
        self._draw = draw
        self._stretches = list(enumerate(sorted({max_rounds, total_rounds})))  # (rung, rounds) still to be asked for
        self._running = False

    def ask(self) -> Job | None:
        """The next stretch of the trial, once the one before is reported; None after the last."""
        if self._running or not self._stretches:
            return None
        self._running = True
        return Job(self._draw(0), *self._stretches.pop(0))

    def tell(self, job: Job, error: float) -> None:
        """Let the next stretch start; the error changes nothing."""
        self._running = False
