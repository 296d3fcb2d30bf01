"""Worker processes: how many there are, the process that they are forked from, and how one starts."""

import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from fedtune.operating_system import num_cores

UNKNOWN = 255  # multiprocessing's exit code of a process whose forkserver has ended; a process may also exit with it


class ForkserverEnded(Exception):
    """The forkserver ended while it started a process. `pid` is the forkserver's process id."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self.pid = pid


def num_workers(requested: int) -> int:
    """How many processes to use; 0 means one for each core that this process may run on."""
    return requested or num_cores()


def start_forkserver() -> int:
    """The id of the process that worker processes are forked from. It is started if it does not run.

    It imports torch while this process does something else: call this function early.
    """
    # torch comes first and by itself: if a later name can't be imported, the preload ends without an error message.
    # This happens if fedtune is not installed.
    preload = ["torch", "fedtune.executors.worker"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    resource_tracker.ensure_running()  # before the signal is blocked: it unblocks the signal as it starts
    # This process alone handles Ctrl-C: the forkserver and all workers are born with the signal blocked.
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
    pid: int = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # no public name tells it
    return pid


def start_process(target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection, int]:
    """A new process that calls `target`, the connection to it, and the id of its forkserver.

    The first argument of `target` is the other end of the connection; `arguments` follow. Raises ForkserverEnded if the
    forkserver ends meanwhile.
    """
    pid = start_forkserver()
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    # Hide the user's script: the process would import it again, which fails if the script has no
    # `if __name__ == "__main__"` or came from stdin.
    main_module = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        process.start()
    except (ConnectionError, EOFError) as error:
        if has_ended(pid):
            raise ForkserverEnded(pid) from error
        raise
    finally:
        sys.modules["__main__"] = main_module
    theirs.close()
    return process, ours, pid


def end_process(process: BaseProcess, connection: Connection, pid: int) -> int | None:
    """Kills the process if it still runs, waits for its end and closes the connection to it. Returns its exit code.

    `pid` is the id of its forkserver. None is returned if the forkserver ended before the process: then the exit code
    is not known, and the process may have gone on.
    """
    if process.is_alive():  # if only its connection broke
        process.kill()
    process.join()
    exit_code = process.exitcode
    if exit_code == UNKNOWN and has_ended(pid):
        exit_code = None
        assert process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        with suppress(EOFError, OSError):  # when the connection ends, the process has ended
            while True:
                connection.recv_bytes()
    connection.close()
    return exit_code


def has_ended(pid: int) -> bool:
    """Whether the forkserver of this id has ended; then another one runs in its place.

    Waits a moment: the pipes of a process close before its parent can know of its end.
    """
    for _ in range(100):
        if start_forkserver() != pid:
            return True
        time.sleep(0.002)
    return False
