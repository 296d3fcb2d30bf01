"""Random search: every trial is drawn at random and trained for the same number of rounds."""

from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Draw, Job, check_more_configs


class RandomSearch:
    """A tuner that stops no trial early; it ends after `num_configs` trials, or never if that is None."""

    def __init__(self, draw: Draw, max_rounds: int, num_configs: int | None = None) -> None:
        checked_number("max_rounds", max_rounds, low=1, integer=True)
        if num_configs is not None:
            checked_number("num_configs", num_configs, low=1, integer=True)
        self.max_rounds = max_rounds
        self.num_configs = num_configs
        self._draw = draw
        self._num_drawn = 0

    def ask(self) -> Job | None:
        """The job of a new trial; None after `num_configs` trials."""
        if self._num_drawn == self.num_configs:
            return None
        self._num_drawn += 1
        return Job(self._draw(self._num_drawn - 1), 0, self.max_rounds)

    def raise_num_configs(self, num_configs: int) -> None:
        """Lets the tuner draw more configurations, up to `num_configs` in all."""
        check_more_configs(num_configs, self.num_configs, self._num_drawn)
        self.num_configs = num_configs

    def tell(self, job: Job, error: float) -> None:
        """Ignores the error: no error changes what comes next."""
