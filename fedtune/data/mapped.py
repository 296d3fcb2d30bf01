"""Arrays that are mapped from a file into memory, so that only the parts that are used are read."""

import mmap
from typing import Any, NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where an array lies in a file."""

    path: str
    dtype: np.dtype[Any]
    offset: int  # in bytes
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes, none below 0

    def map(self) -> np.ndarray:
        """The array, mapped; it can't be written to."""
        size = sum((count - 1) * step for count, step in zip(self.shape, self.strides, strict=True))
        buffer = np.memmap(self.path, np.uint8, "r", self.offset, (size + self.dtype.itemsize,))
        return np.ndarray(self.shape, self.dtype, buffer, strides=self.strides)


def place_of(array: np.ndarray) -> Place | None:
    """Where the array lies, if it is a mapped file or a view of one; None for every other array."""
    # The array of the whole file is the last base of a view.
    whole: Any = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    in_file = isinstance(whole, np.memmap) and isinstance(whole.base, mmap.mmap) and whole.filename is not None
    if not in_file or whole.mode == "c" or array.size == 0 or min(array.strides, default=0) < 0:
        return None
    offset = whole.offset + array.ctypes.data - whole.ctypes.data
    return Place(str(whole.filename), array.dtype, offset, array.shape, array.strides)
