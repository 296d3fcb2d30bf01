"""What differs from one operating system to another; all other modules work the same on each.

Linux and macOS have everything that fedtune uses. Windows has no forkserver, so a run has no worker processes there: it
trains its clients in its own process, with the same results. Windows can't open a folder either, so a lock needs a file
there, and the names of a folder's files can't be brought to the disk by a call.
"""

import contextlib
import errno
import os
import signal
import sys
import tempfile
from pathlib import Path

OPENS_FOLDERS = hasattr(os, "O_DIRECTORY")
NO_WORKERS = "worker processes are started by a forkserver, which this system does not have"
# The signals that stop a run: to end, the terminal was closed, and Ctrl-Break on Windows. Ctrl-C is not among them.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
# Windows would end lines in its own way without O_BINARY, and has no O_NOFOLLOW.
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
# How the name of a library in machine code ends.
LIBRARY_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
WITHOUT_LOCKS = ("ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS")  # how a file system says that it has none


def has_workers() -> bool:
    """Whether a run can have worker processes. If not, no module of the pool can be imported."""
    import multiprocessing

    return "forkserver" in multiprocessing.get_all_start_methods()


def num_cores() -> int:
    """How many cores this process may run on, or how many the machine has if the system does not tell more."""
    if hasattr(os, "sched_getaffinity"):
        cores: set[int] = os.sched_getaffinity(0)
        return len(cores)
    return os.cpu_count() or 1


def memory() -> int | None:
    """How many bytes of memory the machine has; None if the system does not tell."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def open_to_append(path: Path) -> int:
    """The descriptor of a file to append bytes to. It is made if it is missing. A link is not followed if possible."""
    return os.open(path, APPEND, 0o666)


def anonymous_file() -> int:
    """The descriptor of an empty file without a name, which is gone when its last descriptor and map are gone."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedtune")
    with tempfile.TemporaryFile() as file:  # if there is no memfd, an unlinked temporary file does the same
        return os.dup(file.fileno())


def sync(path: Path) -> None:
    """Brings the content of a file, or the names of a folder's files, to the disk. Returns when it is there.

    If the system can't open a folder, it alone decides when the names of the folder's files come to the disk.
    """
    folder = path.is_dir()
    if folder and not OPENS_FOLDERS:
        return
    # Windows brings only files that may be written to the disk.
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderLock:
    """A lock that one process can have on a folder. It ends with the process, however the process ends.

    The folder itself is locked. If the system can't open a folder, the lock is on an empty file `.NAME.lock` beside the
    folder. The file of a process that was killed may stay there: it locks nothing, and the next lock removes it.
    """

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()
        self._path = folder if OPENS_FOLDERS else folder.with_name(f".{folder.name}.lock")
        self._descriptor = os.open(self._path, os.O_RDONLY if OPENS_FOLDERS else os.O_RDWR | os.O_CREAT)
        self._taken = False

    def take(self) -> bool:
        """Whether the lock was free; this process has it then. Raises OSError if the file system has no locks."""
        from filelock import lock_descriptor

        self._taken = lock_descriptor(self._descriptor, blocking=False)
        return self._taken

    def release(self) -> None:
        """Gives the lock back if this process has it."""
        os.close(self._descriptor)
        if self._taken and not OPENS_FOLDERS:
            with contextlib.suppress(OSError):  # another process has opened it meanwhile, and Windows keeps it
                self._path.unlink()


def means_no_locks(error: OSError) -> bool:
    """Whether the error of `FolderLock.take` says that the file system has no locks."""
    return error.errno is not None and errno.errorcode.get(error.errno) in WITHOUT_LOCKS
