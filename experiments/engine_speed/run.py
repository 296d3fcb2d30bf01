"""Compares fedtune with a plain loop, Flower on Ray, pfl-research and fluke, which do the same work; see README.md."""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
from engines import BY_TORCH, ENGINES, EQUAL, IN_FLIGHT, LIMIT, OURS, SEARCH, SERIAL, STARTED, engines_for, installed
from limit import flop_of_round
from measured import DEMO, FLUTE, GFLOP, MEMORY, ROUND, START, Measured, Results
from processes import RunningEngine
from tables import plot, tables

FOLDER = Path(__file__).parent
CASES = ["logistic:50", "mlp:10", "mlp:50", "lstm:10", "leaf_lstm:10", "cnn:10"]
STARTS = ["logistic:10", "cnn:10"]
MEASUREMENT_SECONDS, MAX_ROUNDS = 0.5, 100  # a measurement takes as many rounds as fill the first
MEMORY_ROUNDS = 3
DEMO_REPEATS = 2  # the demo takes a minute or more
# Engines add in different orders. Now and then rounding decides on which side of its kink a ReLU or a pool lies. The
# tolerance is how far the weights may differ, as a share of how far training moved them.
TOLERANCE = 2e-2
FLUTE_JOB = (  # the shape of FLUTE's LR-MNIST: 1,000 clients, of which 10 a round
    "train mnist --rounds 100 --model logistic --set cohort_size=10 --set data.num_clients=1000"
    " --set client.batch_size=10 --set client.learning_rate=0.03"
)
DEMO_JOB = (  # what `make demo` does
    "compare mnist --tuners manual,random,asha,fedex --max-rounds 27 --total-rounds 135 --seeds 2"
    " --set data.num_clients=200 --set evaluation.every=3"
)
SMALLEST = {
    "cases": ["mlp:2"],
    "starts": [],
    "repeats": 1,
    "without": [SEARCH, BY_TORCH],  # other engines run the same scripts
    "commands": False,
    "out": Path("runs/smallest/engine_speed"),
}


def split(case: str) -> tuple[str, int]:
    """The model and the cohort size."""
    model, _, cohort_size = case.partition(":")
    return model, int(cohort_size)


def measure_rounds(case: str, without: list[str], repeats: int, plans: Path) -> Iterator[Measured]:
    """The milliseconds of a round; the engines take turns. Raises unless one round leads all to the same weights."""
    model, cohort_size = split(case)
    yield Measured(GFLOP, model, cohort_size, LIMIT, 0, flop_of_round(model, cohort_size) / 1e9)
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(RunningEngine(engine, model, plans))
            for name, engine in engines_for(model, without).items()
        }
        check_equal_work(model, cohort_size, running, plans)
        rounds = {}
        for name, engine in running.items():
            seconds = engine.train(cohort_size, 1)
            rounds[name] = 1 if name == LIMIT else int(np.clip(MEASUREMENT_SECONDS / seconds, 1, MAX_ROUNDS))
        for repeat, (name, engine) in itertools.product(range(repeats), running.items()):
            seconds = engine.train(cohort_size, rounds[name])
            federations = IN_FLIGHT if name == SEARCH else 1
            value = 1000 * seconds / (rounds[name] * federations)
            yield Measured(ROUND, model, cohort_size, name, repeat, value)


def check_equal_work(model: str, cohort_size: int, running: dict[str, RunningEngine], plans: Path) -> None:
    """Raises unless all engines have nearly the same weights after one round, and the pool and serial the same bits."""
    file = plans / "weights.npy"

    def weights(name: str, rounds: int) -> np.ndarray:
        running[name].train(cohort_size, rounds, file)
        return np.load(file)

    initial, serial = weights("plain", 0), weights(SERIAL, 1)
    for name in [name for name in running if name != LIMIT]:
        difference = float(np.linalg.norm(weights(name, 1) - serial) / np.linalg.norm(serial - initial))
        print(f"{model}, {cohort_size} clients: {name} differs by {difference:.1e} of the way", file=sys.stderr)
        if difference > (0 if name in EQUAL else TOLERANCE):
            raise RuntimeError(f"{model}: {name} and serial differ by {difference:.1e} of the way that they trained")


def measure_starts(case: str, repeats: int, plans: Path) -> Iterator[Measured]:
    """The time from an engine's start to the end of its first round, and its memory in the next rounds.

    One engine at a time: other engines would share memory pages with it.
    """
    model, cohort_size = split(case)
    names = [name for name in STARTED[model] if installed(ENGINES[name])]
    for repeat, name in itertools.product(range(repeats), names):
        started = time.perf_counter()
        with RunningEngine(ENGINES[name], model, plans) as engine:
            engine.train(cohort_size, 1)
            yield Measured(START, model, cohort_size, name, repeat, time.perf_counter() - started)
            yield Measured(MEMORY, model, cohort_size, name, repeat, engine.memory_during(cohort_size, MEMORY_ROUNDS))


def measure_commands(repeats: int, folder: Path) -> Iterator[Measured]:
    """The seconds of FLUTE's job and of `make demo`, from the start to the report."""
    for repeat in range(repeats):
        yield Measured(FLUTE, "logistic", 10, OURS, repeat, seconds_of(FLUTE_JOB, "compiled", folder))
    for repeat in range(min(repeats, DEMO_REPEATS)):
        yield Measured(DEMO, "mlp", 10, OURS, repeat, seconds_of(DEMO_JOB, "compiled", folder))
        yield Measured(DEMO, "mlp", 10, BY_TORCH, repeat, seconds_of(DEMO_JOB, "torch", folder))


def seconds_of(job: str, engine: str, folder: Path) -> float:
    """How long a command of fedtune takes."""
    command = [sys.executable, "-m", "fedtune", *job.split(), "--set", f"engine={engine}"]
    command += ["--force", "--out", str(folder / "run")]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def write_plans(cases: Iterable[str], folder: Path) -> None:
    """The cohorts and the order of examples in each round, as fedtune draws them, for all engines to follow."""
    command = [sys.executable, FOLDER / "with_fedtune.py", "plan", folder, str(MAX_ROUNDS), *cases]
    subprocess.run(command, check=True)


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[Iterator[Measured]]:
    """All measurements, part by part."""
    write_plans({*arguments.cases, *arguments.starts}, folder)
    for case in arguments.cases:
        yield measure_rounds(case, arguments.without, arguments.repeats, folder)
    for case in arguments.starts:
        yield measure_starts(case, arguments.repeats, folder)
    if arguments.commands:
        yield measure_commands(arguments.repeats, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each engine (default 5)")
    parser.add_argument("--cases", nargs="*", default=CASES, help="models and cohort sizes, as mlp:10")
    parser.add_argument("--starts", nargs="*", default=STARTS, choices=STARTS, help="cases whose start is measured")
    parser.add_argument("--without", nargs="+", default=[], choices=list(ENGINES), help="engines to leave out")
    parser.add_argument("--no-commands", dest="commands", action="store_false", help="leave FLUTE's job and demo out")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results.csv and figures/")
    parser.add_argument("--tables", action="store_true", help="measure nothing; print the tables of results.csv")
    parser.add_argument("--smallest", action="store_true", help="run in seconds; results go to runs/smallest")
    if parser.parse_args().smallest:
        parser.set_defaults(**SMALLEST)
    arguments = parser.parse_args()
    file = arguments.out / "results.csv"
    if not arguments.tables:
        for name, engine in ENGINES.items():
            if not installed(engine):
                print(f"{name} is left out: peers.py has not made {engine.python}")
        arguments.out.mkdir(parents=True, exist_ok=True)
        rows: list[Measured] = []
        with tempfile.TemporaryDirectory() as temporary:
            for part in measure(arguments, Path(temporary)):
                for measured in part:
                    print(*measured, file=sys.stderr, flush=True)
                    rows.append(measured)
                # Written after each part, because a run takes long.
                pd.DataFrame(rows).to_csv(file, index=False, float_format="%.4g")
    results = Results(pd.read_csv(file))
    plot(results, arguments.out / "figures" / "speed.png")
    print(*tables(results), sep="\n\n")


if __name__ == "__main__":
    main()
