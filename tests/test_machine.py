"""The machine does one task at a time, and no task can tell what the machine did before."""

import dataclasses

import numpy as np
import pytest
import torch

from fedtune.client.tasks import EvaluateTask, Failure, PersonaliseTask, TrainTask, Update
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.executors.machine import Machine, MachineSettings

SIZES = (40, 12, 33, 90, 12, 21)
CONFIG = {"learning_rate": 0.3, "batch_size": 8, "epochs": 2, "dropout": 0.2}
SETTINGS = MachineSettings({"name": "logistic"}, "local_sgd", "cpu")

# Local SGD that fails on every odd learning rate. It still has the functions that once trained several clients at once.
PROGRAM = """
from fedtune_clients import local_sgd

HYPERPARAMETERS = local_sgd.HYPERPARAMETERS


def train(model, weights, examples, config, rng):
    if config["learning_rate"] % 2 == 1:
        raise ValueError("odd")
    return local_sgd.train(model, weights, examples, config, rng)


def num_together(model):
    raise ValueError("nobody asks")


def train_together(model, weights, examples, configs, rngs):
    raise ValueError("nobody calls")
"""


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    clients = {
        str(number): (rng.integers(0, 256, (size, 8, 8), dtype=np.uint8), rng.integers(0, 3, size))
        for number, size in enumerate(SIZES)
    }
    return FederatedDataset.from_clients(clients, name="made up", num_classes=3, scale=1 / 255)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return dataclasses.replace(SETTINGS, client=str(path))


def kept(results):
    """Comparable by ==, down to the bits of the weights."""
    return [(each.weights.numpy().tobytes(), each.metrics) if isinstance(each, Update) else each for each in results]


def make_tasks():
    clients = range(len(SIZES))
    return [
        *(TrainTask(client, CONFIG, seed=client, error_before=client % 2 == 0) for client in clients),
        EvaluateTask((0, 2)),
        EvaluateTask((1,)),
        *(PersonaliseTask(client, CONFIG | {"batch_size": 5 + client}, seed=7) for client in reversed(clients)),
        TrainTask(3, CONFIG | {"momentum": 0.9}, seed=1),
    ]


def test_a_result_does_not_depend_on_what_the_machine_did_before(dataset):
    machine = Machine(SETTINGS, dataset)
    weights = torch.randn(machine.model.num_weights)
    tasks = make_tasks()
    results = kept(machine.run_all(weights, tasks))
    assert results == [kept(Machine(SETTINGS, dataset).run_all(weights, [task]))[0] for task in tasks]
    assert results == kept(machine.run_all(weights, tasks[::-1]))[::-1]
    assert not any(isinstance(result, Failure) for result in results)


def test_a_program_that_could_train_several_clients_trains_one_at_a_time(program, dataset):
    machine, plain = Machine(program, dataset), Machine(SETTINGS, dataset)
    weights = torch.randn(machine.model.num_weights)
    assert kept(machine.run_all(weights, make_tasks())) == kept(plain.run_all(weights, make_tasks()))


def test_who_raises_is_lost_and_nobody_else(program, dataset):
    machine = Machine(program, dataset)
    weights = torch.randn(machine.model.num_weights)
    tasks = [TrainTask(client, CONFIG | {"learning_rate": 1.0 if client == 1 else 0.5}, 1) for client in range(3)]
    first, second, third = machine.run_all(weights, tasks)
    assert second.message.startswith("client 1 with {")
    assert "ValueError: odd" in second.message
    assert kept([first, third]) == kept(Machine(SETTINGS, dataset).run_all(weights, [tasks[0], tasks[2]]))
