"""All uses of Flower's private names (as in flwr 1.38 to 1.42); the test of this module fails if Flower changes one."""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SType
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from jaxtyping import Float

RUN_ID = 1
SERVER_NODE_ID = 1

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord, RecordDict)


def ensure_task_identity() -> None:
    """Makes it possible to create messages outside Flower's own processes; within such a process it changes nothing."""
    for name, value in (("_run_id", RUN_ID), ("_task_id", 1), ("_node_id", SERVER_NODE_ID)):
        if getattr(TaskIdentity, name) is None:
            setattr(TaskIdentity, name, value)


def empty_run() -> Run:
    """The Run to which an in-process grid belongs."""
    return Run.create_empty(RUN_ID)


def stamp(message: Message, message_id: str) -> None:
    """Gives the message its id, as a SuperLink does, so that its reply names the message that it answers."""
    message.metadata.__dict__["_message_id"] = message_id


def fill(record: Record, entries: Mapping[str, Any]) -> Record:
    """The record, with these entries added. Flower checks the type of each entry: a third of the time of a message."""
    record.__dict__["_data"].update(entries)
    return record


class ViewArray(Array):
    """An Array around a numpy array: it does not copy it, and serialises it only when Flower asks for the bytes."""

    def __init__(self, array: Float[np.ndarray, "weight"]) -> None:
        self.__dict__.update(_view=array, dtype=_name(array.dtype), shape=array.shape, stype=SType.NUMPY)

    def numpy(self) -> Float[np.ndarray, "weight"]:
        """The array itself."""
        view: np.ndarray = self.__dict__["_view"]
        return view

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in numpy's own format."""
        return Array(self.numpy()).data

    def deflate(self) -> bytes:
        """The bytes of a plain Array: they name its class, and a receiver does not know this class."""
        return Array(self.numpy()).deflate()


def pack(weights: Float[np.ndarray, "weight"]) -> ArrayRecord:
    """A record of one flat array, called "weights"; the array is not copied."""
    return fill(ArrayRecord(), {"weights": ViewArray(weights)})


@functools.cache
def _name(dtype: np.dtype) -> str:
    return str(dtype)  # slow
