"""Watches for clients that hang: a warning names such a client, and a limit ends its task (`[watch]` in the settings).

The pool watches its workers while it waits for them. The serial executor works in this process, which can't watch
itself; a thread does it, and can only warn.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence

from fedtune.client.tasks import Task
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.executors.names import client_id, name
from fedtune.settings import WatchSettings

Warn = Callable[..., None]  # is called with a message and further fields of a warning
NO_WATCH = WatchSettings(warn_after=0)


def next_look(settings: WatchSettings, seconds: float) -> float:
    """After how many seconds a task must be looked at next if it has taken `seconds` so far; infinite if never.

    That is when the next warning is due, or the limit. Warnings are due after `warn_after` seconds, and again each time
    that the seconds have doubled.
    """
    warning = settings.warn_after or math.inf
    while warning <= seconds:
        warning *= 2
    return min(warning, math.inf if settings.limit is None else settings.limit)


def warn_of(warn: Warn, tasks: Sequence[Task], dataset: FederatedDataset, place: str, seconds: float) -> None:
    """Warns that these tasks, which are done together, are not done yet."""
    names = " and ".join([*(name(task, dataset, "") for task in tasks[:-1]), name(tasks[-1], dataset, place)])
    warn(
        f"{names}: no answer after {round(seconds, None if seconds >= 10 else 2)} s",
        clients=[client_id(task, dataset) for task in tasks],
        place=place,
        seconds=seconds,
    )


class AtWork:
    """The tasks that a machine works on now, and when it began with them. Another thread may read it."""

    def __init__(self) -> None:
        self.now: tuple[Sequence[Task], float] | None = None

    def begin(self, tasks: Sequence[Task]) -> None:
        """Notes that the machine now works on these tasks, on all of them together."""
        self.now = tasks, time.monotonic()

    def end(self) -> None:
        """Notes that the machine works on no task."""
        self.now = None


class WatchThread:
    """A thread that warns of tasks that take long. `warn_of` is called with the tasks and the seconds so far."""

    def __init__(
        self, settings: WatchSettings, at_work: AtWork, warn_of: Callable[[Sequence[Task], float], None]
    ) -> None:
        self._settings = settings
        self._at_work = at_work
        self._warn_of = warn_of
        self._closed = threading.Event()
        if settings.warn_after > 0:
            threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _watch(self) -> None:
        first = due = self._settings.warn_after
        seen, wait = None, first
        while not self._closed.wait(wait):
            now = self._at_work.now
            if now is not seen:
                seen, due = now, first
            if now is None:
                wait = first
                continue
            tasks, began = now
            seconds = time.monotonic() - began
            if seconds >= due:
                self._warn_of(tasks, seconds)
                due = next_look(self._settings, seconds)
            wait = due - seconds
