"""Measures the batched executor on a GPU; see README.md. This file finds what the measurements need, and starts them.

It imports nothing but Python's own modules, so that it can say what is missing on a machine that has little.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
WHEELS = FOLDER / "wheels"
NEEDED = ("torch", "numpy", "jaxtyping", "pydantic")
MODELS, SIZES = ("logistic", "mlp", "cnn", "lstm"), (10, 100, 1_000)
SMALLEST = {
    "models": ["logistic", "lstm"],
    "clients": [2, 3],
    "device": "cpu",
    "minutes": 0.25,
    "out": Path("runs/smallest/gpu"),
}


def add_wheels(folder: Path) -> None:
    """Makes what the wheels hold importable, after everything that is installed; `folder` gets their contents."""
    for wheel in sorted(WHEELS.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    sys.path.append(str(folder))


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--clients", nargs="+", type=int, default=SIZES, help="numbers of clients a round")
    parser.add_argument("--device", default="cuda", help="cpu tries the script, slowly (default cuda)")
    parser.add_argument("--minutes", type=float, default=9.5, help="what takes longer is left out (default 9.5)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results.csv and profile.txt")
    parser.add_argument("--smallest", action="store_true", help="run in seconds, on the CPU, into runs/smallest")
    if parser.parse_args().smallest:
        parser.set_defaults(**SMALLEST)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.path[:0] = [str(ROOT), str(ROOT / "clients"), str(FOLDER)]  # fedtune itself need not be installed
        add_wheels(Path(folder))
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            sys.exit(f"not installed and not in {WHEELS}: {', '.join(missing)}; see {FOLDER / 'README.md'}")
        import measure

        measure.main(arguments, deadline=started + 60 * arguments.minutes)


if __name__ == "__main__":
    main()
