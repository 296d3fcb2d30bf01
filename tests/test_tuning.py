import doctest
import subprocess
import sys

import fedtune.tuning


def test_every_public_name_is_there():
    assert all(hasattr(fedtune.tuning, name) for name in fedtune.tuning.__all__)


def test_the_module_names_every_public_name():
    words = fedtune.tuning.__doc__.replace(",", " ").split()
    assert [name for name in fedtune.tuning.__all__ if name not in words] == []


def test_the_example_runs():
    results = doctest.testmod(fedtune.tuning)
    assert results.attempted == fedtune.tuning.__doc__.count(">>>") > 0
    assert results.failed == 0


def test_importing_it_imports_nothing_heavy():
    code = "import sys, fedtune.tuning; print(*{'torch', 'scipy', 'pandas', 'flwr', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
