"""Simulates synchronous SHA and ASHA under stragglers and dropped jobs, and draws figure 3.2; see README.md."""

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from fedtune import rng
from fedtune.simulation.event_loop import Attempt, EventLoop, OnDrop
from fedtune.simulation.stragglers import attempt_duration, fails_after
from fedtune.tuning.asha import ASHA
from fedtune.tuning.successive_halving import successive_halving
from fedtune.tuning.trial import Job, Trial, Tuner

FOLDER = Path(__file__).parent
MAX_ROUNDS, MIN_ROUNDS, REDUCTION_FACTOR, NUM_CONFIGS = 256, 1, 4, 256
PARALLEL_JOBS, HORIZON = 25, 2000
STRAGGLER_STDS = (0.0, 0.1, 0.24, 0.56, 1.33)
DROP_PROBABILITIES = (0.0, 0.0025, 0.005, 0.0075, 0.01)
SMALLEST = {
    "stds": (1.33,),
    "drops": (0.01,),
    "repeats": 2,
    "out": Path("runs/smallest/asha_stragglers"),
}
BLOCK = 4096  # errors drawn at once
COLOURS = {"sha": "#D55E00", "asha": "#0072B2"}
FATES = {"retry": "are retried", "lose": "are lost", "worst": "count as the worst"}
LABELS = {"sha": "synchronous SHA", "asha": "ASHA"}


def draw(number: int) -> Trial:
    """A trial without values: only its error matters."""
    return Trial(number, {}, (({},),))


TUNERS: dict[str, Callable[[], Tuner]] = {
    "sha": lambda: successive_halving(draw, MAX_ROUNDS, NUM_CONFIGS, MIN_ROUNDS, REDUCTION_FACTOR),
    "asha": lambda: ASHA(draw, MAX_ROUNDS, MIN_ROUNDS, REDUCTION_FACTOR),
}


class Cell(NamedTuple):
    """What is simulated; with `resumes` a job starts where the trial's last job ended, otherwise from round 0."""

    on_drop: OnDrop
    resumes: bool
    straggler_std: float
    drop_probability: float
    tuner: str


class SimulatedJobs:
    """Jobs that take their rounds times 1 + |z| unless they fail; errors are uniform, one for each configuration.

    No job is started after the horizon is reached and a configuration was trained to the end.
    """

    def __init__(self, cell: Cell, seed: int) -> None:
        self.cell = cell
        self.finished: list[float] = []  # when a configuration was trained to the end
        self._trained: dict[int, int] = {}
        self._errors: list[float] = []
        self._error_draws = rng.stream(seed, "error")
        # One stream, read in the order of starting: a stream for each attempt would take most of the time.
        self._attempt_draws = rng.stream(seed, "attempt")

    def start(self, job: Job, number: int, now: float) -> Attempt | None:
        if now >= HORIZON and self.finished:
            return None
        cell, draws = self.cell, self._attempt_draws
        nominal = float(job.rounds - self._trained.get(job.trial.number, 0))
        duration = attempt_duration(nominal, cell.straggler_std, draws)
        dropped = fails_after(duration, cell.drop_probability, draws)
        return Attempt(job, number, now + (duration if dropped is None else dropped), dropped is not None)

    def ready(self, attempt: Attempt) -> bool:
        return True

    def deliver(self, attempt: Attempt) -> float:
        job = attempt.job
        if job.rounds == MAX_ROUNDS:
            self.finished.append(attempt.finish_time)
        if self.cell.resumes:
            self._trained[job.trial.number] = job.rounds
        while job.trial.number >= len(self._errors):
            self._errors += self._error_draws.random(BLOCK).tolist()
        return self._errors[job.trial.number]

    def fail(self, attempt: Attempt, then: OnDrop) -> None:
        """The training since the trial's last job is lost."""


def simulate(cell: Cell, seed: int) -> tuple[int, float]:
    """How many configurations were trained to the end by the horizon, and the time of the first."""
    jobs = SimulatedJobs(cell, seed)
    tuner, forgets_jobs = TUNERS[cell.tuner](), cell.tuner == "asha"
    loop = EventLoop(tuner, jobs, PARALLEL_JOBS, cell.on_drop, forgets_jobs=forgets_jobs, tells_first=True)
    for _ in loop.run():
        pass
    return sum(ends <= HORIZON for ends in jobs.finished), jobs.finished[0]


def run(cells: list[Cell], repeats: int, processes: int) -> pd.DataFrame:
    """A row for each cell: mean and standard deviation over the repeats; these are seeds 0, 1, ... in every cell."""
    work = list(itertools.product(cells, range(repeats)))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        outcomes = pool.starmap(simulate, work, chunksize=5)
    rows = pd.DataFrame([cell for cell, _ in work])
    rows[["trained", "first"]] = outcomes
    table = rows.groupby(list(Cell._fields), sort=False).agg(["mean", "std"])
    table.columns = ["_".join(column) for column in table.columns]
    return table.reset_index()


def plot(part: pd.DataFrame, path: Path) -> None:
    """Draws both panels of figure 3.2, one above the other, in a column for each straggler standard deviation."""
    stds = part["straggler_std"].unique()
    figure = Figure(figsize=(1.5 + 1.8 * len(stds), 4.6), dpi=90, layout="constrained")
    panels = figure.subplots(2, len(stds), sharex=True, sharey="row", squeeze=False)
    for column, std in zip(panels.T, stds, strict=True):
        for axes, measure in zip(column, ("trained", "first"), strict=True):
            draw_lines(axes, part[part["straggler_std"] == std], measure)
        column[0].set_title(f"standard deviation {std:g}", fontsize=9)
        column[1].set_xlabel("drop probability", fontsize=9)
    panels[0, 0].set_ylabel(f"trained to R by {HORIZON}")
    panels[0, 0].set_ylim(bottom=0)
    panels[0, 0].legend(frameon=False, fontsize=8)
    panels[1, 0].set_ylabel("time of the first")
    panels[1, 0].set_xticks([0, 0.005, 0.01])
    panels[1, 0].set_yscale("log")
    panels[1, 0].set_ylim(bottom=MAX_ROUNDS * 0.8)
    panels[1, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[1, 0].yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panels[1, 0].yaxis.set_minor_formatter(NullFormatter())
    on_drop, resumes = part[["on_drop", "resumes"]].iloc[0]
    fates = f"Promoted jobs {'resume' if resumes else 'start afresh'}, dropped ones {FATES[on_drop]}"
    figure.suptitle(f"Who trains more to the end, and who is first? {fates}")
    figure.savefig(path)


def draw_lines(axes: Axes, part: pd.DataFrame, measure: str) -> None:
    """A line and a band for each tuner."""
    for tuner, line in part.groupby("tuner", sort=False):
        x, mean, std = line["drop_probability"], line[f"{measure}_mean"], line[f"{measure}_std"]
        colour = COLOURS[str(tuner)]
        axes.plot(x, mean, "o-", color=colour, label=LABELS[str(tuner)], markersize=3)
        axes.fill_between(x, (mean - std).clip(lower=1), mean + std, color=colour, alpha=0.2, linewidth=0)
    axes.grid(color="#E3E3E3")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--on-drop", nargs="+", default=["retry", "lose", "worst"], choices=["retry", "lose", "worst"])
    parser.add_argument("--stds", nargs="+", type=float, default=STRAGGLER_STDS)
    parser.add_argument("--drops", nargs="+", type=float, default=DROP_PROBABILITIES)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results.csv and figures/")
    parser.add_argument("--smallest", action="store_true", help="run in seconds; results go to runs/smallest")
    if parser.parse_args().smallest:
        parser.set_defaults(**SMALLEST)
    arguments = parser.parse_args()
    (arguments.out / "figures").mkdir(parents=True, exist_ok=True)
    grid = itertools.product(arguments.on_drop, (False, True), arguments.stds, arguments.drops, TUNERS)
    started = time.perf_counter()
    table = run([Cell(*values) for values in grid], arguments.repeats, arguments.processes)
    print(f"{time.perf_counter() - started:.0f} s")
    table.to_csv(arguments.out / "results.csv", index=False, float_format="%.6g")
    for (on_drop, resumes), part in table.groupby(["on_drop", "resumes"]):
        plot(part, arguments.out / "figures" / f"{on_drop}-{'resume' if resumes else 'afresh'}.png")


if __name__ == "__main__":
    main()
