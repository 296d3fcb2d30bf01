"""Measures how long a tuner's decision takes after it has drawn many configurations; see README.md."""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from fedtune.tuning import bohb
from fedtune.tuning.asha import ASHA
from fedtune.tuning.async_hyperband import AsyncHyperband
from fedtune.tuning.bohb import BOHB
from fedtune.tuning.domains import Integer, LogUniform, PowerOfTwo, Uniform
from fedtune.tuning.hyperband import hyperband
from fedtune.tuning.pbt import PBT
from fedtune.tuning.random_search import RandomSearch
from fedtune.tuning.space import SearchSpace, sample
from fedtune.tuning.successive_halving import successive_halving
from fedtune.tuning.trial import Config, Trial, Tuner

FOLDER = Path(__file__).parent
PARALLEL_TRIALS = 25
MAX_ROUNDS = 81
SMALLEST = {"sizes": [1_000], "out": Path("runs/smallest/tuner_speed")}
# The clients' space of Khodak et al., NeurIPS 2021 (arXiv 2106.04502), but momentum
# stops at 0.999, since at 1 the velocity never decays.
SPACE = SearchSpace(
    {
        "learning_rate": LogUniform(1e-4, 1.0),
        "momentum": Uniform(0.0, 0.999),
        "weight_decay": LogUniform(1e-5, 1e-1),
        "epochs": Integer(1, 5),
        "batch_size": PowerOfTwo(8, 128),
        "proximal_mu": LogUniform(1e-5, 1.0),
        "dropout": Uniform(0.0, 0.5),
    },
    {},
)
CONFIG = sample(SPACE.client, np.random.default_rng(0))


def draw(number: int) -> Trial:
    """Costs next to nothing, so that the tuner's own time is measured."""
    return Trial(number, {}, ((CONFIG,),))


def compose(number: int, server: Config, client: Config) -> Trial:
    """The trial with the values that a model chose."""
    return Trial(number, server, ((client,),))


TUNERS: dict[str, Callable[[], Tuner]] = {
    "random": lambda: RandomSearch(draw, MAX_ROUNDS),
    "asha": lambda: ASHA(draw, MAX_ROUNDS),
    "sha": lambda: successive_halving(draw, MAX_ROUNDS),
    "hyperband": lambda: hyperband(draw, MAX_ROUNDS),
    "async_hyperband": lambda: AsyncHyperband(draw, 256),
    "pbt": lambda: PBT(draw, lambda parent, number: replace(parent, number=number), 0, MAX_ROUNDS),
    "bohb": lambda: BOHB(draw, compose, SPACE, 0, MAX_ROUNDS),
}


def decisions(tuner: Tuner, num_configs: int, window: int, seed: int) -> list[float]:
    """The seconds of each decision, one ask and one tell, while the last `window` of `num_configs` are drawn.

    25 jobs run at once and end in random order with random errors. Before the window, bohb draws without its model.
    """
    draws = np.random.default_rng(seed)
    running, seconds, num_drawn = [], [], 0
    random_fraction, bohb.RANDOM_FRACTION = bohb.RANDOM_FRACTION, 1.0
    while num_drawn < num_configs:
        slots, errors = draws.integers(PARALLEL_TRIALS, size=1000).tolist(), draws.random(1000).tolist()
        for slot, error in zip(slots, errors, strict=True):
            if num_drawn == num_configs - window:
                bohb.RANDOM_FRACTION = random_fraction
            started = time.perf_counter()
            job = tuner.ask()
            asked = time.perf_counter()
            assert job is not None
            running.append(job)
            num_drawn = max(num_drawn, job.trial.number + 1)
            if len(running) < PARALLEL_TRIALS:
                continue
            done = running.pop(slot)
            telling = time.perf_counter()
            tuner.tell(done, error)
            told = time.perf_counter()
            if num_drawn > num_configs - window:
                seconds.append(asked - started + told - telling)
            if num_drawn >= num_configs:
                break
    bohb.RANDOM_FRACTION = random_fraction
    return seconds


def measure(name: str, num_configs: int) -> dict[str, float | str]:
    """A row of the table: median and 99th percentile in microseconds, over ten thousand decisions or more."""
    window = min(num_configs // 2, 10_000)
    seconds: list[float] = []
    for repeat in range(math.ceil(10_000 / window)):
        seconds += decisions(TUNERS[name](), num_configs, window, repeat)
    median, p99 = (np.quantile(seconds, [0.5, 0.99]) * 1e6).tolist()
    return {"tuner": name, "configurations": num_configs, "decisions": len(seconds), "median_us": median, "p99_us": p99}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tuners", nargs="+", default=list(TUNERS), choices=list(TUNERS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results.csv")
    parser.add_argument("--smallest", action="store_true", help="run in seconds; results go to runs/smallest")
    if parser.parse_args().smallest:
        parser.set_defaults(**SMALLEST)
    arguments = parser.parse_args()
    rows = [measure(name, size) for name in arguments.tuners for size in arguments.sizes]
    frame = pd.DataFrame(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.out / "results.csv", index=False, float_format="%.3g")
    print(frame.round(1).to_string(index=False))


if __name__ == "__main__":
    main()
