"""A run whose process dies, for tests of what is left of it and of how it goes on."""

import itertools


class Killed(BaseException):
    """Stands for the process's death: nothing in the program catches it."""


def kill_at_round(number):
    """A listener that kills the run when it hears of that many rounds, those of all studies counted."""
    heard = itertools.count(1)

    def kill(event):
        if event["event"] == "round" and next(heard) == number:
            raise Killed

    return kill
