"""The errors that a user can cause: one line that names the thing, its value and what is allowed."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something the user gave is not allowed; the command line prints it as one line and exits with code 2."""


class UnknownNameError(InputError, LookupError):
    """A name that is not among the known ones. The message names a known one that is spelled nearly the same."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        # Without their tables: model.width and model.hidden are not alike.
        full_names = {full_name.rpartition(".")[2]: full_name for full_name in known}
        close = get_close_matches(name.rpartition(".")[2], full_names, n=1)
        meant = f"; did you mean {full_names[close[0]]}?" if close else ""
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(known)}{meant}")
