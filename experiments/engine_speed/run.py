"""Compares fedtune with a plain loop, Flower on Ray and pfl-research, which do the same work; see README.md."""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from peers import python_of
from processes import CORES, Engine, RunningEngine

FOLDER = Path(__file__).parent
MODELS, COHORT_SIZES = ("logistic", "mlp", "lstm", "cnn"), (10, 50)
CASES = [f"{model}:{cohort_size}" for model in MODELS for cohort_size in COHORT_SIZES]
MEASUREMENT_SECONDS, MAX_ROUNDS = 0.5, 40  # a measurement takes as many rounds as fill the first
MEMORY_ROUNDS = 3
IN_FLIGHT = 4  # trials at once, as a search has them
# Engines add in different orders. Now and then rounding decides on which side of its kink a ReLU or a pool lies. The
# tolerance is how far the weights may differ, as a share of how far training moved them.
TOLERANCE = 2e-2
OURS, SEARCH = "fedtune, pool", f"fedtune, pool, {IN_FLIGHT} trials"
EQUAL = "fedtune, serial", OURS, SEARCH  # to the bit
FLOWER, PFL = str(python_of("flower")), str(python_of("pfl"))
ENGINES = {
    "plain": Engine(sys.executable, "plain_loop.py", ("textbook",), 1),
    "plain, threads": Engine(sys.executable, "plain_loop.py", ("textbook",), CORES),
    "plain, fedtune's module": Engine(sys.executable, "plain_loop.py", ("ours",), 1),
    "fedtune, serial": Engine(sys.executable, "with_fedtune.py", ("serial", "1"), 1),
    OURS: Engine(sys.executable, "with_fedtune.py", ("pool", "1"), 1),
    SEARCH: Engine(sys.executable, "with_fedtune.py", ("pool", str(IN_FLIGHT)), 1),
    "fedtune, batched": Engine(sys.executable, "with_fedtune.py", ("batched", "1"), 1),
    "Flower on Ray": Engine(FLOWER, "with_flower.py", (), 1),
    "pfl": Engine(PFL, "with_pfl.py", ("1",), 1),
    "pfl, threads": Engine(PFL, "with_pfl.py", ("1",), CORES),
    "pfl, processes": Engine(PFL, "with_pfl.py", (str(CORES),), 1),
}
# One thread for each core gains nothing if an operation takes microseconds, and loses much if the cores are busy. Only
# the CNN has a textbook's form that differs from fedtune's. An LSTM can't be batched.
ONLY_FOR = {
    "fedtune, batched": ["logistic", "mlp", "cnn"],
    "plain, threads": ["cnn"],
    "plain, fedtune's module": ["cnn"],
    "pfl, threads": ["cnn"],
}
STARTED = {  # the engines whose start and memory are measured, by model
    "logistic": ["plain", "fedtune, serial", OURS, "Flower on Ray", "pfl", "pfl, processes"],
    "cnn": [OURS, "Flower on Ray"],
}
RIVALS = {  # each with the ways to run it; the fastest way counts
    "Flower on Ray": ["Flower on Ray"],
    "pfl": ["pfl", "pfl, threads", "pfl, processes"],
    "plain": ["plain", "plain, threads"],
}
TARGETS = {  # how many times as fast as a rival the pool should be
    ("cnn", 10): {"Flower on Ray": 2, "pfl": 1.5, "plain": 1.2},
    ("mlp", 10): {"Flower on Ray": 8, "pfl": 3, "plain": 2.5},
    ("logistic", 50): {"Flower on Ray": 10, "pfl": 6, "plain": 6},
    ("lstm", 10): {"Flower on Ray": 2, "pfl": 1.3, "plain": 1.3},
}
COLOURS = {"Flower on Ray": "#D55E00", "pfl": "#009E73", "plain": "#666666"}
SMALLEST = {
    "cases": ["cnn:2"],  # all engines have the CNN
    "repeats": 1,
    "without": ["plain, threads", "pfl, threads"],  # the same scripts as without threads
    "flute_rounds": 2,
    "out": Path("runs/smallest/engine_speed"),
}
FLUTE_JOB = (  # the shape of FLUTE's LR-MNIST: 1,000 clients, of which 10 a round
    "train mnist --model logistic --set cohort_size=10 --set data.num_clients=1000"
    " --set client.batch_size=10 --set client.learning_rate=0.03"
)


def installed(engine: Engine) -> bool:
    """Whether the engine's interpreter exists; those of the peers are made by peers.py."""
    return Path(engine.python).exists()


class Measured(NamedTuple):
    """One measurement."""

    what: str
    model: str
    cohort_size: int
    engine: str
    repeat: int
    value: float


ROUND, START, MEMORY, FLUTE = "milliseconds a round", "seconds to the first round", "GiB", "seconds"


def measure_rounds(
    model: str, cohort_sizes: list[int], without: list[str], repeats: int, plans: Path
) -> Iterator[Measured]:
    """The milliseconds of a round; the engines take turns. Raises unless one round leads all to the same weights."""
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(RunningEngine(engine, model, plans))
            for name, engine in ENGINES.items()
            if model in ONLY_FOR.get(name, MODELS) and installed(engine) and name not in without
        }
        for cohort_size in cohort_sizes:
            check_equal_work(model, cohort_size, running, plans)
            rounds = {}
            for name, engine in running.items():
                seconds = engine.train(cohort_size, 1)
                rounds[name] = int(np.clip(MEASUREMENT_SECONDS / seconds, 1, MAX_ROUNDS))
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

    initial, serial = weights("plain", 0), weights("fedtune, serial", 1)
    for name in running:
        difference = float(np.linalg.norm(weights(name, 1) - serial) / np.linalg.norm(serial - initial))
        print(f"{model}, {cohort_size} clients: {name} differs by {difference:.1e} of the way", file=sys.stderr)
        if difference > (0 if name in EQUAL else TOLERANCE):
            raise RuntimeError(f"{model}: {name} and serial differ by {difference:.1e} of the way that they trained")


def measure_starts(model: str, cohort_size: int, repeats: int, plans: Path) -> Iterator[Measured]:
    """The time from an engine's start to the end of its first round, and its memory in the next rounds.

    One engine at a time: other engines would share memory pages with it.
    """
    names = [name for name in STARTED[model] if installed(ENGINES[name])]
    for repeat, name in itertools.product(range(repeats), names):
        started = time.perf_counter()
        with RunningEngine(ENGINES[name], model, plans) as engine:
            engine.train(cohort_size, 1)
            yield Measured(START, model, cohort_size, name, repeat, time.perf_counter() - started)
            yield Measured(MEMORY, model, cohort_size, name, repeat, engine.memory_during(cohort_size, MEMORY_ROUNDS))


def measure_flute_job(rounds: int, repeats: int, folder: Path) -> Iterator[Measured]:
    """The seconds that FLUTE's job takes as a command of fedtune, from the start to its report."""
    command = [sys.executable, "-m", "fedtune", *FLUTE_JOB.split()]
    command += ["--rounds", str(rounds), "--force", "--out", str(folder / "flute")]
    for repeat in range(repeats):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        yield Measured(FLUTE, "logistic", 10, OURS, repeat, time.perf_counter() - started)


def write_plans(cohort_sizes: Iterable[int], folder: Path) -> None:
    """The cohorts and the order of examples in each round, as fedtune draws them, for all engines to follow."""
    for cohort_size in cohort_sizes:
        arguments = ["plan", str(folder), str(cohort_size), str(MAX_ROUNDS)]
        subprocess.run([sys.executable, FOLDER / "with_fedtune.py", *arguments], check=True)


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """For each model, cohort size and rival: how many times as long its rounds take as the pool's rounds.

    Median, minimum and maximum over the repeats, and the target. The two measurements of a repeat are taken within
    seconds of each other. A rival that is not installed has no row.
    """
    rounds = rows[rows["what"] == ROUND].pivot_table("value", ["model", "cohort_size", "repeat"], "engine", sort=False)
    lines = []
    for (model, cohort_size), part in rounds.groupby(level=["model", "cohort_size"], sort=False):
        for rival, ways in RIVALS.items():
            medians = part.reindex(columns=ways).median().dropna()
            if medians.empty:  # the rival is not installed
                continue
            ratio = part[medians.idxmin()] / part[OURS]
            target = TARGETS.get((model, cohort_size), {}).get(rival, np.nan)
            lines.append((model, cohort_size, rival, ratio.median(), ratio.min(), ratio.max(), target))
    columns = ["model", "cohort_size", "rival", "median", "min", "max", "target"]
    return pd.DataFrame(lines, columns=columns).set_index(columns[:3])


def tables(rows: pd.DataFrame, ratios: pd.DataFrame) -> Iterator[str]:
    """The tables of README.md: all measurements by engine, and how many times as fast the pool is."""
    spread = (
        rows.groupby(["what", "model", "cohort_size", "engine"], sort=False)["value"]
        .apply(_with_range)
        .unstack(sort=False)
    )
    cases = {f"`{model}`, {size} clients: {what}": line for (what, model, size), line in spread.iterrows()}
    names = [name for name in ENGINES if name in spread]
    yield markdown(["", *names], ([case, *line[names].fillna("")] for case, line in cases.items()))
    cells = ratios.apply(_with_target, axis=1).unstack(sort=False)
    lines = ([f"`{model}`, {size} clients", *line] for (model, size), line in cells.iterrows())
    yield markdown(["times as fast as", *cells.columns], lines)


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    """A table of cells."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def _with_range(values: pd.Series) -> str:
    return f"{values.median():.3g} ({values.min():.3g}–{values.max():.3g})"


def _with_target(ratio: pd.Series) -> str:
    target = "" if np.isnan(ratio["target"]) else f"; target {ratio['target']:g}"
    return "{median:.2f} ({min:.2f}–{max:.2f})".format(**ratio) + target


def plot(ratios: pd.DataFrame, path: Path) -> None:
    """Draws how many times as fast as each rival the pool is, with the range over the repeats, and the targets."""
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    cases = ratios.index.droplevel("rival").unique()
    for number, rival in enumerate(ratios.index.unique("rival")):
        colour = COLOURS[rival]
        part = ratios.xs(rival, level="rival").loc[cases]
        position = np.arange(len(cases)) + (number - 1) * 0.22
        spread = [part["median"] - part["min"], part["max"] - part["median"]]
        axes.errorbar(part["median"], position, xerr=spread, fmt="o", color=colour, label=f"over {rival}", capsize=2)
        axes.plot(part["target"], position, "|", color=colour, markersize=12, markeredgewidth=2)
    axes.plot([], [], "|", color="#222222", markersize=12, markeredgewidth=2, label="target")
    axes.set_yticks(np.arange(len(cases)), [f"{model}, {size} clients" for model, size in cases])
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 3, 5, 10, 20]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.xaxis.minorticks_off()
    axes.axvline(1, color="#222222", linewidth=0.8)
    axes.set_xlabel("times as many rounds a second")
    axes.set_title("How much faster are fedtune's rounds?", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each engine (default 5)")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, help="models and cohort sizes")
    parser.add_argument("--without", nargs="+", default=[], choices=list(ENGINES), help="engines to leave out")
    parser.add_argument("--flute-rounds", type=int, default=100, help="rounds of FLUTE's job (default 100)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results.csv and figures/")
    parser.add_argument("--smallest", action="store_true", help="run in seconds; results go to runs/smallest")
    if parser.parse_args().smallest:
        parser.set_defaults(**SMALLEST)
    arguments = parser.parse_args()
    repeats, rows = arguments.repeats, []
    sizes: dict[str, list[int]] = {}
    for case in arguments.cases:
        model, _, cohort_size = case.partition(":")
        sizes.setdefault(model, []).append(int(cohort_size))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, engine in ENGINES.items():
        if not installed(engine):
            print(f"{name} is left out: peers.py has not made {engine.python}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_plans({cohort_size for of_model in sizes.values() for cohort_size in of_model}, folder)
        measurements = [
            *(measure_rounds(*case, arguments.without, repeats, folder) for case in sizes.items()),
            *(measure_starts(model, sizes[model][0], repeats, folder) for model in STARTED if model in sizes),
            measure_flute_job(arguments.flute_rounds, repeats, folder),
        ]
        for measurement in measurements:
            for measured in measurement:
                print(*measured, file=sys.stderr, flush=True)
                rows.append(measured)
            frame = pd.DataFrame(rows)  # written after each part, because a run takes long
            frame.to_csv(arguments.out / "results.csv", index=False, float_format="%.4g")
    ratios = compare(frame)
    plot(ratios, arguments.out / "figures" / "speed.png")
    print(*tables(frame, ratios), sep="\n\n")


if __name__ == "__main__":
    main()
