"""A process without what Windows lacks, in which fedtune runs.

`python -X warn_default_encoding tests/without_posix.py FOLDER` takes POSIX away from itself, runs and resumes a small
comparison there, tries what can't be had, and prints what it saw as JSON.

The libraries that fedtune uses are imported first: that they run on Windows is not to be shown here. What is taken away
or changed afterwards holds for fedtune alone.
"""

import builtins
import contextlib
import errno
import fcntl
import io
import json
import multiprocessing.forkserver  # noqa: F401
import os
import platform
import shutil
import signal
import sys
import warnings
from pathlib import Path

import filelock  # noqa: F401, with the locks of this system
import flwr.serverapp  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
import rich.live
import rich.progress  # noqa: F401
import safetensors.numpy  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch  # noqa: F401
import typer  # noqa: F401

OPTIONS = {"max_rounds": 3, "total_rounds": 9, "cohort_size": 2, "model.name": "logistic"}

MODULES = [
    "curses",
    "fcntl",
    "grp",
    "multiprocessing.forkserver",
    "multiprocessing.popen_fork",
    "multiprocessing.popen_forkserver",
    "posix",
    "pty",
    "pwd",
    "readline",
    "resource",
    "syslog",
    "termios",
    "tty",
]
OF_OS = [
    "O_CLOEXEC",
    "O_DIRECTORY",
    "O_NOFOLLOW",
    "O_NONBLOCK",
    "chown",
    "fchmod",
    "fchown",
    "fdatasync",
    "fork",
    "forkpty",
    "geteuid",
    "getgid",
    "getpgid",
    "getuid",
    "killpg",
    "memfd_create",
    "mkfifo",
    "nice",
    "pread",
    "pwrite",
    "register_at_fork",
    "sched_getaffinity",
    "sched_setaffinity",
    "setsid",
    "statvfs",
    "sync",
    "sysconf",
    "uname",
    "wait",
]
OF_SIGNAL = [
    "alarm",
    "pause",
    "pthread_kill",
    "pthread_sigmask",
    "setitimer",
    "sigpending",
    "sigwait",
]
SIGNALS = ["SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"]  # that Windows has
BINARY = 1 << 40  # stands for os.O_BINARY


def take_posix_away():
    """Removes what Windows lacks, and makes files behave as they do there."""
    platform.platform()  # it remembers the answer
    for name in MODULES:
        sys.modules[name] = None  # to import it is an ImportError
        package, _, module = name.rpartition(".")
        if package and hasattr(sys.modules[package], module):
            delattr(sys.modules[package], module)
    for name in OF_OS:
        if hasattr(os, name):  # macOS lacks some of them
            delattr(os, name)
    for name in [name for name in dir(signal) if name in OF_SIGNAL or (is_signal(name) and name not in SIGNALS)]:
        delattr(signal, name)
    sys.platform, os.linesep, os.O_BINARY = "win32", "\r\n", BINARY
    take_files_of_posix_away()
    builtins.open = io.open = with_line_ends_of_windows(io.open)
    # Python warns of each file whose encoding the system decides.
    assert sys.flags.warn_default_encoding
    warnings.filterwarnings("error", category=EncodingWarning, module="fedtune")


def is_signal(name):
    return name.startswith("SIG") and not name.startswith("SIG_")


def take_files_of_posix_away():
    """From now on no folder can be opened, and a file that may not be written can't be brought to the disk.

    Descriptors without O_BINARY write other ends of lines. A file that this process has open keeps its name.
    """
    open_file, write, sync, flags_of = os.open, os.write, os.fsync, fcntl.fcntl
    texts = set()  # the descriptors of text files

    def open_as_on_windows(path, flags, *arguments, **keywords):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        descriptor = open_file(path, flags & ~BINARY, *arguments, **keywords)
        texts.discard(descriptor)
        if not flags & BINARY:
            texts.add(descriptor)
        return descriptor

    def write_as_on_windows(descriptor, data):
        write(descriptor, bytes(data).replace(b"\n", b"\r\n") if descriptor in texts else data)
        return len(data)

    def sync_as_on_windows(descriptor):
        if flags_of(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sync(descriptor)

    shutil._use_fd_functions = False  # to remove a folder without opening it
    os.open, os.write, os.fsync = open_as_on_windows, write_as_on_windows, sync_as_on_windows
    for name in ("remove", "rename", "replace", "unlink"):
        setattr(os, name, refused_for_open_files(getattr(os, name)))


def refused_for_open_files(function):
    """The function, which refuses paths of files that this process has open or mapped, and folders of such files."""

    def refuse_or_do(*paths, **keywords):
        opened = open_files()
        for path in map(os.path.realpath, paths):
            if any(name == path or name.startswith(f"{path}/") for name in opened):
                raise PermissionError(errno.EACCES, "it is open", path)
        return function(*paths, **keywords)

    return refuse_or_do


def open_files():
    """The paths of the files that this process has open or mapped, as far as the system tells."""
    folder = Path("/proc/self")
    if not folder.is_dir():
        return []
    opened = []
    for link in (folder / "fd").iterdir():
        with contextlib.suppress(OSError):  # the folder's own descriptor is closed by now
            opened.append(os.readlink(link))
    mapped = [line.split(maxsplit=5)[5:] for line in (folder / "maps").read_text(encoding="utf-8").splitlines()]
    return opened + [name for names in mapped for name in names]


def with_line_ends_of_windows(open_file):
    """The function `open`, which writes the ends of lines of Windows if it is not told which."""

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *arguments):
        if newline is None and "b" not in mode and "r" not in mode:
            newline = "\r\n"
        return open_file(file, mode, buffering, encoding, errors, newline, *arguments)

    return opened


def run(*arguments):
    """The exit code of the command, and the lines of its standard error."""
    from fedtune.cli import main

    sys.argv, stderr = ["fedtune", *arguments], io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        try:
            main()
        except SystemExit as ended:
            return ended.code or 0, stderr.getvalue().splitlines()
    return 0, stderr.getvalue().splitlines()


def stopped(folder, copy):
    """A copy of a finished run, as if it had been stopped in the middle of its studies."""
    shutil.copytree(folder, copy)
    for path in [copy / "results.csv", copy / "rounds.parquet", *copy.glob("*/checkpoints/*")]:
        path.unlink()
    for journal in copy.glob("*/journal.jsonl"):
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[: len(lines) // 2]))
    return copy


def main(root):
    take_posix_away()
    import fedtune
    from fedtune.operating_system import FolderLock

    options = [f"--set={name}={value}" for name, value in OPTIONS.items()]
    compare = ["compare", "digits", "--tuners=asha,fedex", *options]
    seen = {"compare": run(*compare, f"--out={root / 'run'}")}
    assert seen["compare"][0] == 0, seen
    seen["resume"] = run("resume", str(stopped(root / "run", root / "stopped")))
    seen["test_error"] = fedtune.read_run(root / "run").results["test_error"].tolist()
    seen["replay"] = [study.finished for study in fedtune.replay(root / "stopped")]
    seen["doctor"] = run("doctor")
    seen["pool"] = run(*compare, "--executor=pool", f"--out={root / 'pool'}")
    seen["limit"] = run(*compare, "--set=watch.limit=60", f"--out={root / 'limit'}")
    lock = FolderLock(root / "run")
    assert lock.take()
    seen["locked"] = run("resume", str(root / "run"))
    lock.release()
    shutil.copytree(root / "run", root / "older")
    seen["overwrite"] = run("train", "digits", "--rounds=1", *options[2:], f"--out={root / 'older'}", "--force")
    seen["files"] = sorted(path.name for path in root.iterdir())
    seen["modules"] = sorted(name for name in sys.modules if name.startswith("fedtune.executors."))
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
