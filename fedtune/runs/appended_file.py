"""The file of a journal: lines are added at its end, and nobody else may touch it meanwhile."""

import os
from pathlib import Path

from fedtune.errors import InputError
from fedtune.operating_system import open_to_append, sync


class AppendedFile:
    """A file whose first `size` bytes are kept, open to append to. The kept bytes and the file's name are on the disk.

    What is appended outlives the process at once. It outlives a power cut after the next `sync`.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._descriptor = open_to_append(path)
        os.ftruncate(self._descriptor, size)
        self.sync()
        sync(path.parent)

    def append(self, data: bytes) -> None:
        """Writes at the end. Raises InputError if the file was deleted, replaced or changed since it was opened.

        Raises OSError, which names the file, if it can't be written, as on a full disk.
        """
        self._check_that_nobody_touched_it()
        self._size += len(data)
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise OSError(f"{self._path} cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Brings everything that was appended to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def _check_that_nobody_touched_it(self) -> None:
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            raise self._touched("none") from None
        if not os.path.samestat(there, os.fstat(self._descriptor)):
            raise self._touched("another file in its place")
        if there.st_size != self._size:
            raise self._touched(f"{there.st_size:,} bytes instead of {self._size:,}")

    def _touched(self, found: str) -> InputError:
        return InputError(
            f"{self._path} must stay as it is while the run goes on, got {found}: the run stops. Without this file a "
            "resumed run computes the study again from its start"
        )
