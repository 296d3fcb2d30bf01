"""Policies: what a federation's clients train with from round to round, and what is learnt from their errors.

One small interface over the algorithms that work within a federation, for the server's strategy to drive: `draw` before
a round, `update` after it, `to_arrays` and `restore` around a checkpoint.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Real

from fedtune.tuning import elimination, fedex, rsws
from fedtune.tuning.fedex import FedExSettings
from fedtune.tuning.space import Config
from fedtune.tuning.trial import Pool


@runtime_checkable
class Policy(Protocol):
    """Hands out the configurations of a pool. Nothing changes but in `update` and `restore`."""

    @property
    def pool(self) -> Pool:
        """What `draw`, `probabilities` and `best` number."""

    @property
    def signal(self) -> str:
        """What `update` wants of a client: its "error" or its "loss", after local training."""

    @property
    def needs_error_before(self) -> bool:
        """Whether `update` also wants the signal from before local training."""

    def draw(self, draws: np.random.Generator, cohort_size: int) -> Int[np.ndarray, "client factor"]:
        """For each client the index of its element in each factor of the pool; `fedex.expand` makes a configuration."""

    def update(
        self,
        drawn: Int[np.ndarray, "client factor"],
        error: Float[np.ndarray, " client"],
        num_validation: Real[np.ndarray, " client"],
        error_before: Float[np.ndarray, " client"] | None = None,
    ) -> None:
        """Learns from a round, once every round, whatever happened in it.

        All of the cohort is given: num_validation is 0 for a client that did not answer, and the error NaN for one
        whose update was dropped.
        """

    def probabilities(self) -> tuple[Float[np.ndarray, "_"], ...]:
        """How likely a client is to draw each element of each factor."""

    def best(self) -> tuple[int, ...]:
        """The element of each factor that one would pick now."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state as a checkpoint holds it."""

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Goes on from what `to_arrays` gave, to the last bit."""


class FedExPolicy:
    """FedEx; `uniform` when its steps are off, and plain averaging when the pool is one configuration."""

    def __init__(self, pool: Pool, settings: FedExSettings, num_classes: int) -> None:
        self.pool = pool
        self.signal = settings.signal
        self.needs_error_before = settings.baseline == "client"
        self.settings = settings
        self.state = fedex.init(pool)
        self._worst = fedex.worst_error(settings.signal, num_classes)

    def draw(self, draws: np.random.Generator, cohort_size: int) -> Int[np.ndarray, "client factor"]:
        return fedex.draw(self.state, self.settings, draws, cohort_size)

    def update(
        self,
        drawn: Int[np.ndarray, "client factor"],
        error: Float[np.ndarray, " client"],
        num_validation: Real[np.ndarray, " client"],
        error_before: Float[np.ndarray, " client"] | None = None,
    ) -> None:
        # A round in which nobody returned a usable update leaves theta alone, as it leaves the weights.
        if np.isfinite(error).any():
            self.state = fedex.update(
                self.state, drawn, error, num_validation, self.settings, self._worst, error_before
            )

    def probabilities(self) -> tuple[Float[np.ndarray, "_"], ...]:
        return fedex.probabilities(self.state, self.settings)

    def best(self) -> tuple[int, ...]:
        return fedex.best(self.state)

    def to_arrays(self) -> dict[str, np.ndarray]:
        return fedex.to_arrays(self.state)

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.state = fedex.from_arrays(arrays)


class EliminationPolicy:
    """Successive elimination of a flat pool's configurations; all use the survivor once it is over."""

    signal = "loss"
    needs_error_before = False

    def __init__(self, pool: Pool, rounds_per_halving: int, num_classes: int) -> None:
        (configs,) = pool
        self.pool = pool
        self.state = elimination.init(len(configs))
        self._rounds_per_halving = rounds_per_halving
        self._worst = fedex.worst_error(self.signal, num_classes)

    def draw(self, draws: np.random.Generator, cohort_size: int) -> Int[np.ndarray, "client factor"]:
        return elimination.draw(self.state, draws, cohort_size)

    def update(
        self,
        drawn: Int[np.ndarray, "client factor"],
        error: Float[np.ndarray, " client"],
        num_validation: Real[np.ndarray, " client"],
        error_before: Float[np.ndarray, " client"] | None = None,
    ) -> None:
        self.state = elimination.update(self.state, drawn, error, num_validation, self._rounds_per_halving, self._worst)

    def probabilities(self) -> tuple[Float[np.ndarray, "_"], ...]:
        return (self.state.live / self.state.live.sum(),)

    def best(self) -> tuple[int, ...]:
        return (elimination.survivor(self.state),)

    def to_arrays(self) -> dict[str, np.ndarray]:
        return elimination.to_arrays(self.state)

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.state = elimination.from_arrays(arrays)


class EliminationThenFedEx:
    """Elimination, and then FedEx over a pool around the survivor, which `fedex_around` makes."""

    def __init__(self, first: EliminationPolicy, fedex_around: Callable[[Config], FedExPolicy]) -> None:
        self._first = first
        self._fedex_around = fedex_around
        self._second: FedExPolicy | None = None
        self._hand_over()

    @property
    def pool(self) -> Pool:
        return self._current.pool

    @property
    def signal(self) -> str:
        return self._current.signal

    @property
    def needs_error_before(self) -> bool:
        return self._current.needs_error_before

    def draw(self, draws: np.random.Generator, cohort_size: int) -> Int[np.ndarray, "client factor"]:
        return self._current.draw(draws, cohort_size)

    def update(
        self,
        drawn: Int[np.ndarray, "client factor"],
        error: Float[np.ndarray, " client"],
        num_validation: Real[np.ndarray, " client"],
        error_before: Float[np.ndarray, " client"] | None = None,
    ) -> None:
        self._current.update(drawn, error, num_validation, error_before)
        self._hand_over()

    def probabilities(self) -> tuple[Float[np.ndarray, "_"], ...]:
        return self._current.probabilities()

    def best(self) -> tuple[int, ...]:
        return self._current.best()

    def to_arrays(self) -> dict[str, np.ndarray]:
        second = {} if self._second is None else self._second.to_arrays()
        return {
            **{f"elimination.{name}": array for name, array in self._first.to_arrays().items()},
            **{f"fedex.{name}": array for name, array in second.items()},
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self._first.restore(with_prefix(arrays, "elimination."))
        self._second = None
        self._hand_over()
        if self._second is not None:
            self._second.restore(with_prefix(arrays, "fedex."))

    @property
    def _current(self) -> Policy:
        return self._first if self._second is None else self._second

    def _hand_over(self) -> None:
        if self._second is None and elimination.over(self._first.state):
            (configs,) = self._first.pool
            self._second = self._fedex_around(configs[elimination.survivor(self._first.state)])


class RSWSPolicy:
    """Random search with weight-sharing over a flat pool."""

    signal = "error"
    needs_error_before = False

    def __init__(self, pool: Pool) -> None:
        (configs,) = pool
        self.pool = pool
        self.state = rsws.init()
        self._num_configs = len(configs)

    def draw(self, draws: np.random.Generator, cohort_size: int) -> Int[np.ndarray, "client factor"]:
        return rsws.draw(self._num_configs, draws, cohort_size)

    def update(
        self,
        drawn: Int[np.ndarray, "client factor"],
        error: Float[np.ndarray, " client"],
        num_validation: Real[np.ndarray, " client"],
        error_before: Float[np.ndarray, " client"] | None = None,
    ) -> None:
        self.state = rsws.update(self.state, drawn, error, num_validation)

    def probabilities(self) -> tuple[Float[np.ndarray, "_"], ...]:
        return (np.full(self._num_configs, 1 / self._num_configs),)

    def best(self) -> tuple[int, ...]:
        return (int(rsws.mean_errors(self.state, self._num_configs).argmin()),)

    def to_arrays(self) -> dict[str, np.ndarray]:
        return rsws.to_arrays(self.state)

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.state = rsws.from_arrays(arrays)


def with_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
