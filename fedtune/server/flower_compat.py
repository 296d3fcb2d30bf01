"""Every private name of Flower that fedtune relies on (read in flwr 1.38 to 1.41); its test fails loudly."""

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
    """Lets messages be made outside Flower's own processes; inside one its identity is left alone."""
    for name, value in (("_run_id", RUN_ID), ("_task_id", 1), ("_node_id", SERVER_NODE_ID)):
        if getattr(TaskIdentity, name) is None:
            setattr(TaskIdentity, name, value)


def empty_run() -> Run:
    """The Run that an in-process grid belongs to."""
    return Run.create_empty(RUN_ID)


def stamp(message: Message, message_id: str) -> None:
    """Gives the message its id, as a SuperLink would, so that its reply says what it answers."""
    message.metadata.__dict__["_message_id"] = message_id


def fill(record: Record, entries: Mapping[str, Any]) -> Record:
    """The record, with these entries too. Flower's own way checks the type of each: a third of what a message costs."""
    record.__dict__["_data"].update(entries)
    return record


class ViewArray(Array):
    """An Array over a numpy array that is not copied, and serialised only when Flower asks for the bytes."""

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
        """What a plain Array would be on the wire, where its class is named: no other end knows this one."""
        return Array(self.numpy()).deflate()


def pack(weights: Float[np.ndarray, "weight"]) -> ArrayRecord:
    """A record of one flat array, "weights", without a copy."""
    return fill(ArrayRecord(), {"weights": ViewArray(weights)})


@functools.cache
def _name(dtype: np.dtype) -> str:
    return str(dtype)  # slow
