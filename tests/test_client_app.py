import json

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from kernel_in_torch import written

from fedtune import plugins
from fedtune.client.examples import StoredExamples
from fedtune.client.flat_model import FlatModel
from fedtune.client.tasks import TrainTask
from fedtune.client.work import evaluate_clients, generator
from fedtune.errors import InputError
from fedtune.executors.machine import Machine, MachineSettings
from fedtune.server.flower_compat import ensure_task_identity, stamp
from fedtune_clients import local_sgd
from fedtune_clients.app import app

DATA = {"name": "digits", "num_clients": 6, "examples_per_client": 40}
SETTINGS = """
[data]
name = "digits"
num_clients = 6
examples_per_client = 40
[model]
name = "mlp"
hidden = [12]
"""
CONFIG = {"learning_rate": 0.2, "batch_size": 8, "epochs": 2}


@pytest.fixture(scope="module")
def dataset():
    return plugins.load_dataset(DATA)


@pytest.fixture
def model(dataset):
    torch.manual_seed(0)
    return FlatModel(plugins.make_model({"name": "mlp", "hidden": [12]}, dataset.spec))


@pytest.fixture(autouse=True)
def _task_identity():
    ensure_task_identity()


def context(partition=2, **run_config):
    node_config = {} if partition is None else {"partition-id": partition}
    return Context(1, 9, node_config, RecordDict(), {"settings": SETTINGS, **run_config})


def message(message_type, weights, **config):
    content = RecordDict()
    content["arrays"] = ArrayRecord({"weights": Array(weights.numpy())})
    content["config"] = ConfigRecord({"seed": 5, "hyperparameters": json.dumps(CONFIG), **config})
    sent = Message(content, dst_node_id=9, message_type=message_type)
    stamp(sent, "question")
    return sent


def metrics_of(reply):
    return dict(reply.content.metric_records["metrics"])


def trained(model, weights, dataset, client):
    """The client's weights after local SGD."""
    examples = StoredExamples(*dataset.examples(client, "train"), dataset.spec, "cpu").all()
    return local_sgd.train(model, weights, examples, CONFIG, generator(5)).clone()


def validation(model, weights, dataset, client):
    """The error and the loss."""
    (metrics,) = evaluate_clients(model, weights, dataset, [client])
    return [metrics["validation_error"], metrics["validation_loss"]]


def test_train_answers_with_the_trained_weights_and_metrics(model, dataset):
    weights = model.flat.clone()
    reply = app(message(MessageType.TRAIN, weights), context())
    expected = trained(model, weights, dataset, 2)
    array = reply.content.array_records["arrays"]["weights"].numpy()
    assert array.dtype == np.float32
    assert np.array_equal(array, expected.numpy())
    metrics = metrics_of(reply)
    assert [metrics.pop("error"), metrics.pop("loss")] == pytest.approx(validation(model, expected, dataset, 2))
    assert metrics == {f"num_{part}": dataset.num_examples(part)[2] for part in ("train", "validation")}
    assert reply.metadata.reply_to_message_id == "question"
    assert reply.metadata.src_node_id == 9


def test_train_measures_the_error_before_where_the_message_asks_for_it(model, dataset):
    metrics = metrics_of(app(message(MessageType.TRAIN, model.flat, error_before=True), context()))
    before = validation(model, model.flat.clone(), dataset, 2)
    assert [metrics["error_before"], metrics["loss_before"]] == pytest.approx(before)


def test_one_replys_weights_survive_the_next_message(model):
    first = app(message(MessageType.TRAIN, model.flat), context()).content.array_records["arrays"]["weights"]
    before = first.numpy().copy()
    app(message(MessageType.TRAIN, model.flat, seed=6), context(partition=3))
    assert np.array_equal(first.numpy(), before)


def test_the_message_may_choose_the_client(model):
    chosen = app(message(MessageType.TRAIN, model.flat, client=4), context())
    there = app(message(MessageType.TRAIN, model.flat), context(partition=4))
    here = app(message(MessageType.TRAIN, model.flat), context())
    assert metrics_of(chosen) == metrics_of(there) != metrics_of(here)


def test_evaluate_measures_the_weights_it_is_sent(model, dataset):
    weights = model.flat.clone()
    reply = app(message(MessageType.EVALUATE, weights, personalise=False), context())
    assert metrics_of(reply) == evaluate_clients(model, weights, dataset, [2])[0]


def test_evaluate_personalises_where_the_message_asks_for_it(model, dataset):
    weights = model.flat.clone()
    reply = app(message(MessageType.EVALUATE, weights, personalise=True), context())
    assert metrics_of(reply) == evaluate_clients(model, trained(model, weights, dataset, 2), dataset, [2])[0]


def test_query_says_which_client_this_is():
    sent = Message(RecordDict(), dst_node_id=9, message_type=MessageType.QUERY)
    assert metrics_of(app(sent, context(partition=3))) == {"client": 3}


def test_another_client_program_can_be_named(model, tmp_path):
    program = tmp_path / "idle.py"
    program.write_text("HYPERPARAMETERS = {}\ndef train(model, weights, examples, config, rng):\n    return weights\n")
    settings = f"{SETTINGS}\n[client]\nname = '{program}'\n"
    reply = app(message(MessageType.TRAIN, model.flat), context(settings=settings))
    assert np.array_equal(reply.content.array_records["arrays"]["weights"].numpy(), model.flat.numpy())


def test_clients_train_in_the_precision_of_the_settings(model, dataset):
    reply = app(message(MessageType.TRAIN, model.flat), context(settings=f"precision = 'bf16'\n{SETTINGS}"))
    machine = Machine(MachineSettings({"name": "mlp", "hidden": [12]}, "local_sgd", "cpu", "bf16"), dataset)
    in_bf16 = machine.run(model.flat.clone(), TrainTask(2, CONFIG, seed=5)).weights.numpy()
    assert np.array_equal(reply.content.array_records["arrays"]["weights"].numpy(), in_bf16)
    assert not np.array_equal(in_bf16, trained(model, model.flat.clone(), dataset, 2).numpy())


@pytest.mark.parametrize("message_type", [MessageType.TRAIN, MessageType.EVALUATE, MessageType.QUERY])
def test_a_node_without_the_runs_kernel_answers_why(model, tmp_path, message_type):
    settings = f"engine = 'compiled'\n{SETTINGS}\n[client]\nname = '{written(tmp_path, 'it is not built')}'\n"
    reply = app(message(message_type, model.flat), context(settings=settings))
    assert reply.error.reason == (
        "node 9: engine must be 'torch' here, got 'compiled': it is not built; mend that on the node, or start a new "
        "run with engine = 'torch' in its settings"
    )


def test_clients_train_in_the_engine_of_the_settings(model, dataset, tmp_path):
    """Without one they train in torch: nodes that choose for themselves could differ."""
    client = written(tmp_path)
    weights = {}
    for engine in ("compiled", "torch", "auto"):
        settings = f"engine = '{engine}'\n{SETTINGS}\n[client]\nname = '{client}'\n"
        reply = app(message(MessageType.TRAIN, model.flat), context(settings=settings))
        weights[engine] = reply.content.array_records["arrays"]["weights"].numpy().copy()
    machine = Machine(MachineSettings({"name": "mlp", "hidden": [12]}, client, "cpu", engine="compiled"), dataset)
    compiled = machine.run(model.flat.clone(), TrainTask(2, CONFIG, seed=5)).weights.numpy()
    assert np.array_equal(weights["compiled"], compiled)
    assert np.array_equal(weights["auto"], weights["torch"])
    assert np.array_equal(weights["torch"], trained(model, model.flat.clone(), dataset, 2).numpy())
    assert not np.array_equal(weights["compiled"], weights["torch"])


@pytest.mark.parametrize("partition", [None, 6, -1, "2"])
def test_a_partition_id_that_is_no_client_is_an_input_error(model, partition):
    with pytest.raises(InputError, match=r"the client must be a whole number in 0..5, got"):
        app(message(MessageType.TRAIN, model.flat), context(partition))


def test_missing_settings_are_an_input_error(model):
    with pytest.raises(InputError, match="the run's config must hold 'settings'"):
        app(message(MessageType.TRAIN, model.flat), Context(1, 9, {"partition-id": 0}, RecordDict(), {}))


def test_a_missing_seed_is_an_input_error(model):
    with pytest.raises(InputError, match="the message's seed must be a whole number, got 'x'"):
        app(message(MessageType.TRAIN, model.flat, seed="x"), context())
