"""Checks every reply before it counts: what a node sends is not believed.

A client of fedtune sends no bad reply, so the checks change nothing in a simulation. A device on a network can send
anything. Its client counts only if its node sent one reply to the message that it got, and that reply is good. All
other clients of the cohort are lost. A bad reply never ends a run.

A good reply holds the records that `fedtune.server.messages` describes and no others. Its array is as long as the
weights, and float32; its numbers may be infinite or NaN, since federated averaging rejects such an update. Its metrics
are numbers in their ranges. The metrics of a model that diverged are not finite: after training that is allowed if a
client can report it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord
from jaxtyping import Float
from torch import Tensor

from fedtune.client.tasks import Metrics, Update
from fedtune.errors import InputError
from fedtune.server.flower_compat import entries_of
from fedtune.server.messages import CLIENT_ERROR

LARGEST = float(np.finfo(np.float32).max)  # a client computes its errors and losses in single precision
PROBLEM_LENGTH = 1000  # characters that are kept: a node may send megabytes

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Count:
    """The range of a metric that is a whole number."""

    low: int
    high: int

    def allows(self, value: object) -> bool:
        """Whether the value is a whole number in the range."""
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number in {self.low}..{self.high}"


@dataclass(frozen=True)
class Measure:
    """The range of an error or a loss, from 0. `diverged` says whether it may also be NaN or infinite, but positive."""

    high: float
    diverged: bool = False

    def allows(self, value: object) -> bool:
        """Whether the value is a number in the range."""
        if type(value) is not float and type(value) is not int:
            return False
        return 0 <= value <= self.high or (self.diverged and not -math.inf <= value < math.inf)

    def __str__(self) -> str:
        return f"a number in 0..{self.high:g}{', infinite or NaN' if self.diverged else ''}"


Ranges = Mapping[str, Count | Measure]

# After training. An example of next_token whose positions are all ignored has no error.
ERRORS = {
    "classification": Measure(1.0),
    "next_token": Measure(1.0, diverged=True),
    "regression": Measure(LARGEST, diverged=True),
}
LOSS = Measure(LARGEST, diverged=True)


def training_ranges(objective: str, max_examples: int, *, error_before: bool) -> Ranges:
    """The metrics that a reply to a training message must have, and their ranges."""
    error = ERRORS[objective]
    before = {"error_before": error, "loss_before": LOSS} if error_before else {}
    counts = {"num_train": Count(1, max_examples), "num_validation": Count(0, max_examples)}
    return {"error": error, "loss": LOSS, **before, **counts}


def evaluation_ranges(objective: str, max_examples: int) -> Ranges:
    """The metrics that a reply to an evaluation message must have, and their ranges. All of them must be finite."""
    ranges: dict[str, Count | Measure] = {}
    for part in ("validation", "test"):
        ranges[f"{part}_error"] = Measure(ERRORS[objective].high)
        ranges[f"{part}_loss"] = Measure(LARGEST)
        ranges[f"num_{part}"] = Count(1, max_examples)
    return ranges


def update_in(reply: Message, num_weights: int, ranges: Ranges) -> Update:
    """What a client returns after training; the weights are a view, if the reply was not serialised on its way.

    Raises InputError if the reply is bad.
    """
    records = _records(reply, {"metrics", "arrays"})
    return Update(_weights(records["arrays"], num_weights), _metrics(records["metrics"], ranges))


def metrics_in(reply: Message, ranges: Ranges) -> Metrics:
    """The metrics in a reply that holds nothing else. Raises InputError if the reply is bad."""
    return _metrics(_records(reply, {"metrics"})["metrics"], ranges)


def good_answers(
    replies: Iterable[Message], asked: Iterable[Metadata], read: Callable[[Message], Answer]
) -> tuple[dict[int, Answer], list[str]]:
    """The answers by node, in the order of the messages that were sent, and what is wrong with the other replies.

    `asked` holds the metadata of the messages, one to each node. `read` takes the answer from a reply, and raises
    InputError if the reply is bad. Several replies of a node are all bad: which one came first is chance.
    """
    received: dict[tuple[int, str], list[Answer | None]] = {
        (metadata.dst_node_id, metadata.message_id): [] for metadata in asked
    }
    problems = []
    for reply in replies:
        node, message_id = reply.metadata.src_node_id, reply.metadata.reply_to_message_id
        answer, problem = None, None
        if reply.has_error():
            problem = _reason(reply)
        elif (node, message_id) not in received:
            problem = f"node {node} must reply to the message that it was sent, got a reply to {message_id!r}"
        else:
            try:
                answer = read(reply)
            except InputError as error:
                problem = f"the reply of node {node} is bad: {error}"
        if problem is not None:
            problems.append(problem[:PROBLEM_LENGTH])
        received.get((node, message_id), []).append(answer)
    several = {node: len(answers) for (node, _), answers in received.items() if len(answers) > 1}
    problems += [f"node {node} must reply once, got {count} replies" for node, count in several.items()]
    good = {node: answers[0] for (node, _), answers in received.items() if len(answers) == 1}
    return {node: answer for node, answer in good.items() if answer is not None}, problems


def _records(reply: Message, names: set[str]) -> Mapping[str, object]:
    if not reply.has_content():
        raise InputError("it must have content, got none")
    records = entries_of(reply.content)
    if records.keys() != names:
        raise InputError(f"it must hold the records {_listed(names)}, got {_listed(records)}")
    return records


def _weights(record: object, num_weights: int) -> Float[Tensor, "weight"]:
    wanted = f"the record 'arrays' must hold the float32 array 'weights' of shape ({num_weights},)"
    if not isinstance(record, ArrayRecord):
        raise InputError(f"{wanted}, got {type(record).__name__}")
    entries = entries_of(record)
    if entries.keys() != {"weights"}:
        raise InputError(f"{wanted}, got {_listed(entries)}")
    packed = entries["weights"]
    if not isinstance(packed, Array):
        raise InputError(f"{wanted}, got {type(packed).__name__}")
    if (packed.dtype, packed.shape) != ("float32", (num_weights,)):
        raise InputError(f"{wanted}, got {packed.dtype} of shape {packed.shape}")
    try:
        array = packed.numpy()  # Flower never unpickles
    except Exception as error:  # numpy raises many kinds if the bytes are not its own
        raise InputError(f"{wanted}, got bytes that can't be read: {type(error).__name__}") from None
    # The bytes may hold something else than the record says.
    if not isinstance(array, np.ndarray):
        raise InputError(f"{wanted}, got {type(array).__name__}")
    if array.dtype != np.float32 or array.shape != (num_weights,):
        raise InputError(f"{wanted}, got {array.dtype} of shape {array.shape}")
    return torch.from_numpy(array)


def _metrics(record: object, ranges: Ranges) -> Metrics:
    """The metrics that have a range; others don't matter."""
    if not isinstance(record, MetricRecord):
        raise InputError(f"the record 'metrics' must be a MetricRecord, got {type(record).__name__}")
    entries = entries_of(record)
    metrics: Metrics = {}
    for name, allowed in ranges.items():
        value: Any = entries.get(name)
        if not allowed.allows(value):
            raise InputError(f"{name} must be {allowed}, got {_shown(value)}")
        metrics[name] = value
    return metrics


def _reason(reply: Message) -> str:
    """Why the node failed, in its own words. What a client program raised names the client already."""
    error = reply.error
    reason = error.reason if isinstance(error.reason, str) and error.reason else "failed and gave no reason"
    return reason if error.code == CLIENT_ERROR else f"node {reply.metadata.src_node_id}: {reason}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def _shown(value: object) -> str:
    """A metric in a message: only the type of what is no plain number, which may be long."""
    is_short = type(value) is float or (type(value) is int and value.bit_length() <= 64)
    return repr(value) if is_short else type(value).__name__
