"""Makes a run folder for each group, partition and model of README.md, and draws the figure of all runs that ended."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

import fedtune
from fedtune.errors import InputError

FOLDER = Path(__file__).parent
PARTITIONS: dict[str, dict[str, Any]] = {
    "shards": {"partition": "shards", "examples_per_client": 60},
    "dirichlet": {"partition": "dirichlet", "alpha": 0.3, "examples_per_client": 60},
}
GOOD, BAD = {"learning_rate": 0.1}, {"learning_rate": 1e-3}
ELIMINATION = ["elimination", "elimination+fedex"]

# What each group lays over settings.toml, besides its budget.
GROUPS: dict[str, dict[str, Any]] = {
    "short": {"tuners": [*ELIMINATION, "rsws"], "client": BAD},
    "long": {"tuners": ELIMINATION, "client": BAD},
    "bad": {"tuners": ["manual", "fedex"], "client": BAD},
    "good": {"tuners": ["manual"], "client": GOOD},
    "asha": {"tuners": ["asha"]},
}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": {"name": "mlp"}},
    "cnn": {"model": {"name": "cnn"}, "evaluation": {"clients": 200}},
}
KEY = ["model", "partition", "rounds", "seed", "tuner"]
SMALLEST = {
    "partitions": ["dirichlet"],
    "seeds": 1,
    "max_rounds": 18,
    "total_rounds": 20,
    "num_clients": 30,
    "workers": 1,
    "runs": Path("runs/smallest/elimination/runs"),
    "out": Path("runs/smallest/elimination"),
}
NAMES = {"bad": ", bad rate", "good": ", good rate"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mlp"], choices=list(MODELS))
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--partitions", nargs="+", default=list(PARTITIONS), choices=list(PARTITIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--max-rounds", type=int, default=81, help="the rounds of the shorter trainings (default 81)")
    parser.add_argument("--total-rounds", type=int, default=405, help="the rounds of the longer ones (default 405)")
    parser.add_argument("--num-clients", type=int, default=1000, help="the number of clients (default 1000)")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/elimination"))
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results.csv and figures/")
    parser.add_argument("--smallest", action="store_true", help="run in seconds; results go to runs/smallest")
    if parser.parse_args().smallest:
        parser.set_defaults(**SMALLEST)
    arguments = parser.parse_args()
    for model in arguments.models:
        for partition in arguments.partitions:
            for group in arguments.groups:
                folder = arguments.runs / f"{model}-{partition}-{group}"
                settings = {
                    **GROUPS[group],
                    **MODELS[model],
                    **budget(group, arguments.max_rounds, arguments.total_rounds),
                    "data": {**PARTITIONS[partition], "num_clients": arguments.num_clients},
                    "seed": arguments.seed,
                    "seeds": arguments.seeds,
                    "workers": arguments.workers,
                    "executor": "serial" if arguments.workers == 1 else "auto",
                }
                run(folder, settings)
    # Rows of runs that are not in the folder stay as they are.
    kept = pd.read_csv(FOLDER / "results.csv")
    frame = pd.concat([kept, collect(arguments.runs)]).drop_duplicates(KEY, keep="last")
    arguments.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.out / "results.csv", index=False, float_format="%.6g")
    print(table(frame).to_string())
    draw(frame, arguments.out / "figures" / "elimination.png")


def budget(group: str, max_rounds: int, total_rounds: int) -> dict[str, int]:
    """The group's max_rounds and total_rounds.

    `elimination` halves its pool every m = max(4, R / 40) rounds, so its short and its long training are two runs. The
    other tuners are read twice in one run: after `max_rounds` and after `total_rounds`.
    """
    if group == "short":
        return {"max_rounds": max_rounds, "total_rounds": max_rounds}
    if group == "long":
        return {"max_rounds": total_rounds, "total_rounds": total_rounds}
    return {"max_rounds": max_rounds, "total_rounds": total_rounds}


def run(folder: Path, settings: dict[str, Any]) -> None:
    """Runs a group, or resumes its run if it was stopped."""
    if folder.exists():
        fedtune.resume(folder)
    else:
        fedtune.compare(FOLDER / "settings.toml", out=folder, **settings)


def collect(runs: Path) -> pd.DataFrame:
    """A row for each model, partition, tuner, seed and reading of every run that has ended; errors are fractions.

    `rounds` is the number of rounds that the chosen federation was trained for: 81 for ASHA, although ASHA spent 405.
    """
    rows = []
    for folder in sorted(runs.iterdir()):
        model, partition, group = folder.name.split("-")
        try:
            results = fedtune.read_run(folder).results
        except InputError as error:
            print(f"left out: {error}")
            continue
        for row in results.to_dict("records"):
            readings = {row["max_rounds"]: "_at_max_rounds", row["rounds_of_trial"]: ""}
            for rounds, reading in readings.items():
                rows.append(
                    {
                        "model": model,
                        "partition": partition,
                        "rounds": rounds,
                        "seed": row["seed"],
                        "tuner": f"{row['tuner']}{NAMES.get(group, '')}",
                        "global": row[f"test_error{reading}"],
                        "personalised": row[f"test_error_personalised{reading}"],
                    }
                )
    return pd.DataFrame(rows)


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Means and standard errors over seeds, in per cent."""
    groups = (100 * frame.set_index(["model", "rounds", "tuner", "partition", "seed"])).groupby(
        level=["model", "rounds", "tuner", "partition"]
    )
    return groups.agg(["mean", "sem", "count"]).unstack("partition").round(2)


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A panel for each model and number of rounds: a dot is a seed's global error, a bar is the mean over seeds."""
    panels = list(frame.groupby(["model", "rounds"]))
    figure = Figure(figsize=(9, 0.4 + 2.7 * len(panels)), dpi=150, layout="constrained")
    for axes, ((model, rounds), panel) in zip(
        figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0], panels, strict=True
    ):
        order = panel.groupby("tuner")["global"].mean().sort_values(ascending=False).index
        for offset, colour, (partition, part) in zip(
            (0.15, -0.15), ("#c1272d", "#0b5394"), panel.groupby("partition"), strict=False
        ):
            heights = part["tuner"].map({tuner: place + offset for place, tuner in enumerate(order)})
            axes.plot(part["global"], heights, "o", color=colour, markersize=4, alpha=0.6, label=partition)
            means = part.groupby("tuner")["global"].mean()
            places = np.array([order.get_loc(tuner) for tuner in means.index]) + offset
            axes.plot(means, places, "|", color=colour, markersize=14, markeredgewidth=2)
        axes.set_yticks(range(len(order)), order)
        axes.set_xscale("log")
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_title(f"{model}, one federation trained for {rounds} rounds", loc="left", fontsize=10)
        axes.set_xlabel("test error of the global model; a dot a seed, a bar their mean")
        axes.grid(axis="x", color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
