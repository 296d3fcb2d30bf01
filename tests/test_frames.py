"""Run folders read back and the numbers made of them."""

import csv
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from fedtune.errors import InputError
from fedtune.report.frames import (
    ERRORS,
    FILES,
    LATER_COLUMNS,
    NUMBERS,
    TEXTS,
    Run,
    curve_band,
    entropy_curve,
    incumbent_curve,
    lead_line,
    read_run,
    summary,
)
from fedtune.report.plots import plot_entropy, plot_incumbents
from fedtune.report.tables import summary_table
from fedtune.simulation.records import FAULTS

NAN = math.nan
OLD_RUN = Path(__file__).parent / "run_of_format_3"


def shown(run: Run) -> str:
    """The table of a run as one line of text."""
    console = Console(file=io.StringIO())
    console.print(summary_table(summary(run.results, run.timings)))
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def rounds_of(tuner: str, seed: int, rows: list[tuple[int, int, int, float]]) -> pd.DataFrame:
    """Rounds of a study from (spent, trial, incumbent, test_error)."""
    frame = pd.DataFrame(rows, columns=["spent", "trial", "incumbent", "test_error"])
    frame["round"] = frame.groupby("trial").cumcount() + 1
    return frame.assign(tuner=tuner, seed=seed, virtual_time=frame["spent"].astype(float), entropy=NAN)


def results_of(errors: dict[str, list[float]], max_rounds: int = 9, **counts: list[int] | list[float]) -> pd.DataFrame:
    """Results with the same error in all of ERRORS, a row for each tuner and seed."""
    rows = [
        {"tuner": tuner, "seed": seed, "max_rounds": max_rounds, **dict.fromkeys(ERRORS, error)}
        for tuner, values in errors.items()
        for seed, error in enumerate(values)
    ]
    counted = ("rounds", "total_rounds", "charged_rounds", "client_updates", "dropped_jobs", *FAULTS)
    zeros = {name: [0] * len(rows) for name in counted}
    zeros |= {name: [NAN] * len(rows) for name in ("lead", "lead_se")}
    zeros["rounds_of_trial"] = [max_rounds] * len(rows)
    return pd.DataFrame(rows).assign(**(zeros | counts))


def timings_of(results: pd.DataFrame, seconds: list[float]) -> pd.DataFrame:
    return results[["tuner", "seed"]].assign(wall_seconds=seconds)


def write_run(folder: Path, tuners: list[str], seeds: int, studies: list[tuple[str, int]]) -> None:
    """A run folder with two rounds a study, the second of which has a test error of a tenth of the seed."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.toml").write_text(f"tuners = {json.dumps(tuners)}\nseeds = {seeds}\n")
    (folder / "environment.json").write_text("{}")
    rounds = [rounds_of(tuner, seed, [(1, 0, -1, NAN), (2, 0, 0, seed / 10)]) for tuner, seed in studies]
    names = pd.DataFrame(studies, columns=["tuner", "seed"])
    results = names.assign(test_error=names["seed"] / 3, runner_up=-1, lead=NAN, lead_se=NAN)
    completed(pd.concat(rounds), "rounds").to_parquet(folder / "rounds.parquet")
    completed(names, "trials").to_parquet(folder / "trials.parquet")
    completed(results, "results").to_csv(folder / "results.csv", index=False)
    completed(names, "timings").to_csv(folder / "timings.csv", index=False)


def completed(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The frame with the columns that every run has."""
    columns = dict.fromkeys(NUMBERS[name], 0.0) | dict.fromkeys(TEXTS[name], "{}")
    return frame.assign(**{column: value for column, value in columns.items() if column not in frame})


def test_run_is_read_in_the_settings_order(tmp_path: Path) -> None:
    studies = [("asha", 1), ("asha", 0), ("manual", 0), ("manual", 1)]
    write_run(tmp_path, ["manual", "asha"], 2, studies)
    run = read_run(str(tmp_path))
    expected = [("manual", 0), ("manual", 1), ("asha", 0), ("asha", 1)]
    assert run.folder == tmp_path
    assert run.settings == {"tuners": ["manual", "asha"], "seeds": 2}
    for frame in (run.trials, run.results, run.timings):
        assert list(zip(frame["tuner"], frame["seed"], strict=True)) == expected
    assert list(zip(run.rounds["tuner"], run.rounds["seed"], strict=True)) == [
        study for study in expected for _ in "12"
    ]
    assert run.rounds["spent"].tolist() == [1, 2] * 4  # rows of a study keep their order
    assert run.results["test_error"].tolist() == [0 / 3, 1 / 3] * 2  # every bit survives


@pytest.mark.parametrize("name", ["settings.toml", "environment.json"])
def test_folder_that_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, ["manual"], 1, [("manual", 0)])
    read_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(
        InputError, match=r"^run must be a folder that holds settings.toml and environment.json, got .*$"
    ):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["rounds.parquet", "trials.parquet", "results.csv", "timings.csv"])
def test_run_without_a_frame_is_unfinished(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, ["manual"], 1, [("manual", 0)])
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"^run must be finished .*fedtune resume.* without {name}$"):
        read_run(tmp_path)


def refused(folder: Path, match: str) -> None:
    """The folder is refused in one line."""
    with pytest.raises(InputError, match=match) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES.values())
@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "text"])
def test_damaged_frame_is_one_line(tmp_path: Path, name: str, damage: str) -> None:
    write_run(tmp_path, ["manual"], 1, [("manual", 0)])
    path = tmp_path / name
    content = path.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "zeros": bytes(len(content)), "empty": b"", "text": b"no\ntable\n"}
    path.write_bytes(damaged[damage])
    refused(tmp_path, rf"{name}")


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)


@pytest.mark.parametrize("name", FILES)
def test_frame_with_other_columns_is_one_line(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, ["manual"], 1, [("manual", 0)])
    path = tmp_path / FILES[name]
    frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    for column in [*NUMBERS[name], *TEXTS[name]]:
        write_frame(frame.drop(columns=column), path)
        refused(tmp_path, rf"{FILES[name]} must have the column {column}, got none")
        wrong, kind = ("words", "numbers") if column in NUMBERS[name] else (0.5, "texts")
        write_frame(frame.assign(**{column: wrong}), path)
        refused(tmp_path, rf"{FILES[name]}: the column {column} must hold {kind}, got ")
    if path.suffix == ".parquet":
        write_frame(frame.assign(strange=[[1.0]] * len(frame)), path)
        refused(tmp_path, rf"{FILES[name]}: the column strange must hold numbers or texts, got ")
        write_frame(frame.assign(seed=pd.Series([b"0"] * len(frame))), path)
        refused(tmp_path, rf"{FILES[name]}: the column seed must hold numbers, got bytes")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tuners = [", "is not TOML"),
        ("", r"settings\.toml: tuners must be a list of names, got None"),
        ("tuners = [3]\nseeds = 1", r"settings\.toml: tuners must be a list of names, got \[3\]"),
        ('tuners = ["manual"]\nseeds = "1"', r"settings\.toml: seeds must be a whole number >= 1, got '1'"),
        ('tuners = ["manual"]\nseeds = true', r"settings\.toml: seeds must be a whole number >= 1, got True"),
        ('tuners = ["manual"]\nseeds = -1', r"settings\.toml: seeds must be a whole number >= 1, got -1"),
    ],
)
def test_damaged_settings_are_one_line(tmp_path: Path, text: str, match: str) -> None:
    write_run(tmp_path, ["manual"], 1, [("manual", 0)])
    (tmp_path / "settings.toml").write_text(text)
    refused(tmp_path, match)


def test_run_without_a_study_is_unfinished(tmp_path: Path) -> None:
    write_run(tmp_path, ["manual", "asha"], 2, [("manual", 0), ("manual", 1), ("asha", 0)])
    with pytest.raises(InputError, match=r"^run must be finished .* got 3 of 4 studies$"):
        read_run(tmp_path)


def test_summary_has_means_standard_errors_and_totals() -> None:
    results = results_of(
        {"sha": [0.1, 0.3], "asha": [0.2, 0.2]},
        rounds=[400, 404, 405, 405],
        client_updates=[10, 20, 30, 40],
        dropped=[1, 2, 0, 0],
        clipped=[0, 0, 3, 4],
        lost=[5, 0, 0, 6],
        dropped_jobs=[7, 8, 0, 9],
    )
    found = summary(results, timings_of(results, [1.0, 2.0, 30.0, 50.0])).set_index("tuner")
    assert found.index.tolist() == ["sha", "asha"]
    assert found["seeds"].tolist() == [2, 2]
    assert found["max_rounds"].tolist() == [9, 9]
    for error in ERRORS:
        # two values a and b have the standard error sqrt(((a-b)^2 / 2) / 2) = |a-b| / 2
        np.testing.assert_allclose(found[error], [(0.1 + 0.3) / 2, 0.2], atol=1e-15)
        np.testing.assert_allclose(found[f"{error}_se"], [abs(0.1 - 0.3) / 2, 0], atol=1e-15)
    assert found["rounds"].tolist() == [(400 + 404) / 2, 405]
    assert found["client_updates"].tolist() == [(10 + 20) / 2, (30 + 40) / 2]
    assert found["wall_seconds"].tolist() == [(1 + 2) / 2, (30 + 50) / 2]
    assert found[["dropped", "clipped", "lost"]].to_numpy().tolist() == [[1 + 2, 0, 5], [0, 3 + 4, 6]]
    assert found["dropped_jobs"].tolist() == [7 + 8, 9]


def test_summary_matches_timings_by_study_not_by_row() -> None:
    results = results_of({"sha": [0.1], "asha": [0.2]})
    timings = timings_of(results, [1.0, 2.0]).iloc[::-1]
    assert summary(results, timings)["wall_seconds"].tolist() == [1, 2]


def test_one_seed_has_no_standard_error() -> None:
    results = results_of({"sha": [0.1]})
    found = summary(results, timings_of(results, [1.0]))
    assert found["test_error"].tolist() == [0.1]
    assert math.isnan(found["test_error_se"].iloc[0])


def test_error_missing_for_a_seed_is_not_averaged_away() -> None:
    results = results_of({"sha": [0.1, NAN, 0.1], "asha": [0.2, 0.2, 0.2]})
    found = summary(results, timings_of(results, [1.0] * 6))
    assert found["test_error"].isna().tolist() == [True, False]
    assert found["test_error_se"].isna().tolist() == [True, False]


@pytest.mark.parametrize(("lead", "noisy"), [(4.9, True), (5.1, False)])
def test_lead_is_noise_up_to_the_combined_standard_error(lead: float, noisy: bool) -> None:
    best, second, last = [0.10 - 0.03, 0.10 + 0.03], [0.1 + lead / 100 - 0.04, 0.1 + lead / 100 + 0.04], [0.9, 0.9]
    results = results_of(
        {"last": last, "second": second, "best": best}
    )  # standard errors 0, 4 and 3 points: hypot is 5
    says = lead_line(summary(results, timings_of(results, [1.0] * 6)))
    assert says is not None
    assert says.startswith(f"best leads second by {lead:.2f} points in test error at the end")
    assert "5.00" in says
    assert ("not a difference" in says) == noisy


def test_each_reading_has_its_own_noise() -> None:
    results = results_of({"one": [0.1, 0.1], "two": [0.2, 0.2]}, max_rounds=81)
    results["test_error_at_max_rounds"] = [0.3, 0.5, 0.29, 0.49]
    found = summary(results, timings_of(results, [1.0] * 4))
    assert "one leads two by 10.00 points in test error at the end" in str(lead_line(found))
    says = lead_line(found, "test_error_at_max_rounds")
    assert says is not None
    assert says.startswith("two leads one by 1.00 points in test error at 81 rounds")


def test_with_one_seed_noise_is_unknown_and_one_tuner_leads_nobody() -> None:
    results = results_of({"one": [0.1], "two": [0.9]})
    found = summary(results, timings_of(results, [1.0] * 2))
    says = lead_line(found)
    assert says is not None
    assert "one seed" in says
    assert lead_line(found.iloc[:1]) is None


def test_equal_errors_are_no_lead() -> None:
    results = results_of({"one": [0.1], "two": [0.1]})
    says = lead_line(summary(results, timings_of(results, [1.0] * 2)))
    assert says == "one and two have the same test error at the end."


STUDY = [
    (1, 0, -1, 0.9),  # nobody is the incumbent yet
    (2, 0, 0, 0.8),  # becomes it where it was evaluated
    (3, 1, 0, 0.7),  # somebody else's evaluation
    (4, 1, 1, NAN),  # becomes it, was evaluated before
    (5, 0, 1, 0.6),
    (6, 1, 1, 0.5),  # evaluated again
    (7, 1, 1, NAN),
    (8, 2, 2, NAN),  # becomes it, never evaluated
    (9, 2, 2, 0.4),
    (10, 3, 0, 0.3),  # a trial becomes it in another one's row
]
CURVE = [(2, 0.8), (4, 0.7), (6, 0.5), (9, 0.4), (10, 0.6)]


def test_incumbent_curve_follows_the_incumbent() -> None:
    curve = incumbent_curve(rounds_of("asha", 3, STUDY))
    assert list(zip(curve["spent"], curve["test_error"], strict=True)) == CURVE
    assert set(curve["tuner"]) == {"asha"}
    assert set(curve["seed"]) == {3}


def test_incumbent_curve_goes_by_virtual_order_and_by_study() -> None:
    shuffled = rounds_of("asha", 0, STUDY).sample(frac=1, random_state=1)
    both = pd.concat([rounds_of("sha", 0, [(1, 0, 0, 0.1)]), shuffled, rounds_of("asha", 1, [(1, 7, 7, 0.2)])])
    curve = incumbent_curve(both)
    assert curve["tuner"].tolist() == ["sha"] + ["asha"] * (len(CURVE) + 1)
    assert curve["test_error"].tolist() == [0.1, *(error for _, error in CURVE), 0.2]


def test_no_incumbent_no_curve() -> None:
    curve = incumbent_curve(rounds_of("asha", 0, [(1, 0, -1, 0.9)]))
    assert curve.empty
    assert curve_band(curve).empty
    assert entropy_curve(rounds_of("asha", 0, [(1, 0, -1, 0.9)])).empty


def test_band_is_mean_and_standard_error_of_steps() -> None:
    points = [("sha", 0, 1, 0.9), ("sha", 0, 4, 0.5), ("sha", 1, 2, 0.7), ("sha", 1, 6, 0.1)]
    band = curve_band(pd.DataFrame(points, columns=["tuner", "seed", "spent", "test_error"]))
    # spent 1 is left out: seed 1 has no incumbent before 2
    pairs = [(0.9, 0.7), (0.5, 0.7), (0.5, 0.1)]
    assert band["spent"].tolist() == [2, 4, 6]
    np.testing.assert_allclose(band["mean"], [(a + b) / 2 for a, b in pairs])
    np.testing.assert_allclose(band["low"], [(a + b) / 2 - abs(a - b) / 2 for a, b in pairs])
    np.testing.assert_allclose(band["high"], [(a + b) / 2 + abs(a - b) / 2 for a, b in pairs])


def test_band_needs_every_seed_and_has_no_width_with_one() -> None:
    points = [("sha", 0, 1, 0.9), ("asha", 0, 1, 0.8), ("asha", 1, 1, 0.6)]
    curve = pd.DataFrame(points, columns=["tuner", "seed", "spent", "test_error"])
    assert curve_band(curve)["tuner"].tolist() == ["asha"]
    alone = curve_band(curve[curve["seed"] == 0])
    assert alone["mean"].tolist() == [0.9, 0.8]
    assert alone[["low", "high"]].isna().all(axis=None)


def test_entropy_is_that_of_the_final_incumbent() -> None:
    manual = rounds_of("manual", 0, [(1, 0, 0, 0.9)])
    first = rounds_of("asha+fedex", 0, [(1, 0, 0, 0.9), (2, 1, 0, 0.9), (3, 1, 1, 0.9)])
    first["entropy"] = [7.0, math.log(9), math.log(4)]  # trial 0 loses in the end
    second = rounds_of("asha+fedex", 1, [(1, 5, 5, 0.9), (2, 5, 5, 0.9), (3, 5, 5, 0.9)])
    second["entropy"] = [math.log(9), math.log(2), 0.0]
    found = entropy_curve(pd.concat([manual, first, second]))
    assert found["tuner"].tolist() == ["asha+fedex"] * 2  # the third round is only one seed's
    assert found["round"].tolist() == [1, 2]
    middle, half = (math.log(4) + math.log(2)) / 2, (math.log(4) - math.log(2)) / 2
    np.testing.assert_allclose(found["mean"], [math.log(9), middle])
    np.testing.assert_allclose(found["low"], [math.log(9), middle - half])
    np.testing.assert_allclose(found["high"], [math.log(9), middle + half])


def without_columns(run: Path, folder: Path, later: dict[str, dict[str, Any]]) -> Path:
    """A copy of a run, as a version of fedtune would have written it that did not have those columns."""
    shutil.copytree(run, folder)
    results = pd.read_csv(folder / "results.csv")
    results = results.drop(columns=[name for name in later["results"] if name in results])  # some came even later
    results.to_csv(folder / "results.csv", index=False)
    for name in ("rounds", "trials"):
        frame = pd.read_parquet(folder / f"{name}.parquet").drop(columns=list(later[name]))
        frame.to_parquet(folder / f"{name}.parquet")
    return folder


def test_a_run_folder_of_journal_format_3_is_read() -> None:
    run = read_run(OLD_RUN)
    written = {row["tuner"]: row for row in csv.DictReader((OLD_RUN / "results.csv").read_text().splitlines())}
    assert run.results["tuner"].tolist() == run.settings["tuners"] == ["fedex", "asha"]
    for row in run.results.to_dict("records"):
        for column in ("rounds", "left", "clipped", "runner_up", "test_error"):
            assert row[column] == float(written[row["tuner"]][column])
    assert len(run.rounds) == run.results["rounds"].sum()
    assert "Not recorded" not in shown(run)


def test_a_run_folder_without_the_columns_that_came_later_is_read(tmp_path: Path) -> None:
    """Its other columns are the same; what it did not record is NaN, and the table says so instead of showing 0."""
    new, old = read_run(OLD_RUN), read_run(without_columns(OLD_RUN, tmp_path / "run", LATER_COLUMNS))
    for name, later in LATER_COLUMNS.items():
        found, expected = getattr(old, name), getattr(new, name)
        assert set(found) == set(expected)
        kept = [column for column in expected if column not in later]
        pd.testing.assert_frame_equal(found[kept], expected[kept])
        for column in later:
            assert (found[column] == -1).all() if column == "runner_up" else found[column].isna().all()
    found = summary(old.results, old.timings)
    assert found[["late", "left", "dropped_jobs"]].isna().all(axis=None)
    assert found["clipped"].tolist() == new.results["clipped"].tolist()
    assert summary(new.results, new.timings)["close"].tolist() == [0, 1]
    assert found["close"].tolist() == [0, 0]  # unknown is no claim
    text = shown(old)
    assert "Not recorded by the version of fedtune that wrote this run: late, left, dropped_jobs." in text
    assert "fedex 1 clipped." in text
    assert "nan" not in text


def test_a_run_folder_without_some_of_the_later_columns_keeps_the_others(tmp_path: Path) -> None:
    later = {"results": dict.fromkeys(("runner_up", "lead", "lead_se")), "rounds": {}, "trials": {}}
    run = read_run(without_columns(OLD_RUN, tmp_path / "run", later))
    assert run.results["lead"].isna().all()
    assert run.results["left"].tolist() == read_run(OLD_RUN).results["left"].tolist()
    assert "Not recorded" not in shown(run)


def test_figures_are_drawn_of_a_run_folder_without_the_later_columns(tmp_path: Path) -> None:
    run = read_run(without_columns(OLD_RUN, tmp_path / "run", LATER_COLUMNS))
    assert plot_incumbents(run, tmp_path / "incumbents.png").stat().st_size > 0
    assert plot_entropy(run, tmp_path / "entropy.png") is not None


def test_summary_counts_the_seeds_whose_best_two_trials_are_close() -> None:
    results = results_of(
        {"asha": [0.1, 0.1, 0.1], "manual": [0.1, 0.1, 0.1]},
        lead=[0.01, 0.03, 0.02, NAN, NAN, NAN],
        lead_se=[0.02, 0.02, 0.02, NAN, NAN, NAN],
    )
    assert summary(results, timings_of(results, [1.0] * 6))["close"].tolist() == [2, 0]


def test_the_table_says_who_did_not_spend_the_budget_and_why(tmp_path: Path) -> None:
    spending = {
        "manual": (100, 100),
        "sha": (99, 100),  # within 1 %
        "asha": (92, 92),  # it had no more jobs
        "random": (81, 100),  # one job failed and was not tried again
        "bohb": (60, 90),
    }
    results = results_of(
        {tuner: [0.1] for tuner in spending},
        rounds=[trained for trained, _ in spending.values()],
        charged_rounds=[charged for _, charged in spending.values()],
        total_rounds=[100] * len(spending),
    )
    write_run(tmp_path, list(spending), 1, [(tuner, 0) for tuner in spending])
    completed(results, "results").to_csv(tmp_path / "results.csv", index=False)
    said = (
        "Not all tuners spent the whole budget: asha spent 92 % (it had no more jobs); random spent 81 % (its failed "
        "jobs were charged); bohb spent 60 % (it had no more jobs and its failed jobs were charged)."
    )
    assert said in shown(read_run(tmp_path))
    assert "whole budget" not in shown(read_run(OLD_RUN))  # it did not record it


def test_summary_counts_the_seeds_whose_best_trial_had_too_few_rounds() -> None:
    results = results_of({"sha": [0.1, 0.1, 0.1], "manual": [0.1, 0.1, 0.1]}, rounds_of_trial=[1, 9, 3, 9, 9, 27])
    assert summary(results, timings_of(results, [1.0] * 6))["short"].tolist() == [2, 0]
