"""The tables in terminals of 80 and 120 columns."""

import io
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table

from fedtune.report.frames import ERRORS
from fedtune.report.tables import (
    chosen_lines,
    duration,
    fixed_first_line,
    percent,
    size_histogram,
    stats_table,
    summary_table,
)
from fedtune.simulation.records import FAULTS

NAN = math.nan
COLUMNS = ("test_error", "test_error_personalised", "test_error_at_max_rounds")


def row(tuner: str, error: float = 0.1, standard_error: float = 0.01, **other: float) -> dict[str, object]:
    errors = dict.fromkeys(ERRORS, error) | {f"{name}_se": standard_error for name in ERRORS}
    counts = {"rounds": 405.0, "client_updates": 4050.0, "wall_seconds": 75.0, **dict.fromkeys(FAULTS, 0)}
    counts |= {"total_rounds": 405.0, "charged_rounds": 405.0, "dropped_jobs": 0, "close": 0, "short": 0}
    return {"tuner": tuner, "seeds": 3, "max_rounds": 81, **errors, **counts, **other}


def rendered(table: Table, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line_of(text: str, tuner: str) -> str:
    (line,) = [line for line in text.splitlines() if re.match(rf"{re.escape(tuner)} +[\d–]", line)]
    return line


@pytest.mark.parametrize("width", [80, 120])
def test_longest_row_fits_on_one_line(width: int) -> None:
    longest = row("elimination+fedex", 0.1234, 0.0056, wall_seconds=9 * 3600 + 61)
    text = rendered(summary_table(pd.DataFrame([longest, row("asha", 0.9)])), width)
    assert max(len(line) for line in text.splitlines()) <= width
    best = "12.34±0.56*"
    assert line_of(text, "elimination+fedex").split()[1:] == ["12.34±0.56", best, best, best, "405", "9:01:01"]


def test_name_too_long_is_folded_not_cut() -> None:
    name = "a_tuner_that_somebody_else_made"
    text = rendered(summary_table(pd.DataFrame([row(name, 0.1234, 0.1056)])))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "".join(re.findall(r"^([a-z_]+)(?: +12.34.*| *)$", text, flags=re.MULTILINE)) == name
    assert "…" not in text


@pytest.mark.parametrize("column", COLUMNS)
def test_only_the_lowest_of_a_test_column_has_a_star(column: str) -> None:
    others = dict.fromkeys(COLUMNS, NAN)
    summary = pd.DataFrame([row("sha", **others | {column: 0.3}), row("asha", **others | {column: 0.2})])
    text = rendered(summary_table(summary))
    cells = ["20.00±1.00*" if name == column else "–" for name in COLUMNS]
    assert line_of(text, "asha").split()[2:5] == cells
    assert "*" not in line_of(text, "sha")


def test_validation_error_and_a_lone_tuner_have_no_star() -> None:
    pair = rendered(summary_table(pd.DataFrame([row("sha"), row("asha", 0.2)])))
    assert line_of(pair, "sha").split()[1] == "10.00±1.00"
    assert "*" not in rendered(summary_table(pd.DataFrame([row("sha")])))


def test_one_seed_shows_errors_alone() -> None:
    text = rendered(summary_table(pd.DataFrame([row("sha", 0.1, NAN, seeds=1), row("asha", 0.2, NAN, seeds=1)])))
    assert "±" not in text
    assert "one seed" in text.splitlines()[0]
    assert text.count("with one seed nobody") == 1  # not once a reading


def test_title_and_note_name_the_seeds_and_both_readings() -> None:
    text = rendered(summary_table(pd.DataFrame([row("sha", max_rounds=27), row("asha", 0.9, max_rounds=27)])))
    flat = re.sub(r"\s+", " ", text)
    assert text.startswith("Errors in %, mean ± standard error over 3 seeds")
    assert "test: when all rounds are spent (equal spending)" in flat
    assert "test at 27 rounds: the chosen federation after 27 rounds of its own (equal length)" in flat


def test_faults_are_shown_when_there_are_any() -> None:
    clean = pd.DataFrame([row("sha"), row("asha", 0.9)])
    assert "dropped" not in rendered(summary_table(clean))
    faulty = pd.DataFrame([row("sha", dropped=1234, lost=2), row("asha", 0.9), row("fedex", 0.8, clipped=5)])
    flat = re.sub(r"\s+", " ", rendered(summary_table(faulty)))
    assert "left (dropouts): sha 1,234 dropped, 2 lost; fedex 5 clipped." in flat


def test_dropped_jobs_are_shown_when_there_are_any() -> None:
    flat = re.sub(r"\s+", " ", rendered(summary_table(pd.DataFrame([row("sha", dropped_jobs=1234), row("asha", 0.9)]))))
    assert "charged but not spent: sha 1,234." in flat


def test_a_lead_is_said_for_each_reading_with_its_noise() -> None:
    flat = re.sub(r"\s+", " ", rendered(summary_table(pd.DataFrame([row("sha", 0.1), row("asha", 0.105)]))))
    assert flat.count("sha leads asha by 0.50 points") == flat.count("not a difference") == 2
    clear = re.sub(r"\s+", " ", rendered(summary_table(pd.DataFrame([row("sha", 0.1), row("asha", 0.2)]))))
    assert clear.count("; their combined standard error over 3 seeds is 1.41.") == 2  # sqrt(1² + 1²)
    assert "not a difference" not in clear


def test_percent_and_duration() -> None:
    assert percent(0.1234, 0.005) == "12.34±0.50"
    assert percent(0.1234) == "12.34"
    assert percent(NAN, 0.1) == "–"
    assert duration(3 * 3600 + 2 * 60 + 0.6) == "3:02:01"
    assert duration(NAN) == "–"


@pytest.mark.parametrize("width", [80, 120])
def test_stats_are_shown_a_line_each(width: int) -> None:
    text = rendered(stats_table({"clients": 1000, "label_skew": 0.25, "skewness": NAN, "name": "mnist"}), width)
    lines = [line.split() for line in text.splitlines()]
    assert lines == [["clients", "1,000"], ["label", "skew", "0.250"], ["skewness", "–"], ["name", "mnist"]]


def test_choices_within_the_noise_are_said_in_one_line() -> None:
    rows = [row("sha", close=2), row("random", 0.9), row("asha", 0.9, close=1)]
    flat = re.sub(r"\s+", " ", rendered(summary_table(pd.DataFrame(rows))))
    assert "might as well have been chosen: sha in 2 of 3, asha in 1 of 3." in flat
    assert "as well" not in rendered(summary_table(pd.DataFrame([row("sha"), row("asha", 0.9)])))


def test_that_the_chosen_federation_had_fewer_rounds_is_said() -> None:
    flat = re.sub(r"\s+", " ", rendered(summary_table(pd.DataFrame([row("sha", short=2), row("asha", 0.9)]))))
    assert "Seeds whose chosen federation had fewer than 81 rounds: sha in 2 of 3." in flat
    assert "fewer" not in rendered(summary_table(pd.DataFrame([row("sha"), row("asha", 0.9)])))


def test_the_histogram_counts_every_client_once() -> None:
    sizes = np.random.default_rng(0).integers(3, 200, 1000)
    rows = [line.split() for line in rendered(size_histogram(sizes)).splitlines()[1:]]
    bounds = [[int(bound) for bound in row[0].split("–")] for row in rows]
    assert len(rows) == 10
    assert [int(row[1]) for row in rows] == [((sizes >= low) & (sizes <= high)).sum() for low, high in bounds]
    assert (bounds[0][0], bounds[-1][1]) == (sizes.min(), sizes.max())
    assert max(len(row[2]) for row in rows if len(row) > 2) == 30


def test_clients_of_one_size_are_one_bin() -> None:
    assert rendered(size_histogram(np.full(7, 60))).splitlines()[1].split() == ["60", "7", "█" * 30]


def test_what_each_search_chose_is_a_line():
    config = {"client": {"learning_rate": 0.012344, "batch_size": 32}, "server": {"learning_rate": 1.0}}
    studies = [(tuner, seed) for tuner in ("manual", "asha") for seed in (0, 1)]
    results = pd.DataFrame([{"tuner": tuner, "seed": seed, "config": json.dumps(config)} for tuner, seed in studies])
    results["theta"] = "[[1.0]]"
    space = {"client": {"learning_rate": {}, "batch_size": {}, "momentum": "fixed"}, "server": {}}
    chosen = "chose client.learning_rate=0.01234, client.batch_size=32"
    assert list(chosen_lines(results, space)) == [f"asha, seed {seed}, {chosen}" for seed in (0, 1)]


@pytest.mark.parametrize(
    ("theta", "end"),
    [
        ([[0.25, 0.25, 0.5]], "; theta gives it 0.50"),
        ([[0.75, 0.25], [0.5, 0.5]], "; theta gives it 0.38"),  # of a product, the product: 0.75 * 0.5
        ([[1 / 3, 1 / 3, 1 / 3]], ""),  # rsws ranks by errors, theta says nothing
        ([[0.0, 1.0]], ""),
    ],
)
def test_how_sure_theta_is_of_the_choice_is_said(theta: list[list[float]], end: str) -> None:
    studies = [{"tuner": name, "seed": 0, "config": "{}", "theta": json.dumps(theta)} for name in ("uniform", "fedex")]
    assert list(chosen_lines(pd.DataFrame(studies), {})) == [f"fedex, seed 0, chose {end}"]


def test_it_is_said_that_every_search_tried_the_fixed_values() -> None:
    results = pd.DataFrame({"tuner": ["fedex", "asha", "asha", "random+fedex"], "trial": [0, 0, 3, 1]})
    said = "Trial 0 of every search has the fixed [client] and [server] values; it was chosen in "
    assert fixed_first_line(results) == f"{said}1 of 3 studies"
    assert fixed_first_line(results[1:2]) == f"{said}1 of 1 study"
    assert fixed_first_line(results[:1]) is None


def test_the_name_of_a_tuner_steers_neither_the_terminal_nor_the_table() -> None:
    name = "\x1b[2J[red]a[/nothing]"
    text = rendered(summary_table(pd.DataFrame([row(name, 0.1, dropped_jobs=2), row("asha", 0.9)])), 120)
    assert line_of(text, r"\x1b[2J[red]a[/nothing]")
    assert text.count(r"\x1b[2J[red]a[/nothing]") > 1  # in the lines below the table too
    assert "\x1b" not in text
