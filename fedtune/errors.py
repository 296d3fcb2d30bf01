"""The errors that a user can cause: one line that names the thing, its value and what is allowed."""

from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave is not allowed; the command line prints it as one line and exits with code 2."""


class UnknownNameError(InputError, LookupError):
    """A name that is not among the known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}")
