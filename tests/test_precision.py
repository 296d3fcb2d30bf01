"""bf16 training: opt-in, close to fp32, and float32 everywhere outside of training."""

import numpy as np
import pytest
import torch

import fedtune
from fedtune import plugins
from fedtune.client.tasks import EvaluateTask, TrainTask
from fedtune.errors import InputError
from fedtune.executors.batched import BatchedMachine
from fedtune.executors.machine import Machine, MachineSettings

CONFIG = {"learning_rate": 0.1, "momentum": 0.5, "epochs": 1, "batch_size": 10, "weight_decay": 1e-3, "dropout": 0.0}
TASKS = [TrainTask(client, CONFIG, seed=client) for client in (3, 0)]


@pytest.fixture(scope="module")
def dataset():
    return plugins.load_dataset({"name": "digits"})


def machines(model, dataset):
    return [
        Machine(MachineSettings({"name": model}, "local_sgd", "cpu", precision), dataset)
        for precision in ("fp32", "bf16")
    ]


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn"])
def test_an_update_in_bf16_is_close_and_not_equal(model, dataset):
    """bfloat16 has 8 bits: a relative rounding of 2^-9 an operation, so less than a tenth of the way after some steps.

    Steps that all take the slope at the first step's weights end 0.18 of the way from here.
    """
    fp32, bf16 = machines(model, dataset)
    weights = fp32.model.flat.clone()
    for exact, rounded in zip(fp32.run_all(weights, TASKS), bf16.run_all(weights, TASKS), strict=True):
        assert rounded.weights.dtype == torch.float32
        distance = (rounded.weights - exact.weights).norm() / (exact.weights - weights).norm()
        assert 0 < distance < 0.1


def test_errors_are_measured_in_fp32(dataset):
    fp32, bf16 = machines("mlp", dataset)
    weights = fp32.model.flat.clone()
    task = EvaluateTask((0, 1))
    assert fp32.run(weights, task) == bf16.run(weights, task)


def test_the_batched_form_trains_in_bf16_too(dataset):
    settings = MachineSettings({"name": "mlp"}, "local_sgd", "cpu", "bf16")
    said = []
    alone, together = Machine(settings, dataset), BatchedMachine(settings, dataset, said.append)
    weights = alone.model.flat.clone()
    for one, other in zip(alone.run_all(weights, TASKS), together.run_all(weights, TASKS), strict=True):
        assert (one.weights - other.weights).norm() / (one.weights - weights).norm() < 0.1
    assert said == []


def test_pool_and_serial_agree_and_a_run_says_its_precision(tmp_path):
    settings = {"precision": "bf16", "max_rounds": 2, "total_rounds": 2, "tuners": ["manual"]}
    serial = fedtune.compare("digits", out=tmp_path / "serial", executor="serial", **settings)
    pool = fedtune.compare("digits", out=tmp_path / "pool", executor="pool", workers=2, **settings)
    exact = fedtune.compare("digits", out=tmp_path / "exact", executor="serial", **{**settings, "precision": "fp32"})
    results = [(run.folder / "rounds.parquet").read_bytes() for run in (serial, pool, exact)]
    assert results[0] == results[1] != results[2]
    assert serial.settings["precision"] == "bf16"
    assert np.isfinite(serial.results["test_error"]).all()


def test_another_precision_is_refused(tmp_path):
    with pytest.raises(InputError, match="precision must be 'fp32' or 'bf16', got 'fp16'"):
        fedtune.compare("digits", out=tmp_path / "run", precision="fp16")
