"""Tables for the terminal."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int64
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedtune.data.problems import Problem
from fedtune.overlay import FIXED
from fedtune.printable import printable
from fedtune.report.frames import READINGS, lead_line
from fedtune.simulation.records import FAULTS
from fedtune.tuning.tuners import tuner_kind

MISSING = "–"
MIN_WIDTH = 80  # characters, of the summary: in less room its columns would be cut
SPENT = 0.99  # of the budget: a tuner that spent less is named
COMPARED = ("test_error", "test_error_personalised", "test_error_at_max_rounds")


def summary_table(summary: pd.DataFrame) -> Table:
    """The summary of a run: a row for each tuner, errors in per cent.

    The lowest error of each test column is bold and has a star. Lines below the table say what was not as planned.
    """
    summary = summary.assign(tuner=[escape(printable(str(tuner))) for tuner in summary["tuner"]])
    seeds, max_rounds = int(summary["seeds"].max()), int(summary["max_rounds"].iloc[0])
    over = f"mean ± standard error over {seeds} seeds" if seeds > 1 else "one seed"
    table = Table(
        title=f"Errors in %, {over}",
        title_justify="left",
        title_style="bold",
        caption="\n".join(_notes(summary, max_rounds)),
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        min_width=MIN_WIDTH,
    )
    table.add_column("tuner", overflow="fold")
    for heading in (
        "validation",
        "test",
        "personalised\ntest",
        f"test at\n{max_rounds} rounds",
        "rounds\nspent",
        "time\na seed",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    best = summary[list(COMPARED)].min().to_dict() if len(summary) > 1 else {}
    for row in summary.to_dict("records"):
        table.add_row(
            str(row["tuner"]),
            percent(row["validation_error"], row["validation_error_se"]),
            *(_marked(percent(row[error], row[f"{error}_se"]), row[error] == best.get(error)) for error in COMPARED),
            f"{row['rounds']:,.0f}",
            duration(row["wall_seconds"]),
        )
    return table


def percent(error: float, standard_error: float = math.nan) -> str:
    """An error in per cent, with its standard error if that is known; a dash for NaN."""
    if math.isnan(error):
        return MISSING
    return f"{100 * error:.2f}" + ("" if math.isnan(standard_error) else f"±{100 * standard_error:.2f}")


def chosen_lines(results: pd.DataFrame, space: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """What each search chose, a line for each tuner and seed: the values of the hyperparameters that `space` searches.

    From a pool, it is the configuration with the highest probability. If theta prefers that configuration but has not
    settled on it, the line ends with its probability.
    """
    for row in results.to_dict("records"):
        if row["tuner"] in ("manual", "uniform"):  # they choose nothing
            continue
        theta = json.loads(row["theta"])
        probability = math.prod(max(factor) for factor in theta)
        uniform = math.prod(1 / len(factor) for factor in theta)
        sure = f"; theta gives it {probability:.2f}" if 1.001 * uniform < probability < 1 else ""
        config = json.loads(row["config"])
        values = [
            f"{side}.{name}={config[side][name]:.4g}"
            for side in ("client", "server")
            for name, domain in space.get(side, {}).items()
            if domain != FIXED
        ]
        yield printable(f"{row['tuner']}, seed {row['seed']}, chose {', '.join(values)}{sure}")


def fixed_first_line(results: pd.DataFrame) -> str | None:
    """A sentence: every search tried the fixed values, and how often it chose them. None without a search.

    It is for runs with the setting `fixed_first`.
    """
    searches = results[[tuner_kind(tuner).searches for tuner in results["tuner"]]]
    if searches.empty:
        return None
    chosen, num_studies = int((searches["trial"] == 0).sum()), len(searches)
    return (
        f"Trial 0 of every search has the fixed [client] and [server] values; it was chosen in {chosen} of "
        f"{num_studies} {'studies' if num_studies > 1 else 'study'}"
    )


def _marked(cell: str, best: bool) -> Text:
    """The cell with a star, or with a space in the star's place, so that the digits stay aligned."""
    return Text(f"{cell}*", style="bold") if best else Text(f"{cell} ")


def _notes(summary: pd.DataFrame, max_rounds: int) -> list[str]:
    """The lines under the table: failed jobs, faults, what the two readings mean, leads and their noise."""
    rows = summary.to_dict("records")
    notes = [
        f"test: when all rounds are spent (equal spending); test at {max_rounds} rounds: the chosen federation after "
        f"{max_rounds} rounds of its own (equal length)."
    ]
    if len(summary) > 1:
        notes[0] += " Which of the two one reads can decide who wins. * lowest."
    if unrecorded := [name for name in (*FAULTS, "dropped_jobs") if summary[name].isna().all()]:
        notes.insert(0, f"Not recorded by the version of fedtune that wrote this run: {', '.join(unrecorded)}.")
    if faults := [f"{row['tuner']} {counts}" for row in rows if (counts := describe_counts(row, FAULTS))]:
        meanings = "dropped (rejected), clipped (too large), lost (failed), late (stragglers), left (dropouts)"
        notes.insert(0, f"Updates and clients {meanings}: {'; '.join(faults)}.")
    if jobs := [f"{row['tuner']} {row['dropped_jobs']:,.0f}" for row in rows if row["dropped_jobs"] > 0]:
        notes.insert(
            0,
            "Failed attempts at jobs; if a job is not retried, its rounds are charged but not spent: "
            f"{', '.join(jobs)}.",
        )
    if unspent := [says for row in rows if (says := _unspent(row))]:
        notes.append(f"Not all tuners spent the whole budget: {'; '.join(unspent)}.")
    if short := _in_how_many_seeds(rows, "short"):
        notes.append(f"Seeds whose chosen federation had fewer than {max_rounds} rounds: {short}.")
    if close := _in_how_many_seeds(rows, "close"):
        notes.append(
            f"Seeds whose best two trials lie within the combined standard error of their validation scores over "
            f"clients, so that the other might as well have been chosen: {close}."
        )
    # With one seed, the sentence for the second reading would only repeat that the noise is unknown.
    readings = tuple(READINGS) if int(summary["seeds"].max()) > 1 else ("test_error",)
    return notes + [note for reading in readings if (note := lead_line(summary, reading))]


def describe_counts(counts: Mapping[Any, Any], names: Iterable[str]) -> str:
    """The named counts that are above zero, for example `3 dropped, 1 clipped`; a count that is NaN is left out."""
    return ", ".join(f"{counts[name]:,.0f} {name}" for name in names if counts[name] > 0)


def _in_how_many_seeds(rows: Sequence[Mapping[Any, Any]], name: str) -> str:
    """The tuners whose count of that name is not zero, for example `asha in 2 of 3`."""
    return ", ".join(f"{row['tuner']} in {row[name]} of {row['seeds']}" for row in rows if row[name])


def _unspent(row: Mapping[Any, Any]) -> str | None:
    """How much of its budget a tuner spent, and why not all of it; None if it spent nearly all, or if it is unknown.

    Of the budget `total_rounds`, `charged_rounds` were given to jobs, and `rounds` were trained.
    """
    total, charged, trained = row["total_rounds"], row["charged_rounds"], row["rounds"]
    if not trained < SPENT * total:  # NaN in a run of an older version
        return None
    reasons = ["it had no more jobs"] if charged < total else []
    reasons += ["its failed jobs were charged"] if trained < charged else []
    return f"{row['tuner']} spent {100 * trained / total:.0f} % ({' and '.join(reasons)})"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss; a dash for NaN."""
    return MISSING if math.isnan(seconds) else str(timedelta(seconds=round(seconds)))


def problem_lines(problems: Sequence[Problem], limit: int | None) -> Iterator[str]:
    """A line for each problem of a data set, in order.

    Of each kind of problem, at most `limit` are shown, and a line at the end says how many more there are.
    """
    shown: Counter[str] = Counter()
    for problem in problems:
        shown[problem.kind] += 1
        if limit is None or shown[problem.kind] <= limit:
            yield printable(f"{problem.severity}: {problem.message}")
    for kind, count in shown.items():
        if limit is not None and count > limit:
            yield f"and {count - limit:,} more: {kind}"


def stats_table(stats: Mapping[str, object]) -> Table:
    """The statistics of a federated data set, a row for each."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for name, value in stats.items():
        table.add_row(name.replace("_", " "), _statistic(value))
    return table


def size_histogram(sizes: Int64[np.ndarray, "client"]) -> Table:
    """How many clients have how many examples: up to ten bins of equal width, whose bounds are whole numbers."""
    low, high = int(sizes.min()), int(sizes.max())
    edges = np.unique(np.linspace(low, high + 1, 11).astype(np.int64))
    counts = np.histogram(sizes, edges)[0].tolist()
    table = Table(box=None, pad_edge=False)
    for heading in ("examples", "clients"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column()
    for (first, after), count in zip(pairwise(edges.tolist()), counts, strict=True):
        bin_ = f"{first:,}" if after == first + 1 else f"{first:,}–{after - 1:,}"
        table.add_row(bin_, f"{count:,}", "█" * round(30 * count / max(counts)))
    return table


def _statistic(value: object) -> str:
    """A number with its thousands separated; anything else as text."""
    if isinstance(value, float):
        return MISSING if math.isnan(value) else f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
