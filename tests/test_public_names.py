"""What `import fedtune` offers, and what it costs."""

import importlib.metadata
import subprocess
import sys

import pytest

import fedtune


def test_import_needs_no_heavy_package():
    heavy = ("torch", "flwr", "pandas", "numpy", "pydantic", "rich", "typer")
    code = f"import fedtune, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", fedtune.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(fedtune, name)
    assert name == "__version__" or value.__doc__


def test_the_public_names_can_all_be_imported():
    code = "from fedtune import *; print(Run.__name__, Settings.__name__, callable(compare))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["Run", "Settings", "True"], done.stderr


def test_the_version_is_the_installed_one():
    assert fedtune.__version__ == importlib.metadata.version("fedtune")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'fedtune' has no attribute 'comparee'$"):
        _ = fedtune.comparee
