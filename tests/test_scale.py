"""The tables of experiments/scale; the script itself runs in test_experiments.py."""

import importlib.util

import pandas as pd
import pytest
from experiment_script import script_path


@pytest.fixture(scope="module")
def tables():
    place = script_path("scale").with_name("tables.py")
    specification = importlib.util.spec_from_file_location("scale_tables", place)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_engines_are_compared_within_a_repeat(tables):
    """The medians alone would give 2 / 6, a third."""
    rounds = {"compiled": [1.0, 2.0, 4.0], "torch": [2.0, 6.0, 8.0], "d9d27ba": [4.0, 8.0, 16.0]}
    rows = [
        {"cohort": 1000, "population": 1000, "engine": engine, "repeat": repeat, "round_median": seconds}
        for engine, of_repeats in rounds.items()
        for repeat, seconds in enumerate(of_repeats)
    ]
    assert tables.engine_table(pd.DataFrame(rows)).splitlines()[2:] == [
        "| 1,000 clients, compiled against d9d27ba | 0.25 (0.25–0.25); target at most a third: met |",
        "| 1,000 clients, compiled against torch | 0.50 (0.33–0.50); target at most a third: **missed** |",
    ]


def test_a_tenth_of_the_search_is_a_line(tables):
    row = {
        "part": "1",
        "trials": 4000,
        "rounds": 2000,
        "seconds": 5.0,
        "own_memory": 12.4,
        "files": 1200,
        "megabytes": 3,
    }
    line = tables.trial_table(pd.DataFrame([row])).splitlines()[2]
    assert line == "| 1 | 4,000 | 2,000 | 2.50 | 12 | 1,200 | 3.0 |"
