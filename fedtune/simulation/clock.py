"""The virtual clock: a queue of future events, taken by time, equal times in the order of scheduling."""

import heapq
import itertools
from typing import Generic, TypeVar

Event = TypeVar("Event")


class Clock(Generic[Event]):
    """Time starts at 0 and moves to each event as it is taken."""

    def __init__(self) -> None:
        self.time = 0.0
        self._events: list[tuple[float, int, Event]] = []
        self._sequence = itertools.count()

    def schedule(self, time: float, event: Event) -> None:
        """Puts an event at `time`, not before the present."""
        assert time >= self.time
        heapq.heappush(self._events, (time, next(self._sequence), event))

    def peek(self) -> Event:
        """The next event; time stands still."""
        return self._events[0][2]

    def take(self) -> Event:
        """The next event; its time becomes the present."""
        self.time, _, event = heapq.heappop(self._events)
        return event

    def __len__(self) -> int:
        return len(self._events)
