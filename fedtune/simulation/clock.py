"""The virtual clock: a queue of future events.

The earliest event comes first. Of events at the same time, the event that was scheduled first comes first.
"""

import heapq
import itertools
from typing import Generic, TypeVar

Event = TypeVar("Event")


class Clock(Generic[Event]):
    """A queue of events; its time starts at 0, and taking an event moves it to the time of that event."""

    def __init__(self) -> None:
        self.time = 0.0
        self._events: list[tuple[float, int, Event]] = []
        self._sequence = itertools.count()

    def schedule(self, time: float, event: Event) -> None:
        """Adds an event at `time`, which must not lie before the present."""
        assert time >= self.time
        heapq.heappush(self._events, (time, next(self._sequence), event))

    def peek(self) -> Event:
        """The next event, which stays in the queue; time does not move."""
        return self._events[0][2]

    def take(self) -> Event:
        """The next event, which leaves the queue; its time becomes the present."""
        self.time, _, event = heapq.heappop(self._events)
        return event

    def __len__(self) -> int:
        return len(self._events)
