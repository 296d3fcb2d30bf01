"""What is measured, as results.csv keeps it, and the ratios of measurements that were taken in the same turn."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from engines import LIMIT, OURS, RIVALS

ROUND, START, MEMORY = "milliseconds a round", "seconds to the first round", "GiB"
FLUTE, DEMO = "seconds of FLUTE's job", "seconds of make demo"
GFLOP = "GFLOP a round"  # useful arithmetic, the same for all engines


class Measured(NamedTuple):
    """One measurement: a row of results.csv."""

    what: str
    model: str
    cohort_size: int
    engine: str
    repeat: int
    value: float


class Spread(NamedTuple):
    """Several repeats of a measurement, or of a ratio; NaN if something was not measured."""

    median: float
    least: float
    most: float


class Results:
    """All measurements of a run."""

    def __init__(self, rows: pd.DataFrame) -> None:
        keys = ["what", "model", "cohort_size", "repeat"]
        self._values = rows.pivot_table("value", keys, "engine", sort=False)

    def cases(self, what: str) -> list[tuple[str, int]]:
        """The models and cohort sizes with which this was measured."""
        index = self._values.index
        found = index[index.get_level_values("what") == what]
        return list(dict.fromkeys((model, size) for _, model, size, _ in found))

    def engines(self, what: str) -> list[str]:
        """The engines with which this was measured."""
        if not self.cases(what):
            return []
        return [str(name) for name in self._values.loc[what].dropna(axis=1, how="all").columns]

    def spread(self, what: str, model: str, cohort_size: int, engine: str) -> Spread:
        """The repeats of one measurement."""
        return _spread(self._of(what, model, cohort_size, engine))

    def ratio(self, what: str, model: str, cohort_size: int, engine: str, other: str) -> Spread:
        """How many times as much this engine's value is as the other's, each pair measured in the same turn."""
        case = what, model, cohort_size
        return _spread(self._of(*case, engine) / self._of(*case, other))

    def share_of_limit(self, model: str, cohort_size: int, engine: str) -> Spread:
        """The time that a round takes at the machine's limit, divided by the time that it takes the engine."""
        return self.ratio(ROUND, model, cohort_size, LIMIT, engine)

    def advantage(self, model: str, cohort_size: int, rival: str) -> Spread:
        """How many times as fast fedtune's pool is as the rival; the fastest of the rival's ways to run counts."""
        medians = {way: self.spread(ROUND, model, cohort_size, way).median for way in RIVALS[rival]}
        fastest = min(medians, key=lambda way: np.nan_to_num(medians[way], nan=np.inf))
        return self.ratio(ROUND, model, cohort_size, fastest, OURS)

    def _of(self, what: str, model: str, cohort_size: int, engine: str) -> pd.Series:
        """The values of the repeats, by repeat."""
        if engine not in self._values or (model, cohort_size) not in self.cases(what):
            return pd.Series(dtype=float)
        return self._values[engine].loc[what, model, cohort_size]


def _spread(values: pd.Series) -> Spread:
    return Spread(values.median(), values.min(), values.max())
