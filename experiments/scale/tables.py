"""The tables of README.md, made from results.csv and trials.csv alone."""

from collections.abc import Iterable

import pandas as pd

ENGINE_TARGET = 1 / 3  # of the time of a round by torch, and of a round of an older checkout


def run_table(runs: pd.DataFrame) -> str:
    """What set-up, rounds and memory cost, by cohort and population: medians of the repeats."""
    head = [
        "cohort",
        "clients",
        "engine",
        "set-up, s",
        "set-up, processor time, s",
        "a round, ms",
        "processor time a round, ms",
        "own memory after set-up, MB",
        "in training, with workers",
    ]
    lines = []
    for (cohort, population, engine), part in runs.groupby(["cohort", "population", "engine"]):
        median = part.median(numeric_only=True)
        lines.append(
            [
                f"{cohort:,}",
                f"{population:,}",
                engine,
                f"{median['set_up']:.2f}",
                f"{median['set_up_processor']:.2f}",
                f"{1000 * median['round_median']:.3g} ({1000 * part['round_quartile_1'].min():.3g}–"
                f"{1000 * part['round_quartile_3'].max():.3g})",
                f"{1000 * median['round_processor']:.3g}",
                f"{median['set_up_own_memory']:.0f}",
                f"{median['own_memory']:.0f}",
            ]
        )
    return markdown(head, lines)


def engine_table(runs: pd.DataFrame) -> str:
    """The time of a round in the compiled kernel, divided by its time by torch and by an older checkout."""
    lines = []
    for (cohort, _), part in runs.groupby(["cohort", "population"]):
        rounds = part.pivot_table("round_median", "repeat", "engine")
        for other in rounds.columns.drop("compiled"):
            share = rounds["compiled"] / rounds[other]
            verdict = "met" if share.median() <= ENGINE_TARGET else "**missed**"
            cell = f"{share.median():.2f} ({share.min():.2f}–{share.max():.2f}); target at most a third: {verdict}"
            lines.append([f"{cohort:,} clients, compiled against {other}", cell])
    return markdown(["share of the time of a round", ""], lines)


def trial_table(trials: pd.DataFrame) -> str:
    """What each tenth of the search costs, and what it holds after it."""
    head = ["part", "trials so far", "rounds", "a round, ms", "own memory, MB", "files", "run folder, MB"]
    lines = []
    for _, row in trials.iterrows():
        time, memory = f"{1000 * row['seconds'] / row['rounds']:.2f}", f"{row['own_memory']:.0f}"
        counts = f"{row['trials']:,}", f"{row['rounds']:,}"
        lines.append([str(row["part"]), *counts, time, memory, f"{row['files']:,}", f"{row['megabytes']:.1f}"])
    return markdown(head, lines)


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    """A table of cells."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))
