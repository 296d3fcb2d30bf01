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
from fedtune.layers import resolve_settings
from fedtune.runs.prepare import prepare
from fedtune.runs.run_folder import claim_folder

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


def compare(folder, **changes):
    """A finished run, without the figures that a command draws."""
    settings = resolve_settings("digits", {"max_rounds": 2, "total_rounds": 2, "tuners": ["manual"]} | changes)
    prepared = prepare(settings)
    claim_folder(folder, prepared.settings, force=False)
    prepared.run(folder, lambda event: None)
    return fedtune.read_run(folder)


def test_pool_and_serial_agree_and_a_run_says_its_precision(tmp_path):
    serial = compare(tmp_path / "serial", precision="bf16", executor="serial")
    pool = compare(tmp_path / "pool", precision="bf16", executor="pool", workers=2)
    exact = compare(tmp_path / "exact", precision="fp32", executor="serial")
    results = [(run.folder / "rounds.parquet").read_bytes() for run in (serial, pool, exact)]
    assert results[0] == results[1] != results[2]
    assert serial.settings["precision"] == "bf16"
    assert np.isfinite(serial.results["test_error"]).all()


def test_another_precision_is_refused(tmp_path):
    with pytest.raises(InputError, match="precision must be 'fp32' or 'bf16', got 'fp16'"):
        fedtune.compare("digits", out=tmp_path / "run", precision="fp16")
