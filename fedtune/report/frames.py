"""A finished run folder, read back, and the numbers that tables and figures show.

Errors are fractions; lower is better.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedtune.data.formats.tables import read_columns
from fedtune.errors import InputError
from fedtune.settings_text import read_settings
from fedtune.simulation.records import FAULTS, RECORD_COLUMNS

ERRORS = (
    "validation_error",
    "test_error",
    "test_error_personalised",
    "test_error_personalised_argmax",
    "test_error_at_max_rounds",
)
READINGS = {
    "test_error": "test error at the end",
    "test_error_at_max_rounds": "test error at {max_rounds} rounds",
}
FILES = {"rounds": "rounds.parquet", "trials": "trials.parquet", "results": "results.csv", "timings": "timings.csv"}
# Columns that older versions of fedtune did not write, and the value that says so.
LATER_COLUMNS = {
    "results": {
        "total_rounds": math.nan,
        "charged_rounds": math.nan,
        "dropped_jobs": math.nan,
        "wasted_rounds": math.nan,
        "late": math.nan,
        "left": math.nan,
        "validation_error_se": math.nan,
        "runner_up": -1,
        "lead": math.nan,
        "lead_se": math.nan,
    },
    "rounds": {
        "asked": math.nan,
        "late": math.nan,
        "left": math.nan,
        "unavailable": math.nan,
        "validation_error_se": math.nan,
    },
    "trials": {"score_se": math.nan},
    "timings": {},
}
# The columns that every version wrote.
NUMBERS = {
    "rounds": (
        "seed",
        "trial",
        "round",
        "virtual_time",
        "spent",
        "incumbent",
        "score",
        *(column for column in RECORD_COLUMNS if column not in LATER_COLUMNS["rounds"]),
    ),
    "trials": ("seed", "trial", "rounds", "score", "test_error"),
    "results": (
        "seed",
        "trials",
        "trial",
        "max_rounds",
        "virtual_time",
        "rounds",
        "rounds_of_trial",
        "client_updates",
        "bytes",
        *(fault for fault in FAULTS if fault not in LATER_COLUMNS["results"]),
        *ERRORS,
    ),
    "timings": ("seed", "wall_seconds"),
}
TEXTS = {
    "rounds": ("tuner",),
    "trials": ("tuner", "config"),
    "results": ("tuner", "config", "theta", "pool"),
    "timings": ("tuner",),
}


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its settings, and four tables.

    `results` and `timings` have a row for each tuner and seed, `trials` a row for each trial, `rounds` a row for each
    round of a trial. Every table is ordered by the settings' list of tuners, then by seed. A column that the version of
    fedtune that wrote the run did not have holds NaN (`runner_up`: -1).
    """

    folder: Path
    settings: dict[str, Any]
    rounds: pd.DataFrame
    trials: pd.DataFrame
    results: pd.DataFrame
    timings: pd.DataFrame


def read_run(folder: str | Path) -> Run:
    """The finished run in a folder, which any version of fedtune may have written.

    Raises InputError if the folder is no run folder or the run has not finished.
    """
    folder = Path(folder)
    if not ((folder / "settings.toml").is_file() and (folder / "environment.json").is_file()):
        raise InputError(f"run must be a folder that holds settings.toml and environment.json, got {folder}")
    for name in FILES.values():
        if not (folder / name).is_file():
            raise InputError(f"run must be finished (`fedtune resume {folder}`), got {folder} without {name}")
    settings = read_settings(folder / "settings.toml")
    _check_plan(folder / "settings.toml", settings)
    frames = {
        name: read_columns(folder / file, numbers=NUMBERS[name], texts=TEXTS[name]) for name, file in FILES.items()
    }
    done, planned = len(frames["results"]), len(settings["tuners"]) * settings["seeds"]
    if done < planned:
        raise InputError(f"run must be finished (`fedtune resume {folder}`), got {done} of {planned} studies")
    for name, columns in LATER_COLUMNS.items():
        frames[name] = frames[name].assign(**{column: columns[column] for column in columns.keys() - frames[name]})
    return Run(folder, settings, **{name: _ordered(frame, settings["tuners"]) for name, frame in frames.items()})


def _check_plan(path: Path, settings: dict[str, Any]) -> None:
    """Raises InputError unless the settings say which studies the run has."""
    tuners, seeds = settings.get("tuners"), settings.get("seeds")
    if not isinstance(tuners, list) or not all(isinstance(tuner, str) for tuner in tuners):
        raise InputError(f"{path}: tuners must be a list of names, got {tuners!r:.40}")
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise InputError(f"{path}: seeds must be a whole number >= 1, got {seeds!r:.40}")


def _ordered(frame: pd.DataFrame, tuners: list[str]) -> pd.DataFrame:
    """The rows, sorted by tuner (in the order of the settings) and seed; rows of a study keep their order."""
    place = frame["tuner"].map({tuner: place for place, tuner in enumerate(tuners)})
    order = frame.assign(place=place).sort_values(["place", "seed"], kind="stable")
    return order.drop(columns="place").reset_index(drop=True)


def summary(results: pd.DataFrame, timings: pd.DataFrame) -> pd.DataFrame:
    """A row for each tuner, in the order in which the tuners first occur in `results`.

    The columns are:

    - `seeds`, `max_rounds`;
    - each of ERRORS, as the mean over seeds, and `<name>_se`, its standard error (NaN with one seed). If an error is
      NaN for one seed, the mean is NaN, because leaving that seed out would flatter the tuner;
    - `rounds`, `total_rounds`, `charged_rounds`, `client_updates`, `wall_seconds`, as means over seeds;
    - each of FAULTS and `dropped_jobs`, as the sum over seeds; NaN if the run did not record them;
    - `close`: in how many seeds the best trial leads the second-best trial by no more than noise;
    - `short`: in how many seeds the best trial had fewer than `max_rounds` rounds.
    """
    results = results.assign(
        close=is_noise(results["lead"], results["lead_se"]), short=results["rounds_of_trial"] < results["max_rounds"]
    )
    studies = results.merge(timings, on=["tuner", "seed"], how="left").groupby("tuner", sort=False)
    errors = studies[list(ERRORS)]
    complete = errors.count().eq(studies.size(), axis=0)
    means, standard_errors = errors.mean().where(complete), errors.sem().where(complete).add_suffix("_se")
    paired = [column for error in ERRORS for column in (error, f"{error}_se")]
    return pd.concat(
        [
            studies.size().rename("seeds"),
            studies["max_rounds"].first(),
            pd.concat([means, standard_errors], axis=1)[paired],
            studies[["rounds", "total_rounds", "charged_rounds", "client_updates", "wall_seconds"]].mean(),
            studies[[*FAULTS, "dropped_jobs", "close", "short"]].sum(min_count=1),
        ],
        axis=1,
    ).reset_index()


def failed_studies(run: Run) -> list[tuple[str, int]]:
    """The tuner and seed of each study in which every trial failed.

    A trial failed if its score is not finite, or if in none of its rounds an update could be used.
    """
    rounds = run.rounds
    used = rounds[rounds["cohort"] > rounds["lost"] + rounds["dropped"]]
    trained = pd.MultiIndex.from_frame(used[["tuner", "seed", "trial"]])
    trials = pd.MultiIndex.from_frame(run.trials[["tuner", "seed", "trial"]])
    good = run.trials[np.isfinite(run.trials["score"]) & trials.isin(trained)]
    successful = set(zip(good["tuner"], good["seed"], strict=True))
    return [study for study in zip(run.results["tuner"], run.results["seed"], strict=True) if study not in successful]


def is_noise(lead: Any, standard_error: Any) -> Any:
    """Whether a lead is at most its standard error, for numbers or for columns; False if one of the two is NaN."""
    return lead <= standard_error


def lead_line(summary: pd.DataFrame, reading: str = "test_error") -> str | None:
    """A sentence: how far the best tuner leads the second, and whether that is more than noise. None without a second.

    `reading` is one of READINGS. The noise is the combined standard error of the two tuners, the root of the sum of
    squares. With one seed it is unknown, and the sentence says so.
    """
    ranked = summary.dropna(subset=[reading]).sort_values(reading, kind="stable")
    if len(ranked) < 2:
        return None
    best, second = ranked.iloc[0], ranked.iloc[1]
    lead = second[reading] - best[reading]
    noise = math.hypot(best[f"{reading}_se"], second[f"{reading}_se"])
    where = READINGS[reading].format(max_rounds=best["max_rounds"])
    if lead == 0:
        return f"{best['tuner']} and {second['tuner']} have the same {where}."
    says = f"{best['tuner']} leads {second['tuner']} by {100 * lead:.2f} points in {where}"
    if math.isnan(noise):
        return f"{says}; with one seed nobody can tell whether that is noise."
    if is_noise(lead, noise):
        return f"{says}, within their combined standard error of {100 * noise:.2f}: not a difference."
    return f"{says}; their combined standard error over {best['seeds']} seeds is {100 * noise:.2f}."


def incumbent_curve(rounds: pd.DataFrame) -> pd.DataFrame:
    """The test error of each study's incumbent, at each change: tuner, seed, spent, test_error.

    There is a point when the incumbent is evaluated, and a point when another trial becomes the incumbent, with that
    trial's latest evaluation (or later, with its first evaluation).
    """
    points = [
        (tuner, seed, spent, error)
        for (tuner, seed), study in rounds.groupby(["tuner", "seed"], sort=False)
        for spent, error in _incumbent_points(study.sort_values("spent", kind="stable"))
    ]
    return pd.DataFrame(points, columns=["tuner", "seed", "spent", "test_error"])


def _incumbent_points(study: pd.DataFrame) -> Iterator[tuple[int, float]]:
    """(rounds spent, test error) of one study's incumbent; the rows are in order of virtual time."""
    latest: dict[int, float] = {}
    previous = -1
    columns = (study[name].tolist() for name in ("spent", "trial", "incumbent", "test_error"))
    for spent, trial, incumbent, error in zip(*columns, strict=True):
        if not math.isnan(error):
            latest[trial] = error
        evaluated = trial == incumbent and not math.isnan(error)
        if incumbent in latest and (evaluated or incumbent != previous):
            yield spent, latest[incumbent]
        previous = incumbent


def curve_band(curve: pd.DataFrame) -> pd.DataFrame:
    """The mean of step curves over seeds, and the mean ± its standard error: tuner, spent, mean, low, high.

    A seed keeps its last value until its next point. The first row of a tuner is at the first `spent` for which every
    seed of `curve` has a value. With one seed, low and high are NaN.
    """
    seeds = curve["seed"].unique()
    bands = []
    for tuner, points in curve.groupby("tuner", sort=False):
        by_seed = points.pivot(index="spent", columns="seed", values="test_error").reindex(columns=seeds)
        bands.append(_band(by_seed.ffill().dropna(), str(tuner)))
    return pd.concat(bands) if bands else pd.DataFrame(columns=["tuner", "spent", "mean", "low", "high"])


def entropy_curve(rounds: pd.DataFrame) -> pd.DataFrame:
    """The entropy of theta in the final incumbent's federation, in nats: tuner, round, mean, low, high.

    It holds only tuners that have a theta, and only rounds that every seed's federation has.
    """
    last = rounds.sort_values("spent", kind="stable").groupby(["tuner", "seed"], sort=False)["incumbent"].last()
    chosen = rounds.merge(last.rename("chosen").reset_index(), on=["tuner", "seed"])
    chosen = chosen[(chosen["trial"] == chosen["chosen"]) & chosen["entropy"].notna()]
    bands = []
    for tuner, points in chosen.groupby("tuner", sort=False):
        by_seed = points.pivot(index="round", columns="seed", values="entropy")
        bands.append(_band(by_seed.dropna(), str(tuner)))
    return pd.concat(bands) if bands else pd.DataFrame(columns=["tuner", "round", "mean", "low", "high"])


def _band(by_seed: pd.DataFrame, tuner: str) -> pd.DataFrame:
    """A tuner's mean over the columns (seeds), low and high; the index (spent or round) becomes a column."""
    mean, standard_error = by_seed.mean(axis=1), by_seed.sem(axis=1)
    band = pd.DataFrame({"mean": mean, "low": mean - standard_error, "high": mean + standard_error}).reset_index()
    band.insert(0, "tuner", tuner)
    return band
