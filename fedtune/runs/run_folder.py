"""Makes a run folder, and locks it for one process."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedtune.errors import InputError
from fedtune.files import UNFINISHED, make_folder, replacing
from fedtune.operating_system import FolderLock, means_no_locks
from fedtune.runs.environment import write_environment
from fedtune.settings import Settings
from fedtune.settings_text import write_settings


def settings_path(folder: Path) -> Path:
    """The file with the settings of a run. Raises InputError if the folder is no run folder."""
    path = folder / "settings.toml"
    if not path.is_file():
        raise InputError(f"{folder} is no run folder: it has no settings.toml")
    return path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes away from the run. Raises InputError if another process is using the folder.

    The lock ends with the process, however the process ends.
    """
    lock = FolderLock(folder)
    try:
        try:
            free = lock.take()
        except OSError as error:
            if not means_no_locks(error):
                raise
            raise InputError(
                f"run folder {folder} must be on a file system that can lock a folder (flock), got {error.strerror}"
            ) from None
        if not free:
            raise InputError(f"another process is using run folder {folder}")
        yield
    finally:
        lock.release()


def claim_folder(folder: Path, settings: Settings, *, force: bool) -> None:
    """Makes a run folder with its settings and environment. With `force` an older run there is deleted first.

    Raises InputError if the folder exists and `force` is not given, or if it holds something else than a run. A process
    that ends in here leaves a folder that `force` still deletes.
    """
    if folder.exists():
        if not force:
            raise InputError(f"--out {folder} exists; choose another, or give --force to overwrite it")
        if not _may_be_deleted(folder):
            raise InputError(f"--out {folder} exists and is not a run folder; it is not overwritten even with --force")
        with locked(folder):
            _remove_run(folder)
    try:
        make_folder(folder)
    except OSError as error:
        raise InputError(f"--out must be a folder that can be made, got {folder}: {error.strerror}") from None
    try:
        with locked(folder):
            write_environment(folder)
            with replacing(folder / "settings.toml") as path:
                path.write_text(write_settings(settings), encoding="utf-8", newline="\n")
    except InputError:  # there are no locks here
        folder.rmdir()
        raise


def _may_be_deleted(folder: Path) -> bool:
    """Whether the folder has the settings of a run, or no more than it has before they are written."""
    if not folder.is_dir():
        return False
    return (folder / "settings.toml").is_file() or all(
        path.name == "environment.json" or path.name.endswith(UNFINISHED) for path in folder.iterdir()
    )


def _remove_run(folder: Path) -> None:
    """Removes a run folder, its settings last: until then it is a run folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "settings.toml":
            path.unlink()
    shutil.rmtree(folder)
