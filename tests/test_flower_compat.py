"""Fails loudly when a new Flower no longer has what fedtune takes from its private parts."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedtune.server import flower_compat
from fedtune.server.flower_compat import (
    ViewArray,
    addressed,
    ensure_task_identity,
    entries_of,
    fill,
    pack,
    reply,
    stamp,
)


@pytest.fixture(autouse=True)
def identity():
    ensure_task_identity()


def message(node=2):
    return Message(RecordDict({"config": ConfigRecord({"a": 1})}), dst_node_id=node, message_type=MessageType.TRAIN)


def test_task_identity_is_set_only_where_it_is_not(monkeypatch):
    monkeypatch.setattr(TaskIdentity, "_run_id", None)
    ensure_task_identity()
    assert TaskIdentity.run_id == flower_compat.RUN_ID
    TaskIdentity.run_id = 7
    ensure_task_identity()
    assert TaskIdentity.run_id == 7


def test_a_reply_says_what_it_answers():
    sent = message()
    stamp(sent, "12-3")
    assert sent.metadata.message_id == "12-3"
    assert Message(Error(1000, "no"), reply_to=sent).metadata.reply_to_message_id == "12-3"


def as_sent(message):
    """Everything that Flower sends of a message, without the moment at which it was made."""
    metadata = {name: value for name, value in vars(message.metadata).items() if name not in ("_created_at", "_ttl")}
    return metadata, message.content.deflate(), message.has_error(), vars(message).keys()


def test_a_message_to_another_node_is_what_flower_makes():
    content = RecordDict({"config": ConfigRecord({"a": 2})})
    first, other = message(), Message(content, dst_node_id=7, message_type=MessageType.TRAIN)
    made = addressed(first, content, 7)
    assert as_sent(made) == as_sent(other)
    assert (made.metadata.created_at, made.metadata.ttl) == (first.metadata.created_at, first.metadata.ttl)
    assert isinstance(made, Message)
    stamp(made, "2")
    assert (first.metadata.message_id, first.metadata.dst_node_id) == ("", 2)
    assert Message.inflate(made.deflate(), made.children).metadata.dst_node_id == 7


@pytest.mark.parametrize("task_id", [None, 5])
def test_a_reply_is_what_flower_makes(task_id):
    content = RecordDict({"metrics": MetricRecord({"error": 0.5})})
    sent = Message(RecordDict(), dst_node_id=4, message_type="evaluate", group_id="g", ttl=60.0, dst_task_id=task_id)
    stamp(sent, "12-3")
    made, expected = reply(sent, content), Message(content, reply_to=sent)
    assert as_sent(made) == as_sent(expected)
    assert (made.metadata.src_task_id, made.metadata.reply_to_message_id) == (task_id, "12-3")
    assert sent.metadata.created_at <= made.metadata.created_at <= expected.metadata.created_at
    for answer in (made, expected):  # both expire when the message does
        expires = answer.metadata.created_at + answer.metadata.ttl
        assert expires == pytest.approx(sent.metadata.created_at + 60.0, abs=1e-3)
    assert Message.inflate(made.deflate(), made.children).metadata.dst_node_id == 1


def test_entries_are_those_of_the_record():
    entries = {"seed": 3, "error_before": True}
    assert entries_of(ConfigRecord({**entries})) == entries


def test_the_run_is_flowers():
    assert isinstance(flower_compat.empty_run(), Run)


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        (ConfigRecord, {"seed": 3, "error_before": True, "hyperparameters": "{}"}),
        (MetricRecord, {"error": 0.5, "num_train": 7}),
        (ArrayRecord, {"weights": Array(np.arange(5, dtype=np.float32))}),
        (RecordDict, {"config": ConfigRecord({"a": 1}), "metrics": MetricRecord({"b": 2.0})}),
    ],
)
def test_a_filled_record_is_what_flower_makes(kind, entries):
    filled, checked = fill(kind(), entries), kind({**entries})
    assert filled == checked
    assert list(filled.items()) == list(entries.items())
    assert filled.deflate() == checked.deflate()
    filled["more"] = next(iter(entries.values()))
    assert len(filled) == len(entries) + 1


def test_a_packed_array_is_a_view_that_flower_can_serialise():
    weights = np.arange(5, dtype=np.float32)
    record = pack(weights)
    assert record["weights"].numpy() is weights
    assert isinstance(record["weights"], Array)
    copied = ArrayRecord.inflate(record.deflate(), {array.object_id: array for array in record.values()})
    assert np.array_equal(copied["weights"].numpy(), weights)
    plain = Array(dtype="float32", shape=(5,), stype="numpy.ndarray", data=record["weights"].data)
    assert np.array_equal(plain.numpy(), weights)


def test_on_the_wire_a_view_is_a_plain_array():
    weights = np.arange(5, dtype=np.float32)
    view, plain = ViewArray(weights), Array(weights)
    assert view.deflate() == plain.deflate()
    assert view.object_id == plain.object_id
    assert view.children.keys() == plain.children.keys()


def test_two_views_of_the_same_values_are_equal_to_flower():
    weights = np.arange(5, dtype=np.float32)
    assert ViewArray(weights).object_id == ViewArray(weights.copy()).object_id != ViewArray(weights + 1).object_id
