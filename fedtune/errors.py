"""The errors that a command prints as one line: what a user gave is not allowed, or the run was stopped."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something the user gave is not allowed; the command line prints it as one line and exits with code 2."""


class NoKernelError(InputError):
    """The settings require that clients train in a compiled kernel, and here they can't."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"engine must be 'torch' here, got 'compiled': {reason}")


class RunStopped(RuntimeError):
    """What stopped a run is no setting, for example a process that was killed. The run can be resumed.

    The command line prints the error as one line and exits with code 1.
    """


class ClientStopped(RunStopped):
    """A client's task stopped the run. `client` is the client's id; None if the task evaluates several clients.

    `at_limit` says that the task took longer than `watch.limit` allows.
    """

    def __init__(self, message: str, client: str | None, *, at_limit: bool = False) -> None:
        super().__init__(message)
        self.client = client
        self.at_limit = at_limit


class UnknownNameError(InputError, LookupError):
    """A name that is not among the known ones. The message names a known one that is spelled nearly the same."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        # Without their tables: model.width and model.hidden are not alike.
        full_names = {full_name.rpartition(".")[2]: full_name for full_name in known}
        close = get_close_matches(name.rpartition(".")[2], full_names, n=1)
        meant = f"; did you mean {full_names[close[0]]}?" if close else ""
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(known)}{meant}")
