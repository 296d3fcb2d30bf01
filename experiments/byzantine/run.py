"""Trains a model with attackers among the clients, under each aggregation; writes results.csv and the figure."""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import fedtune

FOLDER = Path(__file__).parent
GROUPS: dict[str, dict[str, Any]] = {
    "everybody": {"partition": "iid", "num_clients": 20, "examples_per_client": 600},
    "sampled": {"partition": "iid", "num_clients": 100},
    "shards": {"partition": "shards", "num_clients": 100},
}
TITLES = {
    "everybody": "20 of 20 clients, iid",
    "sampled": "20 of 100 clients, iid",
    "shards": "20 of 100 clients, two shards each",
}
COHORT, MOST_ATTACKERS = 20, 8  # Krum needs 2 * 8 + 3 clients
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "mean, no clipping": {"clip_factor": 0.0},
    "mean": {},
    "median": {"aggregation": "median"},
    "trimmed_mean": {"aggregation": "trimmed_mean", "trim": MOST_ATTACKERS / COHORT},
    "krum": {"aggregation": "krum", "byzantine": MOST_ATTACKERS},
    "multi_krum": {"aggregation": "multi_krum", "byzantine": MOST_ATTACKERS},
}
ATTACKS = ("sign_flip", "times_10", "collude")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
CLIENT = {"name": str(FOLDER / "attacks.py"), "learning_rate": 0.1, "batch_size": 48}
KEY = ["clients", "attack", "share", "aggregation", "seed"]
COLOURS = dict(zip(AGGREGATIONS, ("#999999", "#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00"), strict=True))
SMALLEST = {
    "groups": ["everybody"],
    "attacks": ["collude"],
    "shares": [0.4],
    "aggregations": ["mean", "krum"],
    "rounds": 1,
    "seeds": 1,
    "out": Path("runs/smallest/byzantine"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="shares of attackers")
    parser.add_argument("--aggregations", nargs="+", default=list(AGGREGATIONS), choices=list(AGGREGATIONS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results.csv and figures/")
    parser.add_argument("--smallest", action="store_true", help="run in seconds; results go to runs/smallest")
    if parser.parse_args().smallest:
        parser.set_defaults(**SMALLEST)
    arguments = parser.parse_args()
    (arguments.out / "figures").mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {tuple(row[name] for name in KEY) for row in rows}
    for key in wanted(arguments):
        if key in done:
            continue  # it was trained before
        rows.append({**dict(zip(KEY, key, strict=True)), **train(*key, arguments.rounds)})
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
    frame = pd.DataFrame(rows)
    print(table(frame).to_string())
    draw(frame, arguments.out / "figures" / "byzantine.png")


def wanted(arguments: argparse.Namespace) -> list[tuple[str, str, float, str, int]]:
    """The key of every run: a run without attackers is needed once for all attacks."""
    attacks = [(attack, share) for attack, share in itertools.product(arguments.attacks, arguments.shares) if share > 0]
    if 0 in arguments.shares:
        attacks.insert(0, ("none", 0.0))
    return [
        (group, attack, share, aggregation, seed)
        for seed in range(arguments.seeds)
        for group in arguments.groups
        for attack, share in attacks
        for aggregation in arguments.aggregations
    ]


def train(group: str, attack: str, share: float, aggregation: str, seed: int, rounds: int) -> dict[str, float]:
    """The test error of the last evaluations, and how many updates were clipped."""
    with tempfile.TemporaryDirectory() as folder:
        run = fedtune.train(
            f"{FOLDER / 'attacks.py'}:make",
            rounds,
            out=Path(folder) / "run",
            executor="serial",
            seed=seed,
            cohort_size=COHORT,
            evaluation={"every": 5},
            data={**GROUPS[group], "attack": attack, "share": share, "seed": seed},
            model={"name": "logistic"},
            client=CLIENT,
            server=AGGREGATIONS[aggregation],
        )
    (row,) = run.results.to_dict("records")
    return {"test_error": row["test_error"], "clipped": row["clipped"]}


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean over seeds of the test error in per cent: a row for each aggregation, a column for each attack."""
    errors = 100 * frame.set_index(KEY)["test_error"]
    means = errors.groupby(level=["clients", "attack", "share", "aggregation"], sort=False).mean().round(1)
    return means.unstack(["attack", "share"])


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A row of panels for each group, a panel for each attack, a line for each aggregation."""
    groups = [group for group in GROUPS if group in set(frame["clients"])]
    attacks = [attack for attack in ATTACKS if attack in set(frame["attack"])]
    figure = Figure(figsize=(3.4 * len(attacks), 0.8 + 2.6 * len(groups)), dpi=110, layout="constrained")
    panels = figure.subplots(len(groups), len(attacks), squeeze=False, sharex=True, sharey=True)
    for (group, attack), axes in zip(itertools.product(groups, attacks), panels.flat, strict=True):
        part = frame[(frame["clients"] == group) & frame["attack"].isin([attack, "none"])]
        draw_panel(axes, part)
        axes.set_title(f"{attack}: {TITLES[group]}", fontsize=8, loc="left")
    for axes in panels[:, 0]:
        axes.set_ylabel("test error")
    for axes in panels[-1]:
        axes.set_xlabel("attackers among the clients")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path)


def draw_panel(axes: Axes, part: pd.DataFrame) -> None:
    for aggregation, line in part.groupby("aggregation", sort=False):
        errors = line.groupby("share")["test_error"].agg(["mean", "min", "max"])
        colour = COLOURS[str(aggregation)]
        axes.plot(errors.index, errors["mean"], "o-", color=colour, label=aggregation, markersize=3, linewidth=1.2)
        axes.fill_between(errors.index, errors["min"], errors["max"], color=colour, alpha=0.12, linewidth=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.2, 0.4, 0.8], ["10%", "20%", "40%", "80%"])
    axes.minorticks_off()
    axes.grid(color="#E3E3E3")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
