"""The scripts under experiments/, as modules for tests."""

import importlib.util
from pathlib import Path


def script_path(name):
    """Where the script of the experiment of that name is."""
    return Path(__file__).parent.parent / "experiments" / name / "run.py"


def load_script(name):
    """The script as a module; its `main` does not run."""
    specification = importlib.util.spec_from_file_location(name, script_path(name))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
