"""The machine does small models' clients several at a time, and nobody can tell."""

import dataclasses

import numpy as np
import pytest
import torch

import fedtune.executors.machine as machine_module
from fedtune.client.tasks import EvaluateTask, Failure, PersonaliseTask, TrainTask, Update
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.executors.machine import Machine, MachineSettings

SIZES = (40, 12, 33, 90, 12, 21)
CONFIG = {"learning_rate": 0.3, "batch_size": 8, "epochs": 2, "dropout": 0.2}
SETTINGS = MachineSettings({"name": "logistic"}, "local_sgd", "cpu")

# Local SGD that notes of how many clients each call was, and fails on every odd learning rate.
PROGRAM = """
from fedtune_clients import local_sgd

HYPERPARAMETERS = local_sgd.HYPERPARAMETERS
CALLS = []


def num_together(model):
    return 3


def train(model, weights, examples, config, rng):
    CALLS.append(1)
    if config["learning_rate"] % 2 == 1:
        raise ValueError("odd")
    return local_sgd.train(model, weights, examples, config, rng)


def train_together(model, weights, examples, configs, rngs):
    CALLS.append(len(examples))
    if any(config["learning_rate"] % 2 == 1 for config in configs):
        raise ValueError("one of them is odd")
    return local_sgd.train_together(model, weights, examples, configs, rngs)
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


@pytest.mark.parametrize("largest", [1, 40 * 64, 100 * 64, machine_module.LARGEST_GROUP])
def test_what_is_done_together_has_the_bits_of_one_at_a_time(dataset, largest, monkeypatch):
    monkeypatch.setattr(machine_module, "LARGEST_GROUP", largest)
    machine = Machine(SETTINGS, dataset)
    weights = torch.randn(machine.model.num_weights)
    tasks = make_tasks()
    together = kept(machine.run_all(weights, tasks))
    assert together == [kept(machine.run_all(weights, [task]))[0] for task in tasks]
    assert not any(isinstance(result, Failure) for result in together)


def test_how_many_go_together(program, dataset, monkeypatch):
    machine = Machine(program, dataset)
    weights = torch.zeros(machine.model.num_weights)
    calls = machine.program.CALLS
    machine.run_all(weights, make_tasks())
    assert calls == [3, 3, 3, 3, 1]
    calls.clear()
    num_train = dataset.num_examples("train").tolist()
    monkeypatch.setattr(machine_module, "LARGEST_GROUP", 64 * sum(num_train[:2]))
    machine.run_all(weights, make_tasks()[:3])
    assert calls == [2, 1]


def test_in_bf16_everybody_trains_alone(program, dataset):
    machine = Machine(dataclasses.replace(program, precision="bf16"), dataset)
    machine.run_all(torch.zeros(machine.model.num_weights), make_tasks()[:3])
    assert machine.program.CALLS == [1, 1, 1]


def test_who_raises_is_lost_and_nobody_beside_it(program, dataset):
    machine = Machine(program, dataset)
    weights = torch.randn(machine.model.num_weights)
    tasks = [TrainTask(client, CONFIG | {"learning_rate": 1.0 if client == 1 else 0.5}, 1) for client in range(3)]
    first, second, third = machine.run_all(weights, tasks)
    assert second.message.startswith("client 1 with {")
    assert "ValueError: odd" in second.message
    assert kept([first, third]) == kept(Machine(SETTINGS, dataset).run_all(weights, [tasks[0], tasks[2]]))


def odd_program(tmp_path, body):
    """PROGRAM with another train_together, which has this body after its first line."""
    path = tmp_path / "program.py"
    path.write_text(
        PROGRAM[: PROGRAM.index("    if any(")]
        + f"    rows = local_sgd.train_together(model, weights, examples, configs, rngs)\n    {body}\n"
    )
    return dataclasses.replace(SETTINGS, client=str(path))


TASKS = [TrainTask(client, CONFIG, seed=client) for client in range(3)]
WRONG_ROW = r"InputError: train_together, for each client, must return a float32 tensor of shape \(195,\), got "


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return rows[:2]", "InputError: train_together must return weights for each of 3 clients, got 2$"),
        ("return [row.double() for row in rows]", rf"{WRONG_ROW}float64 of shape \(195,\)$"),
        ("return [row.mean() for row in rows]", rf"{WRONG_ROW}float32 of shape \(\)$"),
    ],
)
def test_a_train_together_that_does_not_go_is_told_and_not_tried_again(tmp_path, dataset, body, reason):
    machine = Machine(odd_program(tmp_path, body), dataset)
    weights = torch.randn(machine.model.num_weights)
    with pytest.warns(RuntimeWarning, match=f"^clients now train one at a time: train_together raised {reason}"):
        results = kept(machine.run_all(weights, TASKS))
    assert results == kept(machine.run_all(weights, TASKS)) == kept(Machine(SETTINGS, dataset).run_all(weights, TASKS))
    assert machine.program.CALLS == [3, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("body", ["return iter(rows)", "model.load(rows[2]); return [*rows[:2], model.flat]"])
def test_whatever_holds_the_weights_will_do(tmp_path, dataset, body):
    machine = Machine(odd_program(tmp_path, body), dataset)
    weights = torch.randn(machine.model.num_weights)
    assert kept(machine.run_all(weights, TASKS)) == kept(Machine(SETTINGS, dataset).run_all(weights, TASKS))
    assert machine.program.CALLS == [3]


def test_a_train_together_from_elsewhere_is_not_the_twin_of_a_train_of_ones_own(tmp_path, dataset):
    path = tmp_path / "program.py"
    path.write_text(
        "from fedtune_clients.local_sgd import *\n\n\n"
        "def train(model, weights, examples, config, rng):\n    return weights + 1\n"
    )
    machine = Machine(dataclasses.replace(SETTINGS, client=str(path)), dataset)
    weights = torch.randn(machine.model.num_weights)
    assert all(torch.equal(result.weights, weights + 1) for result in machine.run_all(weights, TASKS))


def test_a_program_that_trains_together_must_say_how_many(tmp_path, dataset):
    path = tmp_path / "program.py"
    settings = dataclasses.replace(SETTINGS, client=str(path))
    path.write_text(PROGRAM.replace("def num_together", "def other"))
    with pytest.raises(InputError, match=f"the client program '{path}' has train_together and must have num_together"):
        Machine(settings, dataset)


@pytest.mark.parametrize("count", [0, 2.0, None, True])
def test_the_number_must_be_one(tmp_path, dataset, count):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.replace("return 3", f"return {count}"))
    with pytest.raises(InputError, match=f"num_together of '{path}' must be a whole number >= 1, got {count}"):
        Machine(dataclasses.replace(SETTINGS, client=str(path)), dataset)
