"""The names that fedtune.client gives to authors of client programs."""

import subprocess
import sys

import pytest

import fedtune.client


def test_all_public_names_are_there():
    for name in fedtune.client.__all__:
        assert getattr(fedtune.client, name) is not None
    public = [fedtune.client.ClientProgram, fedtune.client.Examples, fedtune.client.FlatModel]
    assert [found.__name__ for found in public] == ["ClientProgram", "Examples", "FlatModel"]


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"^module 'fedtune\.client' has no attribute 'Nothing'$"):
        fedtune.client.Nothing  # noqa: B018


@pytest.mark.parametrize("module", ["fedtune.client", "fedtune.client.program", "fedtune.plugins"])
def test_looking_for_a_client_program_imports_no_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
