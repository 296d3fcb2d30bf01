"""Checkpoints: the arrays of a federation's state in a safetensors file, written under a temporary name and renamed."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays; at every moment `path` holds either the old checkpoint or the new one, whole."""
    temporary = path.with_suffix(".tmp")
    save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, temporary)
    os.replace(temporary, path)


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays that were saved."""
    arrays: dict[str, np.ndarray] = load_file(path)
    return arrays
