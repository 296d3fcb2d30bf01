"""Replies that no client of fedtune sends: each one must count as a lost client, and change nothing else.

A forgery is a function of what was sent: it returns the replies that arrive in place of the client's own.
"""

import io
import math
import os
import pickle
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict


class Sent(NamedTuple):
    message: Message  # to the client whose reply is forged
    others: Sequence[Message]  # to the rest of the cohort
    weights: np.ndarray  # which a client could return


GOOD = {"error": 0.5, "loss": 0.5, "num_train": 20, "num_validation": 2, "error_before": 0.75, "loss_before": 0.75}
ABOVE_CAP = 10**9 + 1  # the default of the setting is 10**9


def fill(record, entries):
    """The record with these entries added, also of types that Flower refuses."""
    record.__dict__["_data"].update(entries)
    return record


def good(sent, **records):
    """A good reply, but for the records that are given; None leaves a record out."""
    held = {
        "metrics": MetricRecord(GOOD),
        "arrays": ArrayRecord({"weights": Array(sent.weights)}),
        **records,
    }
    content = fill(RecordDict(), {name: record for name, record in held.items() if record is not None})
    return Message(content, reply_to=sent.message)


def with_metrics(**changed):
    """Also values that Flower's own record refuses; a missing metric is `...`."""
    metrics = {name: value for name, value in (GOOD | changed).items() if value is not ...}
    return lambda sent: [good(sent, metrics=fill(MetricRecord(), metrics))]


def with_records(make):
    return lambda sent: [good(sent, **make(sent))]


def with_array(make):
    """`make(weights)` is the numpy array in the place of the weights."""
    return lambda sent: [good(sent, arrays=ArrayRecord({"weights": Array(make(sent.weights))}))]


def with_bytes(make, **declared):
    """`make(weights)` are the bytes in the place of the weights in numpy's format, which the record declares."""

    def forge(sent):
        fields = {"dtype": "float32", "shape": sent.weights.shape, "stype": "numpy.ndarray", **declared}
        return [good(sent, arrays=ArrayRecord({"weights": Array(data=make(sent.weights), **fields)}))]

    return forge


def with_metadata(make):
    """`make(sent)` are fields of the metadata of a good reply that differ."""

    def forge(sent):
        reply = good(sent)
        reply.metadata.__dict__.update({f"_{name}": value for name, value in make(sent).items()})
        return [reply]

    return forge


def with_error(code, reason):
    return lambda sent: [Message(Error(code, reason), reply_to=sent.message)]


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy_with_header(header):
    """The start of a file in numpy's format, with any text as its header."""
    text = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def npz(weights):
    file = io.BytesIO()
    np.savez(file, weights)
    return file.getvalue()


class Bomb:
    """Leaves a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickles(folder):
    """Forgeries that make `folder` if anybody unpickles them."""
    objects = np.array([Bomb(str(folder))], object)
    return {
        "a pickle": with_bytes(lambda weights: pickle.dumps(Bomb(str(folder)))),
        "an array of pickles": with_bytes(lambda weights: npy(objects, allow_pickle=True)),
        "an array of pickles, said to be objects": with_bytes(
            lambda weights: npy(objects, allow_pickle=True), dtype="object", shape=(1,)
        ),
    }


def outsider(sent):
    """A node that was not asked."""
    return max(message.metadata.dst_node_id for message in [sent.message, *sent.others]) + 1


def neither_content_nor_error(sent):
    reply = good(sent)
    reply.__dict__["_content"] = None
    return [reply]


def content_and_error(sent):
    reply = good(sent)
    reply.__dict__["_error"] = Error(1000, "both")
    return [reply]


NOT_A_NUMBER = {
    "missing": ...,
    "text": "0.5",
    "a bool": True,
    "None": None,
    "a list": [1],
    "an empty list": [],
    "bytes": b"1",
}

FORGED = {
    # The metrics.
    **{
        f"{name}: {kind}": with_metrics(**{name: value})
        for name in ("error", "loss", "num_train", "num_validation")
        for kind, value in NOT_A_NUMBER.items()
    },
    **{
        f"error: {value}": with_metrics(error=value)
        for value in (-1e308, -1e-9, -1, 1 + 1e-9, 2, 1e18, 1e308, math.nan, math.inf, -math.inf, 1j)
    },
    "error: a whole number beyond all floats": with_metrics(error=10**400),
    **{f"loss: {value}": with_metrics(loss=value) for value in (-1e308, -1e-9, -1, 1e39, 1e308, -math.inf, 1j)},
    "loss: a whole number beyond all floats": with_metrics(loss=10**400),
    **{
        f"num_train: {value!r}": with_metrics(num_train=value)
        for value in (
            0,
            -1,
            -(2**63),
            ABOVE_CAP,
            10**18,
            9 * 10**18,
            2**63,
            10**30,
            20.0,
            0.5,
            1e18,
            math.nan,
            math.inf,
        )
    },
    **{
        f"num_validation: {value!r}": with_metrics(num_validation=value)
        for value in (-1, -(2**63), ABOVE_CAP, 10**18, 9 * 10**18, 10**30, 2.0, 0.5, 1e18, math.nan, math.inf)
    },
    # The records.
    "an empty reply": lambda sent: [Message(RecordDict(), reply_to=sent.message)],
    "no metrics": with_records(lambda sent: {"metrics": None}),
    "no arrays": with_records(lambda sent: {"arrays": None}),
    "metrics renamed": with_records(lambda sent: {"metrics": None, "metric": MetricRecord(GOOD)}),
    "arrays renamed": with_records(
        lambda sent: {"arrays": None, "array": ArrayRecord({"weights": Array(sent.weights)})}
    ),
    "more metrics": with_records(lambda sent: {"more": MetricRecord(GOOD)}),
    "more arrays": with_records(lambda sent: {"more": ArrayRecord({"weights": Array(sent.weights)})}),
    "a config": with_records(lambda sent: {"config": ConfigRecord({"seed": 1})}),
    "a config for metrics": with_records(lambda sent: {"metrics": ConfigRecord(GOOD)}),
    "arrays for metrics": with_records(lambda sent: {"metrics": ArrayRecord({"error": Array(sent.weights)})}),
    "metrics for arrays": with_records(lambda sent: {"arrays": MetricRecord({"weights": [0.5, 0.5]})}),
    "a config for arrays": with_records(lambda sent: {"arrays": ConfigRecord({"weights": b"0"})}),
    "a number for a record": with_records(lambda sent: {"metrics": 3}),
    "empty metrics": with_records(lambda sent: {"metrics": MetricRecord()}),
    "empty arrays": with_records(lambda sent: {"arrays": ArrayRecord()}),
    "the array renamed": with_records(lambda sent: {"arrays": ArrayRecord({"weight": Array(sent.weights)})}),
    "a second array": with_records(
        lambda sent: {"arrays": ArrayRecord({"weights": Array(sent.weights), "bias": Array(sent.weights)})}
    ),
    "bytes for an array": with_records(lambda sent: {"arrays": fill(ArrayRecord(), {"weights": b"\x93NUMPY"})}),
    # The array.
    **{
        f"weights of {dtype}": with_array(lambda weights, dtype=dtype: weights.astype(dtype))
        for dtype in (">f4", "float64", "float16", "int32", "int64", "uint8", "bool", "complex64", "U3", "S4")
    },
    "a column": with_array(lambda weights: weights[:, None]),
    "a row": with_array(lambda weights: weights[None]),
    "a single number": with_array(lambda weights: weights[:1].reshape(())),
    "no numbers": with_array(lambda weights: weights[:0]),
    "one number, which could be broadcast": with_array(lambda weights: weights[:1]),
    "one weight less": with_array(lambda weights: weights[:-1]),
    "one weight more": with_array(lambda weights: np.append(weights, weights[:1])),
    "twice the weights": with_array(lambda weights: np.tile(weights, 2)),
    "a table of named columns": with_array(lambda weights: weights.view([("w", np.float32)])),
    # The bytes.
    "no bytes": with_bytes(lambda weights: b""),
    "garbage": with_bytes(lambda weights: b"\x00\x01garbage" * 9),
    "numpy's first bytes only": with_bytes(lambda weights: npy(weights)[:6]),
    "half of the bytes": with_bytes(lambda weights: npy(weights)[: len(npy(weights)) // 2]),
    "one byte less": with_bytes(lambda weights: npy(weights)[:-1]),
    "an archive": with_bytes(npz),
    "a broken archive": with_bytes(lambda weights: npz(weights)[:40]),
    "an array that is not what it is said to be": with_bytes(lambda weights: npy(weights.astype(np.float64))),
    "an array that is longer than it is said to be": with_bytes(lambda weights: npy(np.tile(weights, 2))),
    "weights that are said to be doubles": with_bytes(npy, dtype="float64"),
    "weights that are said to have another shape": with_bytes(npy, shape=(2, 2)),
    "weights that are said to be in another format": with_bytes(npy, stype="torch.Tensor"),
    "a header of terabytes": with_bytes(
        lambda weights: npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n")
    ),
    "a header with a negative shape": with_bytes(
        lambda weights: npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n")
    ),
    "a header that is no dictionary": with_bytes(lambda weights: npy_with_header("__import__('os').getcwd()\n")),
    "a header of brackets": with_bytes(lambda weights: npy_with_header("(" * 9000)),
    "a header of signs": with_bytes(lambda weights: npy_with_header("-" * 9000 + "1")),
    # The sender.
    "a node that was not asked": with_metadata(lambda sent: {"src_node_id": outsider(sent)}),
    "a node that does not exist": with_metadata(lambda sent: {"src_node_id": 2**62}),
    "the server": with_metadata(lambda sent: {"src_node_id": 1}),
    "another node of the cohort": with_metadata(lambda sent: {"src_node_id": sent.others[0].metadata.dst_node_id}),
    "a reply to another node's message": with_metadata(
        lambda sent: {"reply_to_message_id": sent.others[0].metadata.message_id}
    ),
    "a reply to an unknown message": with_metadata(lambda sent: {"reply_to_message_id": "unknown"}),
    "a reply to no message": with_metadata(lambda sent: {"reply_to_message_id": ""}),
    "two replies": lambda sent: [good(sent), good(sent)],
    "the same reply twice": lambda sent: [good(sent)] * 2,
    "a good and a bad reply": lambda sent: [good(sent), *with_metrics(error=2)(sent)],
    "a bad and a good reply": lambda sent: [*with_metrics(error=2)(sent), good(sent)],
    "a reply and an error": lambda sent: [good(sent), *with_error(1000, "the battery is empty")(sent)],
    "an error and a reply": lambda sent: [*with_error(1000, "the battery is empty")(sent), good(sent)],
    # Errors.
    "neither content nor error": neither_content_nor_error,
    "content and an error": content_and_error,
    "an error": with_error(1000, "the battery is empty"),
    "an error without a reason": with_error(1000, None),
    "an error with an empty reason": with_error(1000, ""),
    "an error whose reason is a number": with_error(1000, 7),
    "an error whose reason is bytes": with_error(1000, b"\xff"),
    "an error with a long reason": with_error(1000, "no " * 10**6),
    "an error of several lines": with_error(1000, "no\nno\r\x1b[2J"),
    "an error with a strange code": with_error(-(2**63), "no"),
    "two errors": lambda sent: with_error(1, "no")(sent) * 2,
    **pickles("/nonexistent/folder"),
}
