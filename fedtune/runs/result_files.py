"""Writes the files of a finished run: rounds.parquet, trials.parquet, timings.csv and results.csv."""

from pathlib import Path
from typing import Any

import pandas as pd

from fedtune.files import replacing
from fedtune.runs.results import StudyResult
from fedtune.simulation.records import RECORD_COLUMNS

FILES = ("rounds.parquet", "trials.parquet", "timings.csv", "results.csv")  # in the order of writing

ROUND_COLUMNS = [
    "tuner",
    "seed",
    "trial",
    "round",
    "virtual_time",
    "spent",
    "incumbent",
    "score",
    *RECORD_COLUMNS,
]


def write_frames(folder: Path, results: list[StudyResult], timings: list[dict[str, Any]]) -> None:
    """Writes FILES. Only timings.csv holds real times; the other files are the same each time a run is repeated."""
    with replacing(folder / "rounds.parquet") as path:
        pd.DataFrame([row for result in results for row in result.rounds])[ROUND_COLUMNS].to_parquet(path)
    with replacing(folder / "trials.parquet") as path:
        pd.DataFrame([row for result in results for row in result.trials]).to_parquet(path)
    with replacing(folder / "timings.csv") as path:
        pd.DataFrame(timings).to_csv(path, index=False, lineterminator="\n")
    with replacing(folder / "results.csv") as path:
        pd.DataFrame([result.result for result in results]).to_csv(path, index=False, lineterminator="\n")
