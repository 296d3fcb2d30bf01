"""The work of a round, which is the same for every engine, and the protocol by which an engine is asked for it.

Engines run in environments of their own, so this module needs only torch, NumPy and fedtune's models.
"""

import functools
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fedtune import rng
from fedtune.data.spec import DatasetSpec
from fedtune_clients import models

MODELS = {  # by their [model] tables
    "logistic": {"name": "logistic"},
    "mlp": {"name": "mlp"},
    "cnn": {"name": "cnn"},
    "lstm": {"name": "lstm", "hidden": 32, "layers": 1},  # the model of shakespeare.toml
    "leaf_lstm": {"name": "lstm", "hidden": 256, "layers": 2},  # the model of LEAF
}
NOT_COMPILED = ["cnn"]  # fedtune's compiled kernel does not have these
SEED, NUM_CLIENTS = 0, 100
IMAGE_CLASSES, CHARACTERS, WINDOW = 10, 80, 80
EMBEDDING = 8  # numbers for each character
LEARNING_RATE, BATCH_SIZE = 0.05, 20


class Sizes(NamedTuple):
    """How many examples a client has; those that are neither for training nor for validation are its test part."""

    train: int = 100
    validation: int = 12
    all: int = 124


SIZES = {"leaf_lstm": Sizes(40, 5, 50)}  # one example takes 190 times the arithmetic of the small LSTM


class Turn(NamedTuple):
    """What a client trains on in one round."""

    client: int
    order: list[int]  # of its training examples


class Part(NamedTuple):
    """A client's examples in the form that the model gets."""

    train: TensorDataset
    validation: TensorDataset


def sizes(model: str) -> Sizes:
    """How many examples a client has if it trains this model."""
    return SIZES.get(model, Sizes())


def is_lstm(model: str) -> bool:
    """Whether the model reads characters; other models see images."""
    return MODELS[model]["name"] == "lstm"


def make_spec(model: str) -> DatasetSpec:
    """What a model must know about the examples."""
    if is_lstm(model):
        return DatasetSpec((WINDOW,), "token", CHARACTERS)
    return DatasetSpec((28, 28), "real", IMAGE_CLASSES, scale=1 / 255)


def make_module(model: str, *, ours: bool = True) -> nn.Module:
    """The model with the weights from which every engine starts: fedtune's own module, or the textbook's form of it."""
    options = {name: value for name, value in MODELS[model].items() if name != "name"}
    torch.manual_seed(SEED)
    module: nn.Module = getattr(models, MODELS[model]["name"])(make_spec(model), **options)
    if ours or model != "cnn":  # fedtune writes the other models as textbooks do
        return module
    textbook = nn.Sequential(
        nn.Unflatten(1, (1, 28)),
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512),
        nn.ReLU(),
        nn.Linear(512, IMAGE_CLASSES),
    )
    textbook.load_state_dict(dict(zip(textbook.state_dict(), module.state_dict().values(), strict=True)))
    return textbook


def make_examples(model: str) -> tuple[np.ndarray, np.ndarray]:
    """x and y, (client * example, ...): MNIST's shape, a pattern for each class under noise; or text at random."""
    draws, size = rng.stream(SEED, "examples"), NUM_CLIENTS * sizes(model).all
    if is_lstm(model):
        y = draws.integers(0, CHARACTERS, size)
        return draws.integers(0, CHARACTERS, (size, WINDOW)).astype(np.uint8), y
    patterns = draws.integers(0, 256, (IMAGE_CLASSES, 28, 28))
    y = draws.integers(0, IMAGE_CLASSES, size)
    return ((patterns[y] + draws.integers(0, 256, (size, 28, 28))) // 2).astype(np.uint8), y


@functools.cache
def load(model: str) -> tuple[nn.Module, list[Part]]:
    """The first model in the textbook's form, and each client's training and validation examples as tensors in memory.

    Made once in each process, for every engine but fedtune.
    """
    spec, (train, validation, every) = make_spec(model), sizes(model)
    x, y = map(torch.from_numpy, make_examples(model))
    inputs = x.long() if spec.input_kind == "token" else x.float().mul_(spec.scale)
    parts = []
    for start in range(0, len(y), every):
        ends = start, start + train, start + train + validation
        parts.append(Part(*(TensorDataset(inputs[a:b], y[a:b]) for a, b in itertools.pairwise(ends))))
    return make_module(model, ours=False), parts


def plan_path(folder: str | Path, model: str, cohort_size: int) -> Path:
    """The file that holds the plan for cohorts of this size."""
    return Path(folder) / f"plan-{model}-{cohort_size}.npz"


@functools.cache
def read_plan(folder: str | Path, model: str, cohort_size: int) -> list[list[Turn]]:
    """For each round, its cohort's turns."""
    with np.load(plan_path(folder, model, cohort_size)) as plan:
        return [
            [Turn(client, order) for client, order in zip(clients, orders, strict=True)]
            for clients, orders in zip(plan["clients"].tolist(), plan["orders"].tolist(), strict=True)
        ]


def train_plainly(module: nn.Module, part: Part, order: list[int]) -> dict[str, float]:
    """Trains as most programs do, with a new DataLoader and a new optimiser; the metrics on the validation examples."""
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    module.train()
    for x, y in DataLoader(part.train, BATCH_SIZE, sampler=order):
        optimizer.zero_grad()
        cross_entropy(module(x), y).backward()
        optimizer.step()
    return measure(module, *part.validation.tensors)


def measure(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The mean loss and error."""
    module.eval()
    with torch.inference_mode():
        logits = module(x)
        return {"loss": cross_entropy(logits, y).item(), "error": (logits.argmax(1) != y).float().mean().item()}


def take_stdout() -> TextIO:
    """The stream for answers; the output of libraries goes to stderr from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def serve(answers: TextIO, train: Callable[[int, int], Tensor]) -> None:
    """Answers each line "COHORT_SIZE ROUNDS FILE" with the seconds that `train` took.

    `train` gives the flat weights after these rounds, which go to the file unless it is "-".
    """
    for line in sys.stdin:
        cohort_size, rounds, path = line.split()
        started = time.perf_counter()
        weights = train(int(cohort_size), int(rounds))
        seconds = time.perf_counter() - started
        assert weights.isfinite().all()
        if path != "-":
            np.save(path, weights.detach().numpy())
        print(seconds, file=answers, flush=True)
