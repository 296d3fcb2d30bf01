"""Runs every search on made-up federations whose true errors are known, and draws their results; see README.md."""

import argparse
import itertools
import math
import multiprocessing
import os
import time
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedtune import rng
from fedtune.simulation.event_loop import Attempt, EventLoop, OnDrop
from fedtune.tuning.domains import LogUniform, Uniform
from fedtune.tuning.space import Config, SearchSpace, sample
from fedtune.tuning.trial import Job, Score, Trial, incumbent
from fedtune.tuning.tuner_kind import Budget, TrialSource
from fedtune.tuning.tuners import TUNERS

FOLDER = Path(__file__).parent
MAX_ROUNDS, PARALLEL_TRIALS = 81, 25
TIMES = (81, 162, 324, 810, 1620)  # 1, 2, 4, 10 and 20 times the rounds of one configuration
GUESSING, BEST, NOISE = 0.9, 0.04, 0.01
LANDSCAPES = ("tell", "mislead")
SPACE = SearchSpace(
    {
        "learning_rate": LogUniform(1e-4, 1.0),
        "momentum": Uniform(0.0, 0.99),
        "weight_decay": LogUniform(1e-5, 1e-1),
        "dropout": Uniform(0.0, 0.5),
    },
    {},
)
SEARCHES = ("random", "sha", "asha", "hyperband", "async_hyperband", "pbt", "bohb")
SMALLEST = {"repeats": 1, "out": Path("runs/smallest/searches")}
OPTIONS = {"async_hyperband": {"reduction_factor": 3}}  # the same as the other searches
COLOURS = dict(
    zip(SEARCHES, ("#777777", "#D55E00", "#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#009E73"), strict=True)
)


def curve(landscape: str, config: Config) -> tuple[float, float]:
    """The final error of training, and the share of the remaining distance to it that one round closes.

    If early errors tell, all configurations are equally fast. If they mislead, large steps are fast, and end too high.
    """
    step = math.log10(config["learning_rate"] / (1 - config["momentum"]))
    decay = math.log10(config["weight_decay"])
    limit = BEST + 0.1 * (step + 0.5) ** 2 + 0.04 * (decay + 4) ** 2 + (config["dropout"] - 0.2) ** 2
    return min(limit, GUESSING), {"tell": 0.06, "mislead": 0.25 / (1 + 10**-step)}[landscape]


def after(error: float, landscape: str, config: Config, rounds: int) -> float:
    """The true error after that number of further rounds."""
    limit, share = curve(landscape, config)
    return limit + (error - limit) * (1 - share) ** rounds


def draw_trial(seed: int, number: int) -> Trial:
    """The same configuration for trial n of every search."""
    return compose(number, {}, sample(SPACE.client, rng.stream(seed, "configuration", number)))


def compose(number: int, server: Config, client: Config) -> Trial:
    return Trial(number, server, ((client,),))


class MadeUpFederations:
    """Trials whose true errors follow `curve`; the errors reported to a tuner have noise. A round takes 1."""

    def __init__(self, landscape: str, seed: int) -> None:
        self._landscape = landscape
        self._seed = seed
        self._state: dict[int, tuple[int, float]] = {}  # a trial's rounds, and its true error after them
        self._best: Score | None = None
        self.errors: list[tuple[float, float]] = []  # (time, true error of the incumbent), from each job on

    def start(self, job: Job, number: int, now: float) -> Attempt | None:
        trial = job.trial
        if trial.number not in self._state:
            self._state[trial.number] = (0, GUESSING) if trial.parent is None else self._state[trial.parent]
        ends = now + job.rounds - self._state[trial.number][0]
        return Attempt(job, number, ends, failed=False) if ends <= TIMES[-1] else None

    def ready(self, attempt: Attempt) -> bool:
        return True

    def deliver(self, attempt: Attempt) -> float:
        job = attempt.job
        number = job.trial.number
        rounds, error = self._state[number]
        error = after(error, self._landscape, job.trial.pool[0][0], job.rounds - rounds)
        self._state[number] = job.rounds, error
        score = error + NOISE * rng.stream(self._seed, "noise", number, job.rounds).standard_normal()
        scores = [Score(number, job.rounds, score), *([self._best] if self._best else [])]
        self._best = incumbent(scores)
        if self._best == scores[0]:
            self.errors.append((attempt.finish_time, error))
        return score

    def fail(self, attempt: Attempt, then: OnDrop) -> None:
        raise AssertionError("no attempt fails here")


def simulate(landscape: str, search: str, seed: int) -> list[float]:
    """The incumbent's true error at each of TIMES."""
    budget = Budget(MAX_ROUNDS, total_rounds=TIMES[-1] * PARALLEL_TRIALS)
    settings = TUNERS[search].parse(search, OPTIONS.get(search, {}), budget)
    tuner = settings.make_tuner(TrialSource(lambda number: draw_trial(seed, number), compose, SPACE, seed))
    federations = MadeUpFederations(landscape, seed)
    for _ in EventLoop(tuner, federations, PARALLEL_TRIALS).run():
        pass
    return [[error for ends, error in federations.errors if ends <= limit][-1] for limit in TIMES]


def run(searches: list[str], repeats: int, processes: int) -> pd.DataFrame:
    """A row for each landscape, search, seed and time."""
    work = list(itertools.product(LANDSCAPES, searches, range(repeats)))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        outcomes = pool.starmap(simulate, work, chunksize=2)
    return pd.DataFrame(
        [
            {"landscape": landscape, "search": search, "seed": seed, "time": limit, "error": error}
            for (landscape, search, seed), errors in zip(work, outcomes, strict=True)
            for limit, error in zip(TIMES, errors, strict=True)
        ]
    )


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard error of each search at each time."""
    groups = rows.groupby(["landscape", "search", "time"], sort=False)["error"]
    return groups.agg(error="mean", se="sem").reset_index()


def plot(table: pd.DataFrame, path: Path) -> None:
    """A panel for each landscape; in it a line and a band of one standard error for each search."""
    figure = Figure(figsize=(9, 4), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(LANDSCAPES), sharey=True)
    for axes, landscape in zip(panels, LANDSCAPES, strict=True):
        draw_panel(axes, table[table["landscape"] == landscape])
        axes.set_title(f"early errors {landscape}", fontsize=10)
    panels[0].set_ylabel("true error of the incumbent in %")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def draw_panel(axes: Axes, part: pd.DataFrame) -> None:
    for search, line in part.groupby("search", sort=False):
        colour, times, error, se = COLOURS[str(search)], line["time"] / MAX_ROUNDS, line["error"], line["se"]
        axes.plot(times, 100 * error, "o-", color=colour, label=search, markersize=3)
        axes.fill_between(times, 100 * (error - se), 100 * (error + se), color=colour, alpha=0.15, linewidth=0)
    axes.axhline(100 * BEST, color="#AAAAAA", linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="virtual time, in rounds of one configuration (R)")
    axes.set_xticks([limit / MAX_ROUNDS for limit in TIMES], [str(limit // MAX_ROUNDS) for limit in TIMES])
    axes.set_yticks([4, 5, 6, 8, 10, 15], ["4", "5", "6", "8", "10", "15"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E3E3E3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=SEARCHES)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results.csv and figures/")
    parser.add_argument("--smallest", action="store_true", help="run in seconds; results go to runs/smallest")
    if parser.parse_args().smallest:
        parser.set_defaults(**SMALLEST)
    arguments = parser.parse_args()
    (arguments.out / "figures").mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    table = summary(run(arguments.searches, arguments.repeats, arguments.processes))
    print(f"{time.perf_counter() - started:.0f} s")
    table.to_csv(arguments.out / "results.csv", index=False, float_format="%.6g")
    plot(table, arguments.out / "figures" / "searches.png")


if __name__ == "__main__":
    main()
