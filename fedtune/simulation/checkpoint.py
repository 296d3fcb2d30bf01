"""Checkpoints: the arrays of a federation's state in a safetensors file, written under a temporary name and renamed."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedtune.errors import InputError


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays; at every moment `path` holds either the old checkpoint or the new one, whole.

    OSError where they cannot be written, as on a full disk.
    """
    temporary = path.with_suffix(".tmp")
    try:
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, temporary)
    except SafetensorError as error:
        raise OSError(f"checkpoint {path} cannot be written: {error}") from error
    os.replace(temporary, path)


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays that were saved. Raises InputError where the file is damaged."""
    try:
        arrays: dict[str, np.ndarray] = load_file(path)
    except SafetensorError as error:
        raise InputError(f"checkpoint {path} is damaged: {error}") from None
    return arrays
