"""How messages name a task."""

from fedtune.client.tasks import EvaluateTask, Task, describe
from fedtune.data.federated_dataset import FederatedDataset


def client_id(task: Task, dataset: FederatedDataset) -> str | None:
    """The id of the task's client; None if the task evaluates several clients."""
    return None if isinstance(task, EvaluateTask) else dataset.client_ids[task.client]


def name(task: Task, dataset: FederatedDataset, place: str) -> str:
    """The task's client by id and number, and its place in the run, for messages."""
    who = describe(task)
    if not isinstance(task, EvaluateTask):
        who = f"client {dataset.client_ids[task.client]!r} (number {task.client})"
    return f"{who}, {place}" if place else who
