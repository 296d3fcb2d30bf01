"""Elimination, and then FedEx around the configuration that is left, within one federation.

Elimination looks for a good region of the whole space; FedEx refines what it found. One policy does both in turn.
"""

from collections.abc import Callable

import numpy as np

from fedtune.tuning.elimination import EliminationPolicy, over, survivor
from fedtune.tuning.fedex import FedExPolicy
from fedtune.tuning.policy import Counts, Drawn, Errors, Policy, Thetas, with_prefix
from fedtune.tuning.space import Config
from fedtune.tuning.trial import Pool


class EliminationThenFedEx:
    """Elimination, and then FedEx. `fedex_around(survivor)` is FedEx over a pool around the surviving configuration."""

    def __init__(self, first: EliminationPolicy, fedex_around: Callable[[Config], FedExPolicy]) -> None:
        self._first = first
        self._fedex_around = fedex_around
        self._second: FedExPolicy | None = None
        self._hand_over()

    @property
    def pool(self) -> Pool:
        """The pool of elimination, and later the pool around the survivor."""
        return self._current.pool

    @property
    def signal(self) -> str:
        """The feedback metric of the algorithm that is running."""
        return self._current.signal

    @property
    def needs_error_before(self) -> bool:
        """Whether the algorithm that is running needs the feedback metric from before local training."""
        return self._current.needs_error_before

    def draw(self, draws: np.random.Generator, cohort_size: int) -> Drawn:
        """For each client the elements of `pool` that the running algorithm draws."""
        return self._current.draw(draws, cohort_size)

    def update(self, drawn: Drawn, error: Errors, num_validation: Counts, error_before: Errors | None = None) -> None:
        """Learns from a round; FedEx starts after the round that leaves one configuration."""
        self._current.update(drawn, error, num_validation, error_before)
        self._hand_over()

    def probabilities(self) -> Thetas:
        """The distributions over `pool`."""
        return self._current.probabilities()

    def best(self) -> tuple[int, ...]:
        """The best element of each factor of `pool`."""
        return self._current.best()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state of both algorithms; FedEx has none before it starts."""
        second = {} if self._second is None else self._second.to_arrays()
        return {
            **{f"elimination.{name}": array for name, array in self._first.to_arrays().items()},
            **{f"fedex.{name}": array for name, array in second.items()},
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Continues from the state that `to_arrays` gave, bit for bit."""
        self._first.restore(with_prefix(arrays, "elimination."))
        self._second = None
        self._hand_over()
        if self._second is not None:
            self._second.restore(with_prefix(arrays, "fedex."))

    @property
    def _current(self) -> Policy:
        return self._first if self._second is None else self._second

    def _hand_over(self) -> None:
        if self._second is None and over(self._first.state):
            (configs,) = self._first.pool
            self._second = self._fedex_around(configs[survivor(self._first.state)])
