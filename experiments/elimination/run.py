"""Runs what README.md compares, a run folder a group, partition and model; draws the figure of all that has ended."""

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

# What each group lays over settings.toml. `elimination` halves every m = max(4, R / 40) rounds, so 81 and 405 rounds
# are two runs; the others are read after 81 and after 405 rounds of one.
GROUPS: dict[str, dict[str, Any]] = {
    "short": {"tuners": [*ELIMINATION, "rsws"], "max_rounds": 81, "total_rounds": 81, "client": BAD},
    "long": {"tuners": ELIMINATION, "max_rounds": 405, "total_rounds": 405, "client": BAD},
    "bad": {"tuners": ["manual", "fedex"], "max_rounds": 81, "total_rounds": 405, "client": BAD},
    "good": {"tuners": ["manual"], "max_rounds": 81, "total_rounds": 405, "client": GOOD},
    "asha": {"tuners": ["asha"], "max_rounds": 81, "total_rounds": 405},
}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": {"name": "mlp"}},
    "cnn": {"model": {"name": "cnn"}, "evaluation": {"clients": 200}},
}
KEY = ["model", "partition", "rounds", "seed", "tuner"]
NAMES = {"bad": ", bad rate", "good": ", good rate"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mlp"], choices=list(MODELS))
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--partitions", nargs="+", default=list(PARTITIONS), choices=list(PARTITIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--total-rounds", type=int, default=405, help="of the groups bad and good")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/elimination"))
    arguments = parser.parse_args()
    for model in arguments.models:
        for partition in arguments.partitions:
            for group in arguments.groups:
                folder = arguments.runs / f"{model}-{partition}-{group}"
                settings = {**GROUPS[group], **MODELS[model], "data": PARTITIONS[partition]}
                if group in ("bad", "good"):
                    settings["total_rounds"] = arguments.total_rounds
                options = {"seed": arguments.seed, "seeds": arguments.seeds, "workers": arguments.workers}
                run(folder, {**settings, **options})
    results = FOLDER / "results.csv"
    # What is not among these runs stays as it was.
    frame = pd.concat([pd.read_csv(results), collect(arguments.runs)]).drop_duplicates(KEY, keep="last")
    frame.to_csv(results, index=False, float_format="%.6g")
    print(table(frame).to_string())
    draw(frame, FOLDER / "figures" / "elimination.png")


def run(folder: Path, settings: dict[str, Any]) -> None:
    """Runs a group, or goes on with it where it was stopped."""
    if folder.exists():
        fedtune.resume(folder)
    else:
        fedtune.compare(FOLDER / "settings.toml", out=folder, **settings)


def collect(runs: Path) -> pd.DataFrame:
    """A row a model, partition, tuner, seed and reading of every run that has ended; errors are fractions.

    `rounds` is how long the federation was trained that one ends with: ASHA's for 81 rounds, though it spent 405.
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
                        **{"model": model, "partition": partition, "rounds": rounds, "seed": row["seed"]},
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
    """A panel a model and number of rounds: each seed's global error as a dot, the mean over seeds as a bar."""
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
