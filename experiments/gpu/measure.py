"""The measurements of run.py: rounds of several engines on one device, in turn, written row by row."""

import argparse
import copy
import csv
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from fedtune import plugins, rng
from fedtune.client.tasks import Result, TrainTask, Update
from fedtune.client.work import generator
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.executors.batched import BatchedMachine
from fedtune.executors.machine import Machine, MachineSettings
from fedtune_clients import batched_steps

PACKAGE = Path(batched_steps.__file__).parent
OPTIONS: dict[str, dict[str, Any]] = {"lstm": {"hidden": 32, "layers": 1}}  # the model of shakespeare.toml
EXAMPLES = 124  # of a client; 99 of them train
IMAGE_CLASSES, CHARACTERS, WINDOW = 10, 80, 80
CONFIG = {"learning_rate": 0.05, "batch_size": 20, "epochs": 1}
CHECKED = 8  # clients that are compared with the CPU
MOST_ROUNDS = 5  # that are timed
PROFILE_SECONDS = 30.0
COLUMNS = (
    "device",
    "model",
    "clients",
    "engine",
    "seconds_a_round",
    "least",
    "most",
    "timed_rounds",
    "peak_megabytes",
    "distance_from_cpu",
    "bits_repeat",
    "bits_of_batched",
)

Train = Callable[[Tensor, Sequence[TrainTask]], list[Tensor]]  # the clients' weights, on the CPU


class Case(NamedTuple):
    """What the engines of a model and a number of clients have in common."""

    model: str
    dataset: FederatedDataset
    weights: Tensor
    tasks: list[TrainTask]


def make_dataset(model: str, num_clients: int) -> FederatedDataset:
    """Images of MNIST's shape, a pattern for each class under noise; or characters at random."""
    draws, size = rng.stream(0, "examples"), num_clients * EXAMPLES
    if model == "lstm":
        x, y = draws.integers(0, CHARACTERS, (size, WINDOW), np.uint8), draws.integers(0, CHARACTERS, size)
        kind: dict[str, Any] = {"num_classes": CHARACTERS, "input_kind": "token"}
    else:
        patterns, y = draws.integers(0, 128, (IMAGE_CLASSES, 28, 28), np.uint8), draws.integers(0, IMAGE_CLASSES, size)
        x = patterns[y] + draws.integers(0, 128, (size, 28, 28), np.uint8)
        kind = {"num_classes": IMAGE_CLASSES, "scale": 1 / 255}
    return FederatedDataset.from_arrays(x, y, np.full(num_clients, EXAMPLES), name="synthetic", **kind)


def settings_of(model: str, device: str) -> MachineSettings:
    """By files, so that fedtune need not be installed."""
    table = {"name": f"{PACKAGE / 'models.py'}:{model}", **OPTIONS.get(model, {})}
    return MachineSettings(table, str(PACKAGE / "local_sgd.py"), device)


def make_case(model: str, num_clients: int) -> Case:
    dataset = make_dataset(model, num_clients)
    torch.manual_seed(0)
    module = plugins.make_model(settings_of(model, "cpu").model, dataset.spec)
    weights = parameters_to_vector(module.parameters()).detach()
    return Case(model, dataset, weights, [TrainTask(client, CONFIG, seed=client) for client in range(num_clients)])


def engines_of(case: Case, device: str) -> Iterator[tuple[str, Train]]:
    """Each engine with its name; each is made when it is asked for."""
    settings = settings_of(case.model, device)
    yield "batched", weights_of(BatchedMachine(settings, case.dataset, say=sys.exit).run_all)
    if device != "cpu":
        with without_graphs():
            yield "batched, no graphs", weights_of(BatchedMachine(settings, case.dataset, say=sys.exit).run_all)
    yield "one at a time", weights_of(Machine(settings, case.dataset).run_all)
    yield "plain loop", plain_loop(case, device)


def weights_of(run: Callable[[Tensor, Sequence[TrainTask]], list[Result]]) -> Train:
    def train(weights: Tensor, tasks: Sequence[TrainTask]) -> list[Tensor]:
        results = run(weights, tasks)
        failures = [result for result in results if not isinstance(result, Update)]
        assert not failures, failures[0]
        return [result.weights for result in results]

    return train


@contextmanager
def without_graphs() -> Iterator[None]:
    capture_on = batched_steps.capture_on
    batched_steps.capture_on = lambda device: None
    try:
        yield
    finally:
        batched_steps.capture_on = capture_on


def plain_loop(case: Case, device: str) -> Train:
    """As most programs do it: a copy of the model, a DataLoader and an optimiser for each client."""
    spec = case.dataset.spec
    module = plugins.make_model(settings_of(case.model, device).model, spec).to(device)

    def tensors(client: int, part: str) -> list[Tensor]:
        x, y = map(torch.from_numpy, case.dataset.examples(client, part))
        return [x.long() if spec.input_kind == "token" else x.float().mul_(spec.scale), y]

    parts = [[tensors(task.client, part) for part in ("train", "validation")] for task in case.tasks]

    def train(weights: Tensor, tasks: Sequence[TrainTask]) -> list[Tensor]:
        nn.utils.vector_to_parameters(weights.to(device), module.parameters())
        return [train_plainly(copy.deepcopy(module), *parts[task.client], task.seed, device) for task in tasks]

    return train


def train_plainly(local: nn.Module, train: list[Tensor], validation: list[Tensor], seed: int, device: str) -> Tensor:
    """The weights after one epoch, in the order of examples that local SGD draws; it also measures, as fedtune does."""
    draws = generator(seed)
    draws.integers(2**63)  # the seed of the dropout layers
    order = draws.permutation(len(train[0])).tolist()
    optimizer = torch.optim.SGD(local.parameters(), lr=CONFIG["learning_rate"])
    local.train()
    for x, y in DataLoader(TensorDataset(*train), CONFIG["batch_size"], sampler=order):
        optimizer.zero_grad()
        nn.functional.cross_entropy(local(x.to(device)), y.to(device)).backward()
        optimizer.step()
    local.eval()
    with torch.inference_mode():
        x, y = (tensor.to(device) for tensor in validation)
        logits = local(x)
        _ = nn.functional.cross_entropy(logits, y).item(), (logits.argmax(1) != y).float().mean().item()
    return parameters_to_vector(local.parameters()).detach().cpu()


def measure(train: Train, case: Case, seconds: float) -> tuple[list[float], list[Tensor], bool]:
    """The seconds of the timed rounds, the clients' weights, and whether each round gave the same bits.

    The first round is not timed: it chooses kernels and records graphs. At least one round is timed.
    """
    started, times, repeats = time.monotonic(), [], True
    first = train(case.weights, case.tasks)
    while len(times) < MOST_ROUNDS and (not times or time.monotonic() - started + max(times) < seconds):
        before = time.monotonic()
        again = train(case.weights, case.tasks)
        times.append(time.monotonic() - before)
        repeats &= all(map(torch.equal, first, again))
    return times, first, repeats


def distance(rows: Sequence[Tensor], expected: Sequence[Tensor], weights: Tensor) -> float:
    """The largest distance of a client's weights from the expected ones, over the way that training went."""
    ratios = [(row - own).norm() / (own - weights).norm() for row, own in zip(rows, expected, strict=False)]
    return max(map(float, ratios))


def profiled(case: Case, device: str, seconds: float) -> str:
    """The operations that take most of the batched executor's time."""
    _, train = next(engines_of(case, device))
    train(case.weights, case.tasks)
    activities = [ProfilerActivity.CPU] if device == "cpu" else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    stop = time.monotonic() + seconds / 3  # the rest is for the profiler itself
    with profile(activities=activities) as profiler:
        train(case.weights, case.tasks)
        while time.monotonic() < stop:
            train(case.weights, case.tasks)
    by = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60)
    return f"{case.model}, {len(case.tasks)} clients, batched\n{table}\n"


def main(arguments: argparse.Namespace, deadline: float) -> None:
    """Measures each case and prints it. A row is in the file as soon as it is measured."""
    device = arguments.device
    if device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"--device {device} needs a GPU that torch {torch.__version__} can use, and finds none")
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, NumPy {np.__version__}, {name}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    profile_seconds = min(PROFILE_SECONDS, 60 * arguments.minutes / 10)
    with open(arguments.out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows_of(arguments, device, deadline - profile_seconds):
            row = {"device": name, **row}
            writer.writerow(row)
            file.flush()
            print(*(f"{column}={value}" for column, value in row.items() if value != ""), flush=True)
    with open(arguments.out / "profile.txt", "w") as file:
        for model in arguments.models:
            case = make_case(model, sorted(arguments.clients)[len(arguments.clients) // 2])
            file.write(profiled(case, device, profile_seconds / len(arguments.models)))
            file.flush()


def rows_of(arguments: argparse.Namespace, device: str, deadline: float) -> Iterator[dict[str, Any]]:
    """A row for each case and engine, small cases first. What needs more than its share of the time is left out."""
    cases = list(itertools.product(sorted(arguments.clients), arguments.models))
    pace: dict[tuple[str, str], float] = {}  # seconds a client, by model and engine
    for number, (num_clients, model) in enumerate(cases):
        case = make_case(model, num_clients)
        share = (deadline - time.monotonic()) / (len(cases) - number)
        exact = Machine(settings_of(model, "cpu"), case.dataset).run_all(case.weights, case.tasks[:CHECKED])
        expected = [result.weights for result in exact if isinstance(result, Update)]
        of_batched: list[Tensor] = []
        for engine, train in engines_of(case, device):
            if 2 * num_clients * pace.get((model, engine), 0.0) > share:
                print(f"left out, for lack of time: {engine}, {model}, {num_clients} clients", flush=True)
                continue
            gc.collect()  # what the engine before it used
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            times, rows, repeat = measure(train, case, share / 4)
            of_batched = of_batched or rows
            pace[model, engine] = min(times) / num_clients
            yield {
                "model": model,
                "clients": num_clients,
                "engine": engine,
                "seconds_a_round": f"{statistics.median(times):.4g}",
                "least": f"{min(times):.4g}",
                "most": f"{max(times):.4g}",
                "timed_rounds": len(times),
                "peak_megabytes": "" if device == "cpu" else round(torch.cuda.max_memory_allocated() / 1e6),
                "distance_from_cpu": f"{distance(rows, expected, case.weights):.2g}",
                "bits_repeat": repeat,
                "bits_of_batched": all(map(torch.equal, rows, of_batched)),
            }
