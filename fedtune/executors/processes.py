"""Worker processes: how many there are, the process that they are forked from, and how one starts."""

import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess


def num_workers(requested: int) -> int:
    """How many processes to use; 0 means one for each core that this process may run on."""
    return requested or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def start_forkserver() -> None:
    """Starts the process that worker processes are forked from, if it does not run yet.

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


def start_process(target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection]:
    """A new process that calls `target`, and the connection to it.

    The first argument of `target` is the other end of the connection; `arguments` follow.
    """
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    # Hide the user's script: the process would import it again, which fails if the script has no
    # `if __name__ == "__main__"` or came from stdin.
    main_module = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main_module
    theirs.close()
    return process, ours


def end_process(process: BaseProcess, connection: Connection) -> None:
    """Kills the process if it still runs, waits for its end and closes the connection to it."""
    if process.is_alive():  # if only its connection broke
        process.kill()
    process.join()
    connection.close()
