"""All uses of Flower's private names (as in flwr 1.38 to 1.42); the test of this module fails if Flower changes one."""

import functools
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
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


def entries_of(record: object) -> Mapping[str, Any]:
    """The record's entries as a plain dictionary, which reads faster. It must not be changed."""
    entries: dict[str, Any] = record.__dict__["_data"]
    return entries


def addressed(message: Message, content: RecordDict, node: int) -> Message:
    """A message that differs from `message` in its content and its receiver. Neither of them has an id yet.

    Flower checks the arguments of every message. Here the checks of `message` count for the other ones too.
    """
    return _message({**vars(message.metadata), "_dst_node_id": node}, content)


def reply(message: Message, content: RecordDict) -> Message:
    """The reply that `Message(content, reply_to=message)` makes, in a fifth of the time."""
    sent, now = vars(message.metadata), time.time()
    metadata = {**sent, "_message_id": "", "_reply_to_message_id": sent["_message_id"], "_created_at": now}
    for ours, theirs in (("_src_node_id", "_dst_node_id"), ("_src_task_id", "_dst_task_id")):
        metadata[ours], metadata[theirs] = sent[theirs], sent[ours]
    metadata["_ttl"] = sent["_created_at"] + sent["_ttl"] - now
    metadata["_delivered_at"] = ""
    return _message(metadata, content)


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


def _message(fields: dict[str, Any], content: RecordDict) -> Message:
    metadata, message = object.__new__(Metadata), object.__new__(Message)
    metadata.__dict__ = fields
    message.__dict__ = {"_metadata": metadata, "_content": content, "_error": None}
    return message
