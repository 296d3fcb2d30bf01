"""Random search with weight-sharing (RSWS), section 5.4 of the thesis, within one federation.

    train the shared weights: for every minibatch an architecture is drawn uniformly       `draw`: for every client
    evaluate a number of randomly drawn architectures with the shared weights on held-out data              `update`
    return the best                                                                                    `mean_errors`

Here an architecture is a client configuration out of a finite pool drawn at random. For fixed weights a learning rate
changes nothing (section 7.1.2), so a configuration is evaluated as section 7.3 does it: by a client's validation error
after local training that starts from the shared weights.

Departure: this costs no evaluation of its own. A configuration's error is the mean over the last quarter of the rounds,
weighted by validation examples, in which the shared weights were close to what they are now; scores are taken over the
same quarter. An error that is not finite counts as 1, a configuration without an error there ranks last, and the
lower number wins a tie.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real

from fedtune.tuning.fedex import bounded
from fedtune.tuning.trial import TAIL


class RSWSState(NamedTuple):
    """The last quarter's errors, one a client."""

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
    """The state after a round; a client whose num_validation is 0 says nothing."""
    rounds, heard = state.rounds + 1, num_validation > 0
    recent = state.row_round > TAIL * rounds
    return RSWSState(
        rounds,
        np.concatenate([state.row_round[recent], np.full(heard.sum(), rounds)]),
        np.concatenate([state.row_config[recent], drawn[heard, 0]]),
        np.concatenate([state.row_error[recent], bounded(error[heard], 1.0)]),
        np.concatenate([state.row_weight[recent], num_validation[heard].astype(float)]),
    )


def mean_errors(state: RSWSState, num_configs: int) -> Float[np.ndarray, " config"]:
    """Each configuration's error over the last quarter; infinite for one that has none there."""
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
