import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("folder", ["clients", "datasets", "tests", "experiments"])
def test_folders_of_the_root_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_import_datasets_from_the_root_gives_hugging_faces_package():
    code = "import datasets; assert hasattr(datasets, 'Dataset'), datasets.__path__"
    # -c puts the working directory first on the path, as `python -m` from the root does.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
