"""Writes files and folders as a whole: after a crash or a power cut the old one is there or the complete new one.

A file is written under a temporary name that nobody can guess, then brought to the disk, then renamed. The rename is
brought to the disk too: a folder holds the names of its files, and is written as a file is.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedtune.errors import InputError
from fedtune.operating_system import sync

UNFINISHED = ".unfinished"  # the last part of a temporary name


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file to write to, under a temporary name. It then replaces `path`, and is on the disk.

    Raises OSError, which names `path`, if the file can't be written, as on a full disk.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
    try:
        temporary.touch(exist_ok=False)  # so it is no link to another file
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # after a failure: a file that was replaced is no longer there
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes the files that a process left in the folder when it ended within `replacing`."""
    for path in folder.glob(f"*{UNFINISHED}"):
        path.unlink()


def make_folder(folder: Path, *, exist_ok: bool = False) -> None:
    """Makes a folder, and the missing folders above it. Their names are on the disk then."""
    missing = [above for above in folder.parents if not above.exists()]
    folder.mkdir(parents=True, exist_ok=exist_ok)
    for made in [folder, *missing]:
        sync(made.parent)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, under a temporary name. It becomes `folder` when it is complete and on the disk.

    Raises InputError if no folder can be made there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder} must be a folder that can be made: {error}") from None
    try:
        complete = scratch / folder.name  # mkdtemp's own folder may be read by nobody else
        complete.mkdir()
        yield complete
        for path in [*complete.rglob("*"), complete]:
            sync(path)
        complete.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(scratch)
