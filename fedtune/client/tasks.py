"""The tasks for executors, their results, and the interface of an executor.

An executor takes batches of tasks; the tasks of a batch start from the same weights. `submit` returns a ticket at once,
`step` blocks until something was computed, and `collect` gives the results of a finished ticket in the order of its
tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol, runtime_checkable

from fedtune.tuning.space import Config, Number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainTask:
    """Train one client from the batch's weights. The result is an Update.

    `seed` is for the generator that the client program gets. If `error_before` is True, the weights are also measured
    before training, on the validation part.
    """

    client: int
    config: Config
    seed: int
    error_before: bool = False


@dataclass(frozen=True)
class EvaluateTask:
    """Evaluate the batch's weights on the validation and test parts of some clients. The result is Metrics for each."""

    clients: tuple[int, ...]


@dataclass(frozen=True)
class PersonaliseTask:
    """Train one client, then evaluate the trained weights on its validation and test parts. The result is Metrics."""

    client: int
    config: Config
    seed: int


ClientTask = TrainTask | PersonaliseTask
Task = ClientTask | EvaluateTask


def describe(task: Task) -> str:
    """The task in the words of a message."""
    if isinstance(task, EvaluateTask):
        return f"evaluating clients {task.clients[0]}..{task.clients[-1]}"
    return f"client {task.client} with {dict(task.config)}"


Metrics = dict[str, Number]


@dataclass(frozen=True)
class Update:
    """What a client returns: its flat weights, valid until the batch is released, and its metrics."""

    weights: "Tensor"
    metrics: Metrics


@dataclass(frozen=True)
class Failure:
    """A client program raised or ended its process, or the client is lost. The message names the client."""

    message: str


Result = Update | Failure | list[Metrics]


Ticket = NewType("Ticket", int)  # of a batch that an executor has taken


@runtime_checkable
class Executor(Protocol):
    """Runs tasks. If several batches wait, the batch with the smallest `order` goes first."""

    def describe(self) -> str:
        """Where clients train, for a message: for example "in 2 worker processes"."""

    def submit(self, weights: "Tensor", tasks: Sequence[Task], order: float = 0.0, place: str = "") -> Ticket:
        """The ticket of this batch of tasks. `place` says where in the run it belongs, for messages about a task."""

    def step(self) -> None:
        """Computes something, or blocks until a worker has computed something. Does nothing if no task waits."""

    def finished(self, ticket: Ticket) -> bool:
        """True if all results of the ticket are there."""

    def collect(self, ticket: Ticket) -> list[Result]:
        """The results of a finished ticket, in the order of its tasks. A ticket can be collected once."""

    def release(self, ticket: Ticket) -> None:
        """Frees the memory of a collected ticket's updates."""

    def close(self) -> None:
        """Ends all workers. The executor can't be used afterwards."""
