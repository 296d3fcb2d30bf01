"""Every experiment can be repeated: its script runs at its smallest size, its settings are accepted."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fedtune.layers import resolve_settings

FOLDERS = sorted(path for path in (Path(__file__).parent.parent / "experiments").iterdir() if path.is_dir())
SCRIPTS = [path for path in (folder / "run.py" for folder in FOLDERS) if path.exists()]
SETTINGS = [path for path in (folder / "settings.toml" for folder in FOLDERS) if path.exists()]


def test_every_experiment_says_what_it_found_and_can_be_repeated():
    assert SCRIPTS
    assert SETTINGS
    for folder in FOLDERS:
        assert (folder / "README.md").exists()
        assert folder in {path.parent for path in SCRIPTS + SETTINGS}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda path: path.parent.name)
def test_the_settings_are_accepted(settings):
    assert resolve_settings(settings).total_rounds > 0


def test_the_experiments_search_what_their_data_set_ships():
    """Also if a file says at which value a search within one federation starts."""
    for settings in map(resolve_settings, SETTINGS):
        if settings.tuners != ["manual"]:
            assert settings.space == resolve_settings(settings.data["name"]).space


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_the_script_runs_at_its_smallest_size(script, tmp_path):
    """Into a folder of its own, with the columns of the results that are kept, and these stay as they are."""
    experiment = script.parent
    before = contents(experiment)
    done = subprocess.run([sys.executable, script, "--smallest"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "smallest" / experiment.name
    assert pd.read_csv(out / "results.csv").columns.equals(pd.read_csv(experiment / "results.csv").columns)
    figures = list(out.glob("figures/*.png"))
    assert bool(figures) == (experiment / "figures").exists()
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
    assert contents(experiment) == before


def contents(folder):
    """The bytes of the experiment's files, without what Python keeps of them."""
    return {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file() and path.suffix != ".pyc"}
