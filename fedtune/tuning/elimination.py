"""Weight-shared successive elimination: one federation halves a pool of client configurations while it trains.

Algorithm 6 of the thesis (sections 7.1.1 and 7.2.1), which selects feature maps, carried over to local training:

     1  for t = 1, ..., log2 |C|:                                     m rounds of the federation
     2-3    every data point draws a configuration from C             `draw`: every client of a cohort does
     5      w_t <- the weights trained on all of them                 the server's mean
     6-8    s_c <- the mean validation loss of those that drew c      after local training; `effects`
    10      C <- those of C whose s_c is at most the median           the better half, rounded down
    11  the result is the configuration that is left

C -> live. Filled in and departures (measured, see docs/algorithms/elimination.md):
- Configurations are dealt from a shuffled deck of the live configurations, each once before any twice. The state counts
  how often each was dealt, so that the deck follows from the state and the round's own random stream.
- Losses fall from round to round, and rounds differ in their clients. So s_c is the effect of c in the additive model
  loss = round + configuration. The model is fitted by alternating means to all losses so far, including the losses of
  eliminated configurations. An effect is sum / (n + 1/2) instead of sum / n over its n residuals: few losses say
  little, so it is shrunk towards 0.
- A loss counts within [0, worst], and one that is not finite counts as `worst`. The lower number wins a tie.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from fedtune.errors import InputError
from fedtune.tuning.feedback import bounded, worst_error
from fedtune.tuning.policy import Counts, Drawn, Errors, Thetas
from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Pool

SWEEPS = 12
SHRINKAGE = 0.5


@dataclass(frozen=True)
class EliminationSettings:
    """What a user can set: the size of the pool, and the rounds between halvings, m.

    If `rounds_per_halving` is None, m is a fortieth of max_rounds, rounded down, but at least 4.
    """

    num_configs: int = 27
    rounds_per_halving: int | None = None

    def __post_init__(self) -> None:
        checked_number("num_configs", self.num_configs, low=1, integer=True)
        if self.rounds_per_halving is not None:
            checked_number("rounds_per_halving", self.rounds_per_halving, low=1, integer=True)

    def resolve(self, max_rounds: int) -> int:
        """The rounds between halvings, m. Raises InputError if the elimination would not be over by max_rounds."""
        m = max(4, max_rounds // 40) if self.rounds_per_halving is None else self.rounds_per_halving
        rounds = m * (self.num_configs.bit_length() - 1)
        if rounds > max_rounds:
            raise InputError(
                f"max_rounds must be >= {rounds} to reduce {self.num_configs} configurations to one by halving every "
                f"{m} rounds, got {max_rounds}"
            )
        return m


class EliminationState(NamedTuple):
    """Everything that `update` remembers; the losses are forgotten once one configuration is left."""

    live: Bool[np.ndarray, " config"]
    dealt: Int[np.ndarray, " config"]  # how often each was dealt
    rounds: int
    row_round: Int[np.ndarray, " row"]
    row_config: Int[np.ndarray, " row"]
    row_loss: Float[np.ndarray, " row"]


def init(num_configs: int) -> EliminationState:
    """All configurations live."""
    nothing = np.zeros(0, np.int64)
    return EliminationState(
        np.ones(num_configs, bool), np.zeros(num_configs, np.int64), 0, nothing, nothing, np.zeros(0)
    )


def draw(state: EliminationState, draws: np.random.Generator, cohort_size: int) -> Int[np.ndarray, "client 1"]:
    """For each client the number of its configuration."""
    shuffled = draws.permutation(np.flatnonzero(state.live))
    deck = shuffled[np.argsort(state.dealt[shuffled], kind="stable")]
    return draws.permutation(np.resize(deck, cohort_size))[:, None]  # 3


def update(
    state: EliminationState,
    drawn: Int[np.ndarray, "client 1"],
    loss: Float[np.ndarray, " client"],
    num_validation: Real[np.ndarray, " client"],
    rounds_per_halving: int,
    worst: float,
) -> EliminationState:
    """The state after a round. A client whose num_validation is 0 was dealt a configuration but reported no loss."""
    if over(state):
        return state
    dealt = state.dealt + np.bincount(drawn[:, 0], minlength=len(state.live))
    answered = num_validation > 0
    rounds = state.rounds + 1
    state = EliminationState(
        state.live,
        dealt,
        rounds,
        np.concatenate([state.row_round, np.full(answered.sum(), state.rounds)]),
        np.concatenate([state.row_config, drawn[answered, 0]]),
        np.concatenate([state.row_loss, bounded(loss[answered], worst)]),
    )
    return _halve(state) if rounds % rounds_per_halving == 0 else state


def effects(state: EliminationState) -> Float[np.ndarray, " config"]:
    """The effect of each configuration: how much higher its losses are than the mean losses of its rounds."""
    effect = np.zeros(len(state.live))
    num_losses = np.bincount(state.row_config, minlength=len(effect))
    clients = np.maximum(1, np.bincount(state.row_round))
    for _ in range(SWEEPS):
        in_round = np.bincount(state.row_round, state.row_loss - effect[state.row_config]) / clients
        residual = state.row_loss - in_round[state.row_round]
        effect = np.bincount(state.row_config, residual, len(effect)) / (num_losses + SHRINKAGE)  # 8
    return effect


def over(state: EliminationState) -> bool:
    """Whether one configuration is left."""
    return int(state.live.sum()) == 1


def survivor(state: EliminationState) -> int:
    """The number of the best configuration so far; the only one left once it is over."""
    return int(np.where(state.live, effects(state), np.inf).argmin())


def to_arrays(state: EliminationState) -> dict[str, np.ndarray]:
    """The state as a checkpoint holds it."""
    return {**state._asdict(), "rounds": np.array([state.rounds])}


def from_arrays(arrays: dict[str, np.ndarray]) -> EliminationState:
    """The state that `to_arrays` wrote, to the last bit."""
    rows = (arrays[name] for name in ("row_round", "row_config", "row_loss"))
    return EliminationState(arrays["live"], arrays["dealt"], int(arrays["rounds"][0]), *rows)


def _halve(state: EliminationState) -> EliminationState:
    """The state with the better half of the live configurations, rounded down."""
    live = np.flatnonzero(state.live)
    best = live[np.argsort(effects(state)[live], kind="stable")[: len(live) // 2]]  # 10
    state = state._replace(live=np.isin(np.arange(len(state.live)), best))
    if over(state):
        state = state._replace(row_round=state.row_round[:0], row_config=state.row_config[:0], row_loss=np.zeros(0))
    return state


class EliminationPolicy:
    """Successive elimination of a flat pool's configurations; once it is over, all clients use the survivor."""

    signal = "loss"
    needs_error_before = False

    def __init__(self, pool: Pool, rounds_per_halving: int, num_classes: int) -> None:
        (configs,) = pool
        self.pool = pool
        self.state = init(len(configs))
        self._rounds_per_halving = rounds_per_halving
        self._worst = worst_error(self.signal, num_classes)

    def draw(self, draws: np.random.Generator, cohort_size: int) -> Drawn:
        """Line 3: configurations dealt evenly to the cohort."""
        return draw(self.state, draws, cohort_size)

    def update(self, drawn: Drawn, error: Errors, num_validation: Counts, error_before: Errors | None = None) -> None:
        """Lines 6 to 10: a round of losses, and a halving every `rounds_per_halving` rounds."""
        self.state = update(self.state, drawn, error, num_validation, self._rounds_per_halving, self._worst)

    def probabilities(self) -> Thetas:
        """Equal for the live configurations, and 0 for the eliminated ones."""
        return (self.state.live / self.state.live.sum(),)

    def best(self) -> tuple[int, ...]:
        """The best configuration so far."""
        return (survivor(self.state),)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state as a checkpoint holds it."""
        return to_arrays(self.state)

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Continues from the state that `to_arrays` gave, bit for bit."""
        self.state = from_arrays(arrays)
