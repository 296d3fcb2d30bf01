"""Makes the virtual environments of the other engines: `python experiments/engine_speed/peers.py`."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / ".venv"
TORCH = "torch==2.13.0"  # installed first: as a dependency it would be a CUDA build of several gigabytes
PACKAGES = {
    "flower": ["flwr[simulation]>=1.38,<1.43"],
    "pfl": ["pfl==0.6.0"],
    "fluke": ["fluke-fl==0.8.1"],
}
OURS = ["jaxtyping>=0.3"]  # fedtune's models need only this, torch and NumPy


def python_of(peer: str) -> Path:
    """The peer's interpreter."""
    return FOLDER / peer / "bin" / "python"


def main() -> None:
    for peer, packages in PACKAGES.items():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / peer], check=True)
        for wanted in ([TORCH], [TORCH, *packages, *OURS]):
            subprocess.run([python_of(peer), "-m", "pip", "install", "--quiet", *wanted], check=True)
        print(f"{peer} is ready in {FOLDER / peer}")


if __name__ == "__main__":
    main()
