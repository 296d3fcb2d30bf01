"""A run folder's safety: one process at a time goes on with a run, and no file of it is ever half written."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedtune.errors import InputError
from fedtune.runs.environment import environment
from fedtune.settings import Settings, write_settings


def settings_path(folder: Path) -> Path:
    """Where a run keeps its settings. Raises InputError where the folder is no run's."""
    path = folder / "settings.toml"
    if not path.is_file():
        raise InputError(f"{folder} is no run folder: it has no settings.toml")
    return path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from running what is in the folder. Raises InputError where one does.

    The lock goes with the process, however that ends.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"run must be gone on with by one process at a time, got {folder}, in use") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write the file: at every moment `path` holds the old one or the new one, whole.

    OSError names the file where that can't be written, as on a full disk.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def claim_folder(folder: Path, settings: Settings, *, force: bool) -> None:
    """Makes a run folder with its settings; never overwrites one without `force`, nor anything that is no run."""
    if folder.exists():
        if not force:
            raise InputError(f"--out {folder} exists; choose another, or give --force to overwrite it")
        if not (folder / "settings.toml").is_file():
            raise InputError(f"--out {folder} exists and is not a run folder; it is not overwritten even with --force")
        with locked(folder):
            shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out must be a folder that can be made, got {folder}: {error.strerror}") from None
    with replacing(folder / "environment.json") as path:
        path.write_text(json.dumps(environment(), indent=2) + "\n")
    with replacing(folder / "settings.toml") as path:
        path.write_text(write_settings(settings))
