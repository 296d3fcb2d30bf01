"""BOHB: Hyperband whose configurations come from a model (Falkner, Klein and Hutter, ICML 2018, Algorithm 2).

    input: observations D, fraction of random runs rho, percentile q, number of samples N_s,
           minimum number of points N_min to build a model, bandwidth factor b_w
     1  if rand() < rho: return a random configuration
     2  b = argmax {D_b : |D_b| >= N_min + 2}                          the largest resource with enough observations
     3  if there is none: return a random configuration
     4  fit l to the best N_l = max(N_min, q |D_b|), and g to the worst N_g = max(N_min, |D_b| - N_l)
     5  draw N_s samples according to l'                               l with its bandwidths times b_w
     6  return the sample with the highest ratio l(x) / g(x)

with rho = 1/3, q = 15 %, N_s = 64, b_w = 3 and N_min = d + 1 for d searched hyperparameters, as in the paper. l and g
are kernel densities over configurations mapped to [0, 1]^d, with a product of one kernel for each dimension. The kernel
is Gaussian. For the options of a choice it is the kernel of Aitchison and Aitken: it stays with probability 1 - b and
otherwise moves to any other option. The bandwidth is b = 1.06 sigma N^(-1 / (4 + d)) in each dimension, and at least
1e-3.

Filled in: the samples of line 5 are truncated to [0, 1]. Errors that are not finite rank last. If there are more than
256 observations, 256 are used, evenly spread over the ranking, so that the cost of a decision does not grow. Trial n is
the same as trial n of random search unless the model chose it.
"""

import math
from bisect import insort

import numpy as np
from jaxtyping import Float, Int

from fedtune import rng
from fedtune.tuning.domains import Choice
from fedtune.tuning.hyperband import hyperband
from fedtune.tuning.rungs import Key
from fedtune.tuning.space import Config, SearchSpace
from fedtune.tuning.trial import Compose, Draw, Job, Trial, rank_key

RANDOM_FRACTION = 1 / 3
GOOD_FRACTION = 0.15
NUM_SAMPLES = 64
BANDWIDTH_FACTOR = 3.0
MIN_BANDWIDTH = 1e-3
MAX_POINTS = 256


class BOHB:
    """A tuner that runs Hyperband over configurations proposed by a model of the errors so far."""

    def __init__(
        self,
        draw: Draw,
        compose: Compose,
        space: SearchSpace,
        seed: int,
        max_rounds: int,
        min_rounds: int | None = None,
        reduction_factor: int = 3,
    ) -> None:
        self._draw = draw
        self._compose = compose
        self._server, self._client = dict(sorted(space.server.items())), dict(sorted(space.client.items()))
        domains = [*self._server.values(), *self._client.values()]
        self._num_options = np.array([len(d.options) if isinstance(d, Choice) else 0 for d in domains], int)
        self._seed = seed
        self._observations: dict[int, list[tuple[Key, list[float]]]] = {}  # by rounds, the best first
        self._hyperband = hyperband(self._propose, max_rounds, min_rounds, reduction_factor)

    def ask(self) -> Job:
        """Hyperband's next job."""
        return self._hyperband.ask()

    def tell(self, job: Job, error: float) -> None:
        """Enter a job's error in its bracket and in the model."""
        self._hyperband.tell(job, error)
        if job.rounds >= self._model_rounds():  # observations at smaller resources are never used again
            observation = rank_key(error, job.trial.number), self._to_unit(job.trial)
            insort(self._observations.setdefault(job.rounds, []), observation)

    def _propose(self, number: int) -> Trial:
        """Algorithm 2."""
        draws = rng.stream(self._seed, "bohb", number)
        if draws.random() < RANDOM_FRACTION:  # 1
            return self._draw(number)
        rounds = self._model_rounds()
        if rounds == 0:  # 3
            return self._draw(number)
        ranking = self._observations[rounds]
        points = np.array([ranking[rank][1] for rank in ranks_used(len(ranking))])
        proposed = propose(points, self._num_options, draws)
        return self._compose(number, *self._from_unit(proposed.tolist()))

    def _model_rounds(self) -> int:
        """The largest resource with enough observations, in rounds; 0 if there is none."""
        enough = len(self._num_options) + 3
        return max((b for b, points in self._observations.items() if len(points) >= enough), default=0)  # 2

    def _to_unit(self, trial: Trial) -> list[float]:
        centre = trial.centre
        return [
            *(domain.to_unit(trial.server[name]) for name, domain in self._server.items()),
            *(domain.to_unit(centre[name]) for name, domain in self._client.items()),
        ]

    def _from_unit(self, point: list[float]) -> tuple[Config, Config]:
        units = iter(point)
        server = {name: domain.from_unit(next(units)) for name, domain in self._server.items()}
        return server, {name: domain.from_unit(next(units)) for name, domain in self._client.items()}


def ranks_used(num_points: int) -> list[int]:
    """All ranks; if there are more than MAX_POINTS, the first, the last, and others evenly between them."""
    used = min(num_points, MAX_POINTS)
    return [rank * (num_points - 1) // (used - 1) for rank in range(used)]


def propose(
    points: Float[np.ndarray, "point dimension"], num_options: Int[np.ndarray, " dimension"], draws: np.random.Generator
) -> Float[np.ndarray, " dimension"]:
    """Lines 4 to 6, given the observed configurations from the best to the worst.

    `num_options` is the number of options of each dimension, and 0 for a dimension with a scale.
    """
    fewest = len(num_options) + 1
    num_good = max(fewest, int(GOOD_FRACTION * len(points)))
    good, bad = points[:num_good], points[-max(fewest, len(points) - num_good) :]
    width, width_bad = bandwidths(good), bandwidths(bad)  # 4
    samples = sample_around(good, BANDWIDTH_FACTOR * width, num_options, draws)  # 5
    ratio = log_density(samples, good, width, num_options) - log_density(samples, bad, width_bad, num_options)
    best: np.ndarray = samples[ratio.argmax()]  # 6
    return best


def bandwidths(points: Float[np.ndarray, "point dimension"]) -> Float[np.ndarray, " dimension"]:
    """The bandwidth in each dimension, by the normal-reference rule."""
    num_points, dimension = points.shape
    width: np.ndarray = np.maximum(MIN_BANDWIDTH, 1.06 * points.std(axis=0) * num_points ** (-1 / (4 + dimension)))
    return width


def log_density(
    x: Float[np.ndarray, "sample dimension"],
    points: Float[np.ndarray, "point dimension"],
    width: Float[np.ndarray, " dimension"],
    num_options: Int[np.ndarray, " dimension"],
) -> Float[np.ndarray, " sample"]:
    """The logarithm of the kernel density around the points."""
    log_kernel = np.zeros((len(x), len(points)))
    for i, (b, options) in enumerate(zip(width.tolist(), num_options.tolist(), strict=True)):
        if options == 1:
            continue
        if options > 1:
            same = x[:, i, None] == points[:, i]  # (sample, point)
            log_kernel += np.where(same, math.log1p(-b), math.log(b / (options - 1)))
        else:
            half = math.sqrt(0.5) / b
            log_kernel -= np.square(half * x[:, i, None] - half * points[:, i]) + math.log(b * math.sqrt(2 * math.pi))
    highest = log_kernel.max(axis=1)
    log_mean: np.ndarray = highest + np.log(np.exp(log_kernel - highest[:, None]).mean(axis=1))
    return log_mean


def sample_around(
    points: Float[np.ndarray, "point dimension"],
    width: Float[np.ndarray, " dimension"],
    num_options: Int[np.ndarray, " dimension"],
    draws: np.random.Generator,
) -> Float[np.ndarray, "sample dimension"]:
    """Samples of the kernel density, truncated to [0, 1]."""
    samples = points[draws.integers(len(points), size=NUM_SAMPLES)]
    for i, (b, options) in enumerate(zip(width.tolist(), num_options.tolist(), strict=True)):
        if options > 1:
            moves = draws.random(NUM_SAMPLES) < min(b, 1 - 1 / options)  # at most as likely as a uniform draw moves
            step = np.where(moves, draws.integers(1, options, size=NUM_SAMPLES), 0)
            samples[:, i] = ((np.floor(samples[:, i] * options) + step) % options + 0.5) / options
    centres, widths = np.broadcast_arrays(samples.copy(), width)
    outside = np.broadcast_to(num_options == 0, samples.shape)
    while outside.any():
        samples[outside] = draws.normal(centres[outside], widths[outside])
        outside = (samples < 0) | (samples > 1)
    return samples
