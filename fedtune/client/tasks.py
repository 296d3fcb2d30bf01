"""What executors are asked to compute, and what they answer.

An executor takes batches of tasks that share the same weights. `submit` returns a ticket at once, `step` blocks until
something was computed, `collect` gives the results of a finished ticket in the order of its tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol, runtime_checkable

from fedtune.tuning.space import Config, Number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainTask:
    """Train one client from the batch's weights; the result is an Update."""

    client: int
    config: Config
    seed: int
    error_before: bool = False


@dataclass(frozen=True)
class EvaluateTask:
    """Evaluate the batch's weights on the validation and test parts of some clients; a dict of metrics for each."""

    clients: tuple[int, ...]


@dataclass(frozen=True)
class PersonaliseTask:
    """Train one client, then evaluate what came out on its validation and test parts; a dict of metrics."""

    client: int
    config: Config
    seed: int


ClientTask = TrainTask | PersonaliseTask
Task = ClientTask | EvaluateTask


def describe(task: Task) -> str:
    """What a message calls the task."""
    if isinstance(task, EvaluateTask):
        return f"evaluating clients {task.clients[0]}..{task.clients[-1]}"
    return f"client {task.client} with {dict(task.config)}"


Metrics = dict[str, Number]


@dataclass(frozen=True)
class Update:
    """What a client returns: flat weights, valid until the batch is released, and its metrics."""

    weights: "Tensor"
    metrics: Metrics


@dataclass(frozen=True)
class Failure:
    """The client program raised, or took its process with it; the message names the client and its configuration."""

    message: str


Result = Update | Failure | list[Metrics]

Ticket = NewType("Ticket", int)  # of a batch that an executor was given


@runtime_checkable
class Executor(Protocol):
    """Runs tasks. `order` says which batch goes first where there is a choice: the smaller one."""

    def describe(self) -> str:
        """Where clients train: "in ..."."""

    def submit(self, weights: "Tensor", tasks: Sequence[Task], order: float = 0.0) -> Ticket:
        """A ticket for this batch."""

    def step(self) -> None:
        """Computes something, or blocks until a worker has; does nothing when there is nothing to do."""

    def finished(self, ticket: Ticket) -> bool:
        """True once all results of the ticket are there."""

    def collect(self, ticket: Ticket) -> list[Result]:
        """The results of a finished ticket, in the order of its tasks; once."""

    def release(self, ticket: Ticket) -> None:
        """Gives back the memory of a collected ticket's updates."""

    def close(self) -> None:
        """Ends all workers. The executor can't be used any more."""
