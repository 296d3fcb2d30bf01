"""Measures the cost of a federation whose population grows and whose cohorts do not; see README.md."""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedtune import rng
from fedtune.executors.processes import num_workers, start_forkserver
from fedtune.layers import resolve_settings
from fedtune.runs.prepare import prepare
from fedtune.runs.run_folder import claim_folder

FOLDER = Path(__file__).parent
POPULATIONS, COHORTS = (1_000, 100_000, 1_000_000), (10, 1_000)
SMALLEST = {"populations": [1_000], "repeats": 1, "out": Path("runs/smallest/scale")}
EXAMPLES, FEATURES, NUM_CLASSES = 8, 16, 10  # EXAMPLES is the number of a client's examples
EVALUATED = 300  # clients
ROUNDS = {10: 41, 1_000: 7}  # of one run, by cohort; the model is evaluated in every fourth and the last


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


def memory() -> dict[str, float]:
    """The memory of this process and its workers in MB: their own memory, and pages of mapped files.

    A page that n processes share counts 1 / n for each. Pages of files are a cache; the kernel takes it back if needed.
    """
    kilobytes = dict.fromkeys(("Pss_Anon", "Pss_Shmem", "Pss_File"), 0)
    for process in processes():
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
            name, number = line.removesuffix(" kB").split(":")
            if name in kilobytes:
                kilobytes[name] += int(number)
    anonymous, shared, mapped = (number * 1024 / 1e6 for number in kilobytes.values())
    return {"own": anonymous + shared, "mapped": mapped}


def processor_seconds() -> float:
    """The processor time of this process and its workers, as exact as the kernel's ticks."""
    fields = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in processes()]
    return sum(int(user) + int(system) for *_, user, system in (some[:13] for some in fields)) / os.sysconf(
        "SC_CLK_TCK"
    )


def processes() -> list[int]:
    """This process and its workers."""
    return [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]


def simulate(data: Path, cohort: int) -> None:
    """One training run in a process of its own; it waits for a line on stdin before and after each round.

    Prints lines of JSON: first the cost of the set-up, then the cost of each round.
    """

    def tell(**answer: Any) -> None:
        print(json.dumps(answer), flush=True)
        input()

    def added() -> dict[str, float]:
        return {f"{name}_memory": now - before[name] for name, now in memory().items()}

    def listener(event: dict[str, Any]) -> None:
        nonlocal started
        if event["event"] == "round":
            answer = {"seconds": time.perf_counter() - started, "processor": processor_seconds()}
            if event["round"] == ROUNDS[cohort]:  # only then, because to look at so many pages takes time too
                answer |= added()
            tell(**answer, evaluated=not math.isnan(event["validation_error"]))
            started = time.perf_counter()

    settings = resolve_settings(
        f"{data}/",
        {"tuners": ["manual"], "max_rounds": ROUNDS[cohort], "total_rounds": ROUNDS[cohort], "cohort_size": cohort},
        {"data": {"num_classes": NUM_CLASSES}, "model": {"name": "logistic"}, "executor": "pool"},
        {"client": {"learning_rate": 0.1, "batch_size": 4}, "evaluation": {"every": 4, "clients": EVALUATED}},
    )
    start_forkserver()
    before, computed, started = memory(), time.process_time(), time.perf_counter()
    comparison = prepare(settings)
    tell(seconds=time.perf_counter() - started, set_up_processor=time.process_time() - computed, **added())
    with tempfile.TemporaryDirectory() as folder:
        claim_folder(Path(folder) / "run", comparison.settings, force=False)
        started = time.perf_counter()
        comparison.run(Path(folder) / "run", listener)


class Run:
    """A running `simulate`, and its answers."""

    def __init__(self, data: Path, population: int, cohort: int) -> None:
        self.population, self.cohort = population, cohort
        command = [sys.executable, __file__, "--simulate", str(data / f"{population}-{cohort}"), str(cohort)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answers = [self._answer()]

    def next_round(self) -> bool:
        """Lets it do one more round; False if there was none left, and the run has ended."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        done = len(self.answers) > ROUNDS[self.cohort]
        if done:
            self._process.communicate()
        else:
            self.answers.append(self._answer())
        return not done

    def row(self, repeat: int) -> dict[str, float]:
        """The cost of the run, times in seconds and memory in MB; the first round also starts the workers."""
        set_up, first, *rounds = self.answers
        seconds = {kind: [a["seconds"] for a in rounds if a["evaluated"] is kind] for kind in (False, True)}
        low, median, high = np.quantile(seconds[False], (0.25, 0.5, 0.75))
        return {
            "population": self.population,
            "cohort": self.cohort,
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
        return json.loads(self._process.stdout.readline())


def measure(data: Path, populations: list[int], repeats: int) -> pd.DataFrame:
    """A row for each population, cohort and repeat: runs are set up one by one, then each does a round in turn."""
    rows = []
    for repeat in range(repeats):
        runs = [Run(data, population, cohort) for cohort in COHORTS for population in populations]
        under_way = runs
        while under_way:
            under_way = [run for run in under_way if run.next_round()]
        rows += [run.row(repeat) for run in runs]
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--populations", nargs="+", type=int, default=POPULATIONS, help="numbers of clients")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each population and cohort (default 5)")
    parser.add_argument("--simulate", nargs=2, metavar=("DATA", "COHORT"), help="do one run; used by the script itself")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results.csv")
    parser.add_argument("--smallest", action="store_true", help="run in seconds; results go to runs/smallest")
    if parser.parse_args().smallest:
        parser.set_defaults(**SMALLEST)
    arguments = parser.parse_args()
    if arguments.simulate:
        simulate(Path(arguments.simulate[0]), int(arguments.simulate[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        # Each run has files of its own: in a shared file, one run would share the pages of another.
        for population, cohort in itertools.product(arguments.populations, COHORTS):
            write_population(Path(folder) / f"{population}-{cohort}", population)
        frame = measure(Path(folder), arguments.populations, arguments.repeats)
    arguments.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.out / "results.csv", index=False, float_format="%.4g")
    table = frame.drop(columns="repeat").groupby(["cohort", "population"]).median()
    print(f"{num_workers(0)} workers, medians over {arguments.repeats} runs, seconds and MB")
    print(table.T.map("{:.4g}".format).to_string())


if __name__ == "__main__":
    main()
