"""The serial executor: it computes everything in this process, in the order of submission.

A client that hangs is named in a warning, but can't be ended: the process would have to end with it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from fedtune.client.tasks import Result, Task, Ticket
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.executors.machine import Machine, MachineSettings
from fedtune.executors.watch import NO_WATCH, AtWork, Warn, WatchThread, warn_of
from fedtune.settings import WatchSettings


class RunsAll(Protocol):
    """A machine that does several tasks from the same weights. `at_work` says what it does now."""

    at_work: AtWork

    def describe(self) -> str:
        """Where clients train."""

    def run_all(self, weights: Tensor, tasks: Sequence[Task]) -> list[Result]:
        """The results in the order of the tasks. Each update owns the memory of its weights."""


class SerialExecutor:
    """See `fedtune.client.tasks.Executor`. If `warn` is given, a thread calls it for each client that hangs."""

    def __init__(
        self,
        settings: MachineSettings,
        dataset: FederatedDataset,
        make_machine: Callable[[MachineSettings, FederatedDataset], RunsAll] = Machine,
        watch: WatchSettings = NO_WATCH,
        warn: Warn | None = None,
    ) -> None:
        self._machine = make_machine(settings, dataset)
        self._waiting: deque[tuple[int, Tensor, Sequence[Task], str]] = deque()
        self._place = ""  # of the batch that is computed
        self._results: dict[int, list[Result]] = {}
        self._num_submitted = 0
        self._watch: WatchThread | None = None
        if warn is not None:
            self._watch = WatchThread(
                watch,
                self._machine.at_work,
                lambda tasks, seconds: warn_of(warn, tasks, dataset, self._place, seconds),
            )

    def describe(self) -> str:
        """Where clients train."""
        return self._machine.describe()

    def submit(self, weights: Tensor, tasks: Sequence[Task], order: float = 0.0, place: str = "") -> Ticket:
        """A ticket for this batch. `order` is not used: batches are computed as they come."""
        self._num_submitted += 1
        self._waiting.append((self._num_submitted, weights, tasks, place))
        return Ticket(self._num_submitted)

    def step(self) -> None:
        """Computes the oldest batch that waits; does nothing if none waits."""
        if self._waiting:
            ticket, weights, tasks, self._place = self._waiting.popleft()
            self._results[ticket] = self._machine.run_all(weights, tasks)
            self._machine.at_work.end()

    def finished(self, ticket: Ticket) -> bool:
        """True once the batch was computed."""
        return ticket in self._results

    def collect(self, ticket: Ticket) -> list[Result]:
        """The results of a finished ticket, in the order of its tasks."""
        return self._results.pop(ticket)

    def release(self, ticket: Ticket) -> None:
        """Gives back the memory of a ticket's updates. There is none to give back: each update has its own memory."""

    def close(self) -> None:
        """Ends all workers. There are none: this process does the work."""
        if self._watch is not None:
            self._watch.close()
