"""Measures what a federation costs whose population, cohorts or number of trials grow; see README.md."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from one_run import NUM_CLASSES
from tables import engine_table, run_table, trial_table

from fedtune import rng

FOLDER = Path(__file__).parent
POPULATIONS, COHORTS = (1_000, 100_000, 1_000_000), (10, 1_000, 10_000)
ROUNDS = {10: 41, 1_000: 11, 10_000: 4}  # of one run, by cohort; the model is evaluated in every fourth and the last
COMPARED = 1_000  # clients of a round with which the engines are compared, in the smallest population
EXAMPLES, FEATURES = 8, 16  # EXAMPLES is the number of a client's examples
SMALLEST = {
    "populations": [1_000],
    "cohorts": [10],
    "repeats": 1,
    "trials": 20,
    "out": Path("runs/smallest/scale"),
}


class Kind(NamedTuple):
    """A run that is measured: its clients, its cohort, and the code that does it."""

    population: int
    cohort: int
    engine: str  # compiled, torch, or the commit of another checkout
    checkout: Path = FOLDER.parents[1]

    def environment(self) -> dict[str, str]:
        """The environment in which Python imports fedtune from the checkout."""
        rooms = [str(self.checkout / name) for name in (".", "clients", "datasets")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(rooms)}


def kinds(populations: list[int], cohorts: list[int], checkout: Path | None) -> list[Kind]:
    """All runs of a repeat."""
    pairs = [(population, cohort) for cohort in cohorts for population in populations if cohort <= population]
    compared = min(populations), min(max(cohorts), COMPARED)
    found = [Kind(*pair, "compiled") for pair in dict.fromkeys([*pairs, compared])]
    found.append(Kind(*compared, "torch"))
    if checkout is not None:
        commit = subprocess.run(
            ["git", "-C", checkout, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        found.append(Kind(*compared, commit, checkout))
    return found


def write_population(folder: Path, num_clients: int) -> None:
    """Writes the clients' examples as three arrays, piece by piece: a pattern for each class, plus noise."""
    draws = rng.stream(0, "examples")
    patterns = draws.standard_normal((NUM_CLASSES, FEATURES))
    num_examples = num_clients * EXAMPLES
    folder.mkdir()
    create = np.lib.format.open_memmap
    x = create(folder / "x.npy", mode="w+", dtype=np.float32, shape=(num_examples, FEATURES))
    y = create(folder / "y.npy", mode="w+", dtype=np.int64, shape=(num_examples,))
    for start in range(0, num_examples, 1 << 18):
        some = slice(start, min(start + (1 << 18), num_examples))
        y[some] = draws.integers(0, NUM_CLASSES, some.stop - start)
        x[some] = patterns[y[some]] + draws.standard_normal((some.stop - start, FEATURES))
    np.save(folder / "sizes.npy", np.full(num_clients, EXAMPLES))


class Run:
    """A running `one_run.py`, and its answers."""

    def __init__(self, data: Path, kind: Kind) -> None:
        self.kind = kind
        self._rounds = ROUNDS[kind.cohort]
        engine = kind.engine if kind.engine == "compiled" else "torch"
        arguments = str(data), str(kind.cohort), str(self._rounds), engine
        self._process = subprocess.Popen(
            [sys.executable, FOLDER / "one_run.py", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=kind.environment(),
        )
        self.answers = [self._answer()]

    def next_round(self) -> bool:
        """Lets it do one more round; False if there was none left, and the run has ended."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        done = len(self.answers) > self._rounds
        if done:
            self._process.communicate()
        else:
            self.answers.append(self._answer())
        return not done

    def row(self, repeat: int) -> dict[str, Any]:
        """The cost of the run, times in seconds and memory in MB; the first round also starts the workers."""
        set_up, first, *rounds = self.answers
        seconds = {kind: [a["seconds"] for a in rounds if a["evaluated"] is kind] for kind in (False, True)}
        low, median, high = np.quantile(seconds[False], (0.25, 0.5, 0.75))
        return {
            "population": self.kind.population,
            "cohort": self.kind.cohort,
            "engine": self.kind.engine,
            "repeat": repeat,
            "set_up": set_up["seconds"],
            "set_up_processor": set_up["set_up_processor"],
            "first_round": first["seconds"],
            "round_median": median,
            "round_quartile_1": low,
            "round_quartile_3": high,
            "evaluated_round_median": np.median(seconds[True]),
            "round_processor": (rounds[-1]["processor"] - first["processor"]) / len(rounds),
            "set_up_own_memory": set_up["own_memory"],
            "set_up_mapped_memory": set_up["mapped_memory"],
            "own_memory": rounds[-1]["own_memory"],
            "mapped_memory": rounds[-1]["mapped_memory"],
        }

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.kind} ended: see its error above")
        return json.loads(line)


def measure_runs(data: Path, wanted: list[Kind], repeats: int) -> pd.DataFrame:
    """A row for each run and repeat: runs are set up one by one, then each does a round in turn."""
    # Each run has files of its own: in a shared file, one run would share the pages of another.
    folders = {kind: data / f"{kind.population}-{kind.cohort}-{kind.engine}" for kind in wanted}
    for kind, folder in folders.items():
        write_population(folder, kind.population)
    rows = []
    for repeat in range(repeats):
        runs = [Run(folder, kind) for kind, folder in folders.items()]
        under_way = runs
        while under_way:
            under_way = [run for run in under_way if run.next_round()]
        rows += [run.row(repeat) for run in runs]
    return pd.DataFrame(rows)


def measure_trials(trials: int) -> Iterator[dict[str, Any]]:
    """What each tenth of a search with so many trials costs."""
    done = subprocess.run(
        [sys.executable, FOLDER / "many_trials.py", str(trials)], check=True, stdout=subprocess.PIPE, text=True
    )
    yield from map(json.loads, done.stdout.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--populations", nargs="+", type=int, default=POPULATIONS, help="numbers of clients")
    parser.add_argument("--cohorts", nargs="+", type=int, default=COHORTS, choices=COHORTS, help="clients of a round")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each population and cohort (default 3)")
    parser.add_argument("--trials", type=int, default=100_000, help="trials of the long search (default 100,000)")
    parser.add_argument("--checkout", type=Path, help="folder of an older checkout to compare rounds with")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results.csv and trials.csv")
    parser.add_argument("--tables", action="store_true", help="measure nothing; print the tables of the two files")
    parser.add_argument("--smallest", action="store_true", help="run in seconds; results go to runs/smallest")
    if parser.parse_args().smallest:
        parser.set_defaults(**SMALLEST)
    arguments = parser.parse_args()
    if not arguments.tables:
        measure(arguments)
    runs = pd.read_csv(arguments.out / "results.csv")
    print(run_table(runs), engine_table(runs), sep="\n\n", end="\n\n")
    print(trial_table(pd.read_csv(arguments.out / "trials.csv")))


def measure(arguments: argparse.Namespace) -> None:
    """Measures everything and writes the two files."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wanted = kinds(arguments.populations, arguments.cohorts, arguments.checkout)
        runs = measure_runs(Path(folder), wanted, arguments.repeats)
    runs.to_csv(arguments.out / "results.csv", index=False, float_format="%.4g")
    trials = pd.DataFrame(measure_trials(arguments.trials))
    trials.to_csv(arguments.out / "trials.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
