"""The interface of a policy: it chooses the configurations of a federation's clients, and learns from their errors.

The server's strategy drives it: `draw` before a round, `update` after it, `to_arrays` and `restore` around a
checkpoint. The policy class is at the end of its algorithm's module: `fedex`, `elimination`, `elimination_then_fedex`
and `rsws`.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Real

from fedtune.tuning.space import Config, Number
from fedtune.tuning.trial import Pool

Drawn = Int[np.ndarray, "client factor"]  # for each client the index of its element in each factor of the pool
Errors = Float[np.ndarray, " client"]
Counts = Real[np.ndarray, " client"]
Thetas = tuple[Float[np.ndarray, "_"], ...]  # a distribution for each factor of the pool


@runtime_checkable
class Policy(Protocol):
    """Hands out the configurations of a pool. Its state changes in `update` and `restore` only."""

    @property
    def pool(self) -> Pool:
        """The client configurations. `draw`, `probabilities` and `best` refer to their positions in it."""

    @property
    def signal(self) -> str:
        """The feedback metric that `update` needs from a client after local training: its "error" or its "loss"."""

    @property
    def needs_error_before(self) -> bool:
        """Whether `update` also needs the feedback metric from before local training."""

    def draw(self, draws: np.random.Generator, cohort_size: int) -> Drawn:
        """The elements of the pool that each client of a cohort trains with; `expand` makes a configuration."""

    def update(self, drawn: Drawn, error: Errors, num_validation: Counts, error_before: Errors | None = None) -> None:
        """Learns from a round; called once after every round, also if no client answered.

        The arrays hold the whole cohort. num_validation is 0 for a client that did not answer. The error is NaN for a
        client whose update was rejected.
        """

    def probabilities(self) -> Thetas:
        """How likely a client is to draw each element of each factor."""

    def best(self) -> tuple[int, ...]:
        """The index of the best element of each factor, as far as is known now."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state as a checkpoint holds it."""

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Continues from the state that `to_arrays` gave, bit for bit."""


def expand(pool: Pool, drawn: Int[np.ndarray, " factor"]) -> Config:
    """The client configuration that one row of a policy's `draw` stands for."""
    config: dict[str, Number] = {}
    for factor, index in zip(pool, drawn, strict=True):
        config.update(factor[index])
    return config


def entropy(thetas: Thetas) -> float:
    """The entropy of the product of independent distributions, in nats."""
    positive = [theta[theta > 0] for theta in thetas]
    return max(0.0, -sum(float(theta @ np.log(theta)) for theta in positive))


def with_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint whose names begin with the prefix, by their names without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
