"""Checkpoints: the arrays of a federation's state in a safetensors file, whose metadata holds their checksum."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedtune.errors import InputError
from fedtune.files import replacing


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays; at every moment `path` holds the complete old checkpoint or the complete new one.

    Raises OSError if they can't be written, as on a full disk.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={"checksum": _checksum(contiguous)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays that were saved. Raises InputError if the file is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            checksum = (file.metadata() or {}).get("checksum")
    except (SafetensorError, OSError, TypeError, ValueError) as error:  # also of numbers that NumPy does not have
        raise InputError(f"checkpoint {path} is damaged: {error}") from None
    if checksum != _checksum(arrays):
        raise InputError(f"checkpoint {path} is damaged: its checksum does not fit")
    return arrays


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(arrays[name].data, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"
