"""Files that a user gives: whatever is wrong with one is an InputError of one line.

What needs more than this machine's memory is not read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.errors import InputError
from fedtune.operating_system import memory


@contextmanager
def reading(path: Path, failure: str) -> Iterator[None]:
    """Turns every error of what reads the file into an InputError, "<failure>: <reason>".

    A damaged file, or one that was made to do harm, makes the libraries raise errors that have no class in common.
    """
    if not path.is_file():  # to open a named pipe would wait for ever
        kind = "a folder" if path.is_dir() else "something else" if path.exists() else "nothing"
        raise InputError(f"{failure}: it must be a file, got {kind}")
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{failure}: {' '.join(str(error).split()) or type(error).__name__}") from error


def check_memory(what: str, num_bytes: int) -> None:
    """Raises InputError if so many bytes are more than this machine's memory: a small file can hold so much, packed.

    Windows does not tell how much memory there is, but never gives more than it has: reading then ends with an error.
    """
    most = memory()
    if most is not None and num_bytes > most:
        raise InputError(f"{what} must fit into memory, {most / 1e9:,.1f} GB, got {num_bytes / 1e9:,.1f} GB")
