"""FedEx: exponentiated gradient over a finite pool of client configurations, while one federation trains.

Algorithm 7 of the thesis (section 7.3; later Khodak et al., NeurIPS 2021, arXiv 2106.04502). These lines use or update
theta:

     1  for round t = 1, ..., T:
     2      for client k = 1, ..., B:
     4          c_k ~ theta                                                   `draw`: the server draws, and sends c_k
     6          g_k = (F_k - lambda) 1{c_k = i} / theta_i                     F_k: error after local training, on V_k
     9      theta <- theta * exp(-eta_t sum_k |V_k| g_k / sum_k |V_k|)        `update`
    10      theta <- theta / ||theta||_1

theta -> exp(log_theta), F -> error, lambda -> baseline, |V| -> num_validation. theta is a tuple of independent
distributions, one for each factor of the pool; a flat pool has one factor. The other lines are elsewhere: line 3 (send
the weights) and line 8 (federated averaging) are in `fedtune.server.strategy`, line 5 is the client's local training.

Filled in, since the text leaves it open:
- The step size eta_t is eta_0 / d. eta_0 is base_step_size, by default sqrt(2 ln k). The step size `aggressive` has
  d = ||g||, `adaptive` has d = sqrt(sum of ||g||^2 so far), `auto` has d = sqrt(t), `constant` has d = 1, and `scale`
  has d = 1 / sqrt(2 ln k). The norm is the largest absolute coordinate. Every factor of the pool has its own number of
  elements k and its own norm. `off` leaves theta unchanged: the control that every comparison needs.
- entropy_cutoff, from the authors' code: if theta's entropy is below it after an update, theta is never updated again,
  and every client draws its most probable element from then on.
- The baseline lambda must not depend on what this client drew in this round, otherwise the gradient is biased.
  `previous` is the mean of past rounds, weighted by discount ** age. `leave_one_out` is the mean of the cohort's other
  clients. `client` is the client's own error before local training.
Departures: an error counts within [0, worst], and one that is not finite counts as `worst`. With min_probability m,
clients draw from (1 - k m) theta + m, and that is what line 6 divides by.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real

from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.feedback import SIGNALS, bounded, worst_error
from fedtune.tuning.policy import Counts, Drawn, Errors, Thetas, entropy
from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Pool

STEP_SIZES = ("aggressive", "adaptive", "auto", "constant", "scale", "off")
BASELINES = ("previous", "leave_one_out", "client", "none")
FORMS = ("flat", "product")
LARGEST_STEP_SIZE = 1e6  # of base_step_size: so no step overflows


@dataclass(frozen=True)
class FedExSettings:
    """What a user can set: how theta moves, and its pool (in a product, `pool_size` is the size of each factor)."""

    step_size: str = "adaptive"
    base_step_size: float | None = None  # eta_0; None means sqrt(2 ln k) for each factor of k elements
    baseline: str = "previous"
    discount: float = 0.9
    signal: str = "error"
    min_probability: float = 0.0
    entropy_cutoff: float = 0.0  # in nats; at 0 theta is always updated
    pool_size: int = 9
    perturbation: float = 0.1
    form: str = "flat"

    def __post_init__(self) -> None:
        for name, known in {"step_size": STEP_SIZES, "baseline": BASELINES, "signal": SIGNALS, "form": FORMS}.items():
            if getattr(self, name) not in known:
                raise UnknownNameError(name, str(getattr(self, name)), known)
        if self.base_step_size is not None:
            checked_number("base_step_size", self.base_step_size, low=0, low_open=True, high=LARGEST_STEP_SIZE)
        checked_number("discount", self.discount, low=0, high=1)
        checked_number("pool_size", self.pool_size, low=1, integer=True)
        checked_number("perturbation", self.perturbation, low=0, high=1)
        checked_number("min_probability", self.min_probability, low=0, high=1 / self.pool_size)
        checked_number("entropy_cutoff", self.entropy_cutoff, low=0)


class FedExState(NamedTuple):
    """Everything that `update` remembers from round to round."""

    log_theta: tuple[Float[np.ndarray, "_"], ...]
    gradient_norm: Float[np.ndarray, " factor"]  # sqrt of the sum of the gradients' squared norms
    past_error: float  # discounted mean of the rounds' mean errors
    past_weight: float  # sum of the discounts in that mean; 0 before the first round
    rounds: int


def init(pool: Pool) -> FedExState:
    """Uniform distributions over the pool's factors."""
    log_theta = tuple(np.full(len(factor), -math.log(len(factor))) for factor in pool)
    return FedExState(log_theta, np.zeros(len(pool)), past_error=0.0, past_weight=0.0, rounds=0)


def probabilities(state: FedExState, settings: FedExSettings) -> Thetas:
    """The distributions that clients draw from: theta, with min_probability mixed in.

    Once theta is no longer updated, the best element of each factor has probability 1.
    """
    if stopped(state, settings):
        return tuple(
            (np.arange(len(z)) == index).astype(float) for z, index in zip(state.log_theta, best(state), strict=True)
        )
    return _with_floor(state, settings)


def stopped(state: FedExState, settings: FedExSettings) -> bool:
    """Whether theta is no longer updated, since its entropy was below the cut-off after an update."""
    return state.rounds > 0 and entropy(_with_floor(state, settings)) < settings.entropy_cutoff


def draw(
    state: FedExState, settings: FedExSettings, rng: np.random.Generator, cohort_size: int
) -> Int[np.ndarray, "client factor"]:
    """For each client the index of its element in each factor of the pool."""
    # In (0, 1], so that nothing of probability below 2^-53 is drawn: line 6 divides by it.
    uniform = 1 - rng.random((cohort_size, len(state.log_theta)))
    cumulative = [np.cumsum(theta) for theta in probabilities(state, settings)]
    columns = [np.searchsorted(total / total[-1], u) for total, u in zip(cumulative, uniform.T, strict=True)]
    return np.stack(columns, axis=1)  # 4


def update(
    state: FedExState,
    drawn: Int[np.ndarray, "client factor"],
    error: Float[np.ndarray, " client"],
    num_validation: Real[np.ndarray, " client"],
    settings: FedExSettings,
    worst: float,
    error_before: Float[np.ndarray, " client"] | None = None,
) -> FedExState:
    """The state after one exponentiated-gradient step on the errors of the clients that answered.

    The state stays the same if no client with validation examples answered. `error_before`, each client's error before
    local training, is needed for the baseline `client`.
    """
    answered = num_validation > 0
    if not answered.any() or settings.step_size == "off" or stopped(state, settings):
        return state
    drawn, error, num_validation = drawn[answered], bounded(error[answered], worst), num_validation[answered]
    if error_before is not None:
        error_before = bounded(error_before[answered], worst)
    advantage = error - _baseline(state, error, num_validation, settings, error_before)
    share = num_validation / num_validation.sum()
    rounds = state.rounds + 1
    gradient_norm = np.zeros_like(state.gradient_norm)
    log_theta = []
    for i, (z, theta) in enumerate(zip(state.log_theta, probabilities(state, settings), strict=True)):
        arm = drawn[:, i]
        gradient = np.bincount(arm, share * advantage / theta[arm], minlength=len(z))  # 6
        norm = np.abs(gradient).max()
        gradient_norm[i] = np.hypot(state.gradient_norm[i], norm)  # squares could overflow or vanish
        default = math.sqrt(2 * math.log(len(z)))
        eta_0 = default if settings.base_step_size is None else settings.base_step_size
        divisor = {
            "aggressive": norm,
            "adaptive": gradient_norm[i],
            "auto": math.sqrt(rounds),
            "constant": 1.0,
            "scale": 1 / default if default else math.inf,
        }
        # The gradient is divided first, since 1 / divisor could overflow. If the divisor is 0, the gradient is 0 too.
        step = eta_0 * (gradient / (divisor[settings.step_size] or 1.0))
        z = z - step  # 9
        log_theta.append(z - np.logaddexp.reduce(z))  # 10
    past_weight = settings.discount * state.past_weight + 1
    past_error = state.past_error + (_mean(error, num_validation) - state.past_error) / past_weight
    return FedExState(tuple(log_theta), gradient_norm, past_error, past_weight, rounds)


def best(state: FedExState) -> tuple[int, ...]:
    """The index of the most probable element of each factor; the lowest of equals."""
    return tuple(int(z.argmax()) for z in state.log_theta)


def to_arrays(state: FedExState) -> dict[str, np.ndarray]:
    """The state as a checkpoint holds it."""
    return {
        "log_theta": np.concatenate(state.log_theta),
        "factor_sizes": np.array([len(z) for z in state.log_theta]),
        "gradient_norm": state.gradient_norm,
        "past": np.array([state.past_error, state.past_weight]),
        "rounds": np.array([state.rounds]),
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> FedExState:
    """The state that `to_arrays` wrote, to the last bit."""
    log_theta = np.split(arrays["log_theta"], np.cumsum(arrays["factor_sizes"])[:-1])
    past_error, past_weight = arrays["past"].tolist()
    return FedExState(tuple(log_theta), arrays["gradient_norm"], past_error, past_weight, int(arrays["rounds"][0]))


def _with_floor(state: FedExState, settings: FedExSettings) -> Thetas:
    """Theta, with min_probability mixed in."""
    floor = settings.min_probability
    return tuple((1 - len(z) * floor) * np.exp(z) + floor for z in state.log_theta)


def _baseline(
    state: FedExState,
    error: Float[np.ndarray, " client"],
    num_validation: Real[np.ndarray, " client"],
    settings: FedExSettings,
    error_before: Float[np.ndarray, " client"] | None,
) -> Float[np.ndarray, " client"]:
    """Lambda for each client. In the first round `previous` is the mean of the others: 0 would punish random draws."""
    if settings.baseline == "client":
        if error_before is None:
            raise InputError("error_before must be given for the baseline 'client', got None")
        return error_before
    if settings.baseline == "none":
        return np.zeros_like(error)
    if settings.baseline == "previous" and state.past_weight > 0:
        return np.full_like(error, state.past_error)
    return _leave_one_out(error, num_validation)


def _leave_one_out(
    error: Float[np.ndarray, " client"], num_validation: Real[np.ndarray, " client"]
) -> Float[np.ndarray, " client"]:
    """The mean error of the cohort's other clients. For a lone client it is its own error, so that nothing moves."""
    if len(error) == 1:
        return error
    offset = error - error[0]
    others = num_validation.sum() - num_validation
    mean: np.ndarray = error[0] + (num_validation @ offset - num_validation * offset) / others
    return mean


def _mean(error: Float[np.ndarray, " client"], num_validation: Real[np.ndarray, " client"]) -> float:
    # As an offset, here and above: then equal errors differ from their mean by exactly 0. A rounding error would become
    # a whole step under `aggressive`.
    return float(error[0] + num_validation @ (error - error[0]) / num_validation.sum())


class FedExPolicy:
    """FedEx; it is `uniform` if its steps are off, and plain federated averaging if the pool is one configuration."""

    def __init__(self, pool: Pool, settings: FedExSettings, num_classes: int) -> None:
        self.pool = pool
        self.signal = settings.signal
        self.needs_error_before = settings.baseline == "client"
        self.settings = settings
        self.state = init(pool)
        self._worst = worst_error(settings.signal, num_classes)

    def draw(self, draws: np.random.Generator, cohort_size: int) -> Drawn:
        """Line 4: each client draws from theta."""
        return draw(self.state, self.settings, draws, cohort_size)

    def update(self, drawn: Drawn, error: Errors, num_validation: Counts, error_before: Errors | None = None) -> None:
        """Lines 6, 9 and 10, unless no client returned a usable update."""
        if np.isfinite(error).any():  # else theta stays as it is, like the weights
            self.state = update(self.state, drawn, error, num_validation, self.settings, self._worst, error_before)

    def probabilities(self) -> Thetas:
        """The distributions that clients draw from: see `probabilities`."""
        return probabilities(self.state, self.settings)

    def best(self) -> tuple[int, ...]:
        """The most probable element of each factor."""
        return best(self.state)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state as a checkpoint holds it."""
        return to_arrays(self.state)

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Continues from the state that `to_arrays` gave, bit for bit."""
        self.state = from_arrays(arrays)
