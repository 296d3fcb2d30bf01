"""A run folder read back, and the numbers that tables and figures show. Errors are fractions, lower is better."""

import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedtune.errors import InputError
from fedtune.simulation.records import FAULTS

ERRORS = (
    "validation_error",
    "test_error",
    "test_error_personalised",
    "test_error_personalised_argmax",
    "test_error_at_max_rounds",
)
CLOSE = ("runner_up", "lead", "lead_se")  # the second-best trial of a study, and how close it came
READINGS = {"test_error": "test error at the end", "test_error_at_max_rounds": "test error at {max_rounds} rounds"}


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run. Every frame is ordered by the settings' list of tuners, then by seed."""

    folder: Path
    settings: dict[str, Any]
    rounds: pd.DataFrame
    trials: pd.DataFrame
    results: pd.DataFrame
    timings: pd.DataFrame


def read_run(folder: str | Path) -> Run:
    """The run that lies in a folder; InputError if it is no run folder or the run has not ended."""
    folder = Path(folder)
    if not ((folder / "settings.toml").is_file() and (folder / "environment.json").is_file()):
        raise InputError(f"run must be a folder that holds settings.toml and environment.json, got {folder}")
    for name in ("rounds.parquet", "trials.parquet", "results.csv", "timings.csv"):
        if not (folder / name).is_file():
            raise InputError(f"run must be finished (`fedtune resume {folder}`), got {folder} without {name}")
    settings = tomllib.loads((folder / "settings.toml").read_text(encoding="utf-8"))
    frames = {
        "rounds": pd.read_parquet(folder / "rounds.parquet"),
        "trials": pd.read_parquet(folder / "trials.parquet"),
        "results": pd.read_csv(folder / "results.csv"),
        "timings": pd.read_csv(folder / "timings.csv"),
    }
    if missing := [column for column in CLOSE if column not in frames["results"]]:
        raise InputError(f"run must be of this version of fedtune, got {folder}: results.csv without {missing[0]}")
    done, planned = len(frames["results"]), len(settings["tuners"]) * settings["seeds"]
    if done < planned:
        raise InputError(f"run must be finished (`fedtune resume {folder}`), got {done} of {planned} studies")
    return Run(folder, settings, **{name: _ordered(frame, settings["tuners"]) for name, frame in frames.items()})


def _ordered(frame: pd.DataFrame, tuners: list[str]) -> pd.DataFrame:
    """The rows by tuner (as in the settings) and seed, otherwise in the order they had."""
    place = frame["tuner"].map({tuner: place for place, tuner in enumerate(tuners)})
    order = frame.assign(place=place).sort_values(["place", "seed"], kind="stable")
    return order.drop(columns="place").reset_index(drop=True)


def summary(results: pd.DataFrame, timings: pd.DataFrame) -> pd.DataFrame:
    """A row a tuner, in the order in which the tuners first occur in `results`.

    `seeds`, `max_rounds`; each of ERRORS as the mean over seeds, with its standard error as `<name>_se` (NaN with one
    seed); `rounds`, `client_updates`, `wall_seconds` as means over seeds; each of FAULTS and `dropped_jobs` as the sum
    over seeds; `close`, in how many seeds the best trial leads the second by no more than noise; `short`, in how many
    it had fewer than max_rounds. Where an error is NaN for one seed its mean is NaN: leaving that seed out would
    flatter the tuner.
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
            studies[["rounds", "client_updates", "wall_seconds"]].mean(),
            studies[[*FAULTS, "dropped_jobs", "close", "short"]].sum(),
        ],
        axis=1,
    ).reset_index()


def is_noise(lead: Any, standard_error: Any) -> Any:
    """Whether a lead is not larger than its standard error, of numbers or of columns; False where one is NaN."""
    return lead <= standard_error


def lead_line(summary: pd.DataFrame, reading: str = "test_error") -> str | None:
    """How far the best tuner leads the second, and whether that is more than noise; None where there is no second.

    `reading` is one of READINGS. The noise is their combined standard error, the root of the sum of squares; with one
    seed it is unknown, and that is said.
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
    """The test error of each study's incumbent wherever it changes: tuner, seed, spent, test_error.

    A point stands where the incumbent was evaluated, and where another trial became the incumbent (with its latest
    evaluation, once there is one).
    """
    points = [
        (tuner, seed, spent, error)
        for (tuner, seed), study in rounds.groupby(["tuner", "seed"], sort=False)
        for spent, error in _incumbent_points(study.sort_values("spent", kind="stable"))
    ]
    return pd.DataFrame(points, columns=["tuner", "seed", "spent", "test_error"])


def _incumbent_points(study: pd.DataFrame) -> Iterator[tuple[int, float]]:
    """(rounds spent, test error) of one study's incumbent; rows are in virtual order."""
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
    """Mean and mean ± standard error over seeds of step curves: tuner, spent, mean, low, high.

    A seed keeps its last value until its next point. Rows begin where every seed of `curve` has a value; with one seed
    low and high are NaN.
    """
    seeds = curve["seed"].unique()
    bands = []
    for tuner, points in curve.groupby("tuner", sort=False):
        by_seed = points.pivot(index="spent", columns="seed", values="test_error").reindex(columns=seeds)
        bands.append(_band(by_seed.ffill().dropna(), str(tuner)))
    return pd.concat(bands) if bands else pd.DataFrame(columns=["tuner", "spent", "mean", "low", "high"])


def entropy_curve(rounds: pd.DataFrame) -> pd.DataFrame:
    """Entropy of theta in nats by round of the final incumbent's federation: tuner, round, mean, low, high.

    Only tuners whose theta has an entropy, and only the rounds that every seed's federation has.
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
    """A tuner's mean, low and high over the columns (seeds), with the index (spent or round) as a column."""
    mean, standard_error = by_seed.mean(axis=1), by_seed.sem(axis=1)
    band = pd.DataFrame({"mean": mean, "low": mean - standard_error, "high": mean + standard_error}).reset_index()
    band.insert(0, "tuner", tuner)
    return band
