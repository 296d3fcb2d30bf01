"""Random search with weight-sharing (RSWS), section 5.4 of the thesis, within one federation.

    train the shared weights: for every minibatch an architecture is drawn uniformly       `draw`: for every client
    evaluate a number of randomly drawn architectures with the shared weights on held-out data              `update`
    return the best                                                                                    `mean_errors`

Here an architecture is a client configuration out of a finite pool drawn at random. For fixed weights a learning rate
changes nothing (section 7.1.2), so a configuration is evaluated as in section 7.3: by a client's validation error after
local training that starts from the shared weights.

Departure: this needs no extra evaluation. A configuration's error is the mean over the last quarter of the rounds,
weighted by validation examples. In these rounds the shared weights were close to the present weights. A trial's
score is a mean over the same rounds. An error counts within [0, 1], and one that is not finite counts as 1. A
configuration without an error in these rounds ranks last. The lower number wins a tie.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real

from fedtune.tuning.feedback import bounded
from fedtune.tuning.policy import Counts, Drawn, Errors, Thetas
from fedtune.tuning.trial import TAIL, Pool


class RSWSState(NamedTuple):
    """The errors of the last quarter of the rounds, a row for each client that answered."""

    rounds: int
    row_round: Int[np.ndarray, " row"]
    row_config: Int[np.ndarray, " row"]
    row_error: Float[np.ndarray, " row"]
    row_weight: Float[np.ndarray, " row"]


def init() -> RSWSState:
    """No errors yet."""
    nothing = np.zeros(0, np.int64)
    return RSWSState(0, nothing, nothing, np.zeros(0), np.zeros(0))


def draw(num_configs: int, draws: np.random.Generator, cohort_size: int) -> Int[np.ndarray, "client 1"]:
    """For each client the number of its configuration."""
    return draws.integers(num_configs, size=(cohort_size, 1))


def update(
    state: RSWSState,
    drawn: Int[np.ndarray, "client 1"],
    error: Float[np.ndarray, " client"],
    num_validation: Real[np.ndarray, " client"],
) -> RSWSState:
    """The state after a round. A client whose num_validation is 0 reported no error."""
    rounds, answered = state.rounds + 1, num_validation > 0
    recent = state.row_round > TAIL * rounds
    return RSWSState(
        rounds,
        np.concatenate([state.row_round[recent], np.full(answered.sum(), rounds)]),
        np.concatenate([state.row_config[recent], drawn[answered, 0]]),
        np.concatenate([state.row_error[recent], bounded(error[answered], 1.0)]),
        np.concatenate([state.row_weight[recent], num_validation[answered].astype(float)]),
    )


def mean_errors(state: RSWSState, num_configs: int) -> Float[np.ndarray, " config"]:
    """Each configuration's mean error over the last quarter of the rounds; infinite if it has none there."""
    weight = np.bincount(state.row_config, state.row_weight, num_configs)
    total = np.bincount(state.row_config, state.row_weight * state.row_error, num_configs)
    mean: np.ndarray = np.divide(total, weight, out=np.full(num_configs, np.inf), where=weight > 0)
    return mean


def to_arrays(state: RSWSState) -> dict[str, np.ndarray]:
    """The state as a checkpoint holds it."""
    return {**state._asdict(), "rounds": np.array([state.rounds])}


def from_arrays(arrays: dict[str, np.ndarray]) -> RSWSState:
    """The state that `to_arrays` wrote, to the last bit."""
    rows = (arrays[name] for name in ("row_round", "row_config", "row_error", "row_weight"))
    return RSWSState(int(arrays["rounds"][0]), *rows)


class RSWSPolicy:
    """Random search with weight-sharing over a flat pool."""

    signal = "error"
    needs_error_before = False

    def __init__(self, pool: Pool) -> None:
        (configs,) = pool
        self.pool = pool
        self.state = init()
        self._num_configs = len(configs)

    def draw(self, draws: np.random.Generator, cohort_size: int) -> Drawn:
        """For each client a configuration, drawn uniformly."""
        return draw(self._num_configs, draws, cohort_size)

    def update(self, drawn: Drawn, error: Errors, num_validation: Counts, error_before: Errors | None = None) -> None:
        """Adds the errors of a round."""
        self.state = update(self.state, drawn, error, num_validation)

    def probabilities(self) -> Thetas:
        """Uniform, in every round."""
        return (np.full(self._num_configs, 1 / self._num_configs),)

    def best(self) -> tuple[int, ...]:
        """The configuration with the smallest mean error over the last quarter of the rounds."""
        return (int(mean_errors(self.state, self._num_configs).argmin()),)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state as a checkpoint holds it."""
        return to_arrays(self.state)

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Continues from the state that `to_arrays` gave, bit for bit."""
        self.state = from_arrays(arrays)
