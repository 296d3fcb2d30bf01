"""Whatever a client program does with what it is handed, it can't change another client's training or the server."""

import pytest

import fedtune
from fedtune.errors import InputError

IN_PLACE = """
import torch

from fedtune.client import Hyperparameter

HYPERPARAMETERS = {"learning_rate": Hyperparameter(0.1, low=0.0, low_open=True)}


def train(model, weights, examples, config, rng):
    weights = WEIGHTS
    model.load(weights)
    model.module.zero_grad()
    model.loss(model.module(examples.x), examples.y).backward()
    for view, parameter in zip(model.slices(weights), model.parameters):
        view.sub_(config["learning_rate"] * parameter.grad)
    config["learning_rate"] = 1e9
    return weights
"""
WRONG = """
import numpy
import torch

from fedtune.client import Hyperparameter

HYPERPARAMETERS = {"learning_rate": Hyperparameter(0.1, low=0.0, low_open=True)}


def train(model, weights, examples, config, rng):
    return RETURNED
"""
SETTINGS = {
    "cohort_size": 4,
    "model": {"name": "logistic"},
    "space": {"client": {}, "server": {}},
    "max_rounds": 3,
    "total_rounds": 3,
    "tuners": ["manual"],
    "evaluation": {"clients": 5, "every": 1},
}


def run(tmp_path, name, program, executor, workers=1, **settings):
    """The test and the validation error of every round; the data are digits as a file of one's own makes them."""
    (tmp_path / "data.py").write_text(
        "from fedtune_datasets import digits\n\n\ndef make():\n    return digits.load()\n"
    )
    path = tmp_path / f"{name}.py"
    path.write_text(program)
    finished = fedtune.compare(
        f"{tmp_path / 'data.py'}:make",
        out=tmp_path / f"run-{name}-{executor}",
        executor=executor,
        workers=workers,
        client={"name": str(path)},
        **SETTINGS | settings,
    )
    return finished.rounds[["validation_error", "validation_loss", "test_error", "test_loss"]].to_numpy().tolist()


@pytest.mark.parametrize(("executor", "workers"), [("serial", 1), ("pool", 2), ("batched", 1)])
def test_a_program_that_changes_the_weights_in_place_changes_its_own(tmp_path, executor, workers):
    wanted = run(tmp_path, "copies", IN_PLACE.replace("WEIGHTS", "weights.clone()"), "serial")
    assert run(tmp_path, "in_place", IN_PLACE.replace("WEIGHTS", "weights"), executor, workers) == wanted


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("weights[:1]", "float32 of shape (1,)"),
        ("weights.double()", "float64 of shape (650,)"),
        ("weights.long()", "int64 of shape (650,)"),
        ("weights.reshape(10, 65)", "float32 of shape (10, 65)"),
        ("weights.numpy()", "ndarray"),
        ("None", "NoneType"),
    ],
)
def test_a_program_must_return_weights(tmp_path, returned, said):
    message = (
        r"^every client failed in the first round, the first with: client \d+ with .*: InputError: train must return"
    )
    with pytest.raises(InputError, match=message) as caught:
        run(tmp_path, "wrong", WRONG.replace("RETURNED", returned), "serial")
    assert f"train must return a float32 tensor of shape (650,), got {said} (" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_carry_gradients_are_taken_without_them(tmp_path):
    plain = run(tmp_path, "plain", WRONG.replace("RETURNED", "weights * 0.5"), "serial")
    with_gradients = WRONG.replace("RETURNED", "weights.requires_grad_() * 0.5")
    assert run(tmp_path, "with_gradients", with_gradients, "serial") == plain


def test_a_run_whose_first_round_failed_can_be_resumed_with_a_mended_program(tmp_path):
    with pytest.raises(InputError, match="every client failed in the first round"):
        run(tmp_path, "mended", "raise_it = 1\n" + WRONG.replace("RETURNED", "1 / 0"), "pool", 2)
    (tmp_path / "mended.py").write_text(WRONG.replace("RETURNED", "weights * 0.5"))
    fedtune.plugins._module.cache_clear()
    resumed = fedtune.resume(tmp_path / "run-mended-pool")
    assert resumed.results["rounds"].tolist() == [3]
