"""Who is to blame if a worker process ends.

A task is to blame if it ended its worker: its program exited, or it crashed (CRASHES). Any other signal comes from
outside: SIGKILL from the kernel if the memory is full, SIGTERM from a person or a batch system. If the forkserver has
ended, nobody knows the exit code (None), and no task is to blame.
"""

import signal

CRASHES = (
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGSYS,
)


def is_crash(exit_code: int | None) -> bool:
    """Whether a worker that ended with this code was ended by its task. A negative code is that of a signal."""
    return exit_code is not None and (exit_code >= 0 or -exit_code in CRASHES)


def why_it_stopped(exit_code: int | None) -> str:
    """The words for a task whose worker was killed, and was killed again when the task was tried alone."""
    if exit_code is None:
        how = "ended with the forkserver, which starts the workers"
    else:
        names = {number.value: f" ({number.name})" for number in signal.Signals}
        how = f"was killed by signal {-exit_code}{names.get(-exit_code, '')}"
    guess = ": out of memory?" if exit_code == -signal.SIGKILL else ""
    return f"its worker process {how}, and again when the task was tried alone{guess}"
