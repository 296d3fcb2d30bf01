"""Measures rounds a second of the executors beside a plain loop that does the same work; see README.md."""

import argparse
import copy
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from flwr.app import ConfigRecord
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fedtune import plugins, rng
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.flat_model import Examples, FlatModel, make_examples
from fedtune.server import messages as protocol
from fedtune.server.flower_compat import pack
from fedtune.server.grid import FIRST_NODE_ID, ExecutorGrid
from fedtune.server.optimizers import HYPERPARAMETERS
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import ServerSettings
from fedtune.simulation.executors import num_workers, start_forkserver
from fedtune.simulation.executors.machine import MachineSettings
from fedtune.simulation.executors.pool import PoolExecutor
from fedtune.simulation.executors.serial import SerialExecutor
from fedtune.tasks import Executor
from fedtune.tuning.fedex import FedExSettings
from fedtune.tuning.policy import FedExPolicy
from fedtune.tuning.trial import Trial

FOLDER = Path(__file__).parent
ROUNDS = {"logistic": 40, "mlp": 16, "cnn": 1}  # of one measurement: about a second
SEED, NUM_CLIENTS, COHORT_SIZE, NUM_CLASSES = 0, 40, 10, 10
TRAIN, EXAMPLES = 100, 124  # of a client: 100 to train, 12 to validate, 12 to test
CONFIG = {"learning_rate": 0.05, "batch_size": 20, "epochs": 1}
TRIAL = Trial(0, {name: known.default for name, known in HYPERPARAMETERS.items()}, ((CONFIG,),))
IN_FLIGHT = 4  # trials at once, as a search has them
# Engines add in different orders: how far their weights may differ, as a share of how far training moved them.
TOLERANCE = 1e-3
COLOURS = {"plain, 1 thread": "#BBBBBB", "plain": "#666666", "serial": "#56B4E9", "pool": "#0072B2"}
COLOURS["pool, 4 trials"] = "#004466"


class Work(NamedTuple):
    """What a client trains on in one round of the plain loop."""

    client: int
    order: list[int]  # of its training examples


class Engine(NamedTuple):
    """A way to train, with so many threads in this process: the weights after a number of rounds."""

    threads: int
    num_federations: int  # that do those rounds, side by side
    train: Callable[[int], Tensor]


def make_dataset() -> FederatedDataset:
    """Clients of MNIST's shape: a pattern for each class, under noise."""
    draws = rng.stream(SEED, "examples")
    patterns = draws.integers(0, 256, (NUM_CLASSES, 28, 28))
    clients = {}
    for client in range(NUM_CLIENTS):
        y = draws.integers(0, NUM_CLASSES, EXAMPLES)
        x = (patterns[y] + draws.integers(0, 256, (EXAMPLES, 28, 28))) // 2
        clients[str(client)] = (x.astype(np.uint8), y)
    return FederatedDataset.from_clients(clients, name="synthetic", num_classes=NUM_CLASSES, scale=1 / 255)


def make_strategy() -> FedTuneStrategy:
    """Plain federated averaging."""
    policy = FedExPolicy(TRIAL.pool, FedExSettings(), NUM_CLASSES)
    return FedTuneStrategy(TRIAL, ServerSettings(), policy, cohort_size=COHORT_SIZE, seed=SEED)


def federation(executor: Executor, weights: Tensor, rounds: int) -> Generator[int, None, Tensor]:
    """Yields each ticket that it waits for; returns the weights after the rounds."""
    strategy, grid = make_strategy(), ExecutorGrid(executor, NUM_CLIENTS)
    for server_round in range(1, rounds + 1):
        arrays = pack(weights.numpy())
        message_ids = grid.push_messages(strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
        yield grid.ticket(message_ids)
        new_arrays, _ = strategy.aggregate_train(server_round, grid.pull_messages(message_ids))
        weights = torch.from_numpy(new_arrays["weights"].numpy())
    grid.release()
    return weights


def simulate(executor: Executor, weights: Tensor, num_federations: int, rounds: int) -> Tensor:
    """The weights after the rounds of each of several federations that are in flight at once, all alike."""
    trainings = [federation(executor, weights, rounds) for _ in range(num_federations)]
    waiting = {training: next(training) for training in trainings}
    while waiting:
        ready = [training for training, ticket in waiting.items() if executor.finished(ticket)]
        for training in ready:
            try:
                waiting[training] = next(training)
            except StopIteration as end:
                result = end.value
                del waiting[training]
        if not ready:
            executor.step()
    return result


def make_plan(weights: Tensor, rounds: int) -> list[list[Work]]:
    """Each round's cohort as the strategy draws it, and the order in which local SGD takes a client's examples."""
    strategy, grid = make_strategy(), ExecutorGrid(None, NUM_CLIENTS)
    plan = []
    for server_round in range(1, rounds + 1):
        messages = strategy.configure_train(server_round, pack(weights.numpy()), ConfigRecord(), grid)
        draws = [np.random.Generator(np.random.PCG64(protocol.seed(message))) for message in messages]
        for draw in draws:
            draw.integers(2**63)  # the seed of the dropout layers
        clients = [message.metadata.dst_node_id - FIRST_NODE_ID for message in messages]
        plan.append(
            [Work(client, draw.permutation(TRAIN).tolist()) for client, draw in zip(clients, draws, strict=True)]
        )
    return plan


def plain_loop(
    module: nn.Module, parts: Sequence[tuple[TensorDataset, Examples]], plan: list[list[Work]], rounds: int
) -> Tensor:
    """A copy of the model, a DataLoader and an optimiser for each client, and a mean of state_dicts at the end."""
    for cohort in plan[:rounds]:
        states = []
        for client, order in cohort:
            train, validation = parts[client]
            local = copy.deepcopy(module)
            local.train()
            optimizer = torch.optim.SGD(local.parameters(), lr=CONFIG["learning_rate"])
            for x, y in DataLoader(train, CONFIG["batch_size"], sampler=order):
                optimizer.zero_grad()
                cross_entropy(local(x), y).backward()
                optimizer.step()
            local.eval()
            with torch.inference_mode():
                logits = local(validation.x)
                cross_entropy(logits, validation.y).item()
                (logits.argmax(1) != validation.y).float().mean().item()
            states.append(local.state_dict())
        module = copy.deepcopy(module)
        module.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return torch.cat([tensor.reshape(-1) for tensor in module.state_dict().values()])


def make_parts(dataset: FederatedDataset) -> list[tuple[TensorDataset, Examples]]:
    """Each client's training and validation examples, in memory in the form that the model gets."""
    parts = []
    for client in range(NUM_CLIENTS):
        train, validation = (
            make_examples(*dataset.examples(client, part), dataset.spec, "cpu") for part in ("train", "validation")
        )
        parts.append((TensorDataset(*train), validation))
    return parts


def measure(model: str, dataset: FederatedDataset, repeats: int, threads: int) -> list[dict[str, object]]:
    """A row for each engine and repeat; the engines take turns. Raises unless they all end at the same weights."""
    settings = MachineSettings({"name": model}, "local_sgd", "cpu")
    torch.manual_seed(SEED)
    module = plugins.make_model(settings.model, dataset.spec)
    weights = FlatModel(module).flat.clone()
    serial, pool = SerialExecutor(settings, dataset), PoolExecutor(settings, dataset, num_workers(0))
    plain = partial(plain_loop, module, make_parts(dataset), make_plan(weights, ROUNDS[model]))
    engines = {
        "plain, 1 thread": Engine(1, 1, plain),
        "plain": Engine(threads, 1, plain),
        "serial": Engine(1, 1, partial(simulate, serial, weights, 1)),
        "pool": Engine(1, 1, partial(simulate, pool, weights, 1)),
        f"pool, {IN_FLIGHT} trials": Engine(1, IN_FLIGHT, partial(simulate, pool, weights, IN_FLIGHT)),
    }
    check_equal_work(model, weights, {name: engine.train(1) for name, engine in engines.items()})
    rows = []
    for repeat in range(repeats):
        for name, engine in engines.items():
            torch.set_num_threads(engine.threads)
            started = time.perf_counter()
            engine.train(ROUNDS[model])
            seconds = time.perf_counter() - started
            rounds = ROUNDS[model] * engine.num_federations
            rows.append({"model": model, "engine": name, "repeat": repeat, "rounds_per_second": rounds / seconds})
    pool.close()
    return rows


def check_equal_work(model: str, initial: Tensor, trained: dict[str, Tensor]) -> None:
    """Raises unless one round led all engines to nearly the same weights, ours to the very same."""
    serial = trained["serial"]
    for name, weights in trained.items():
        difference = float((weights - serial).norm() / (serial - initial).norm())
        if difference > (0 if name.startswith("pool") else TOLERANCE):
            raise RuntimeError(f"{model}: {name} and serial differ by {difference:.1e} of the way that they trained")


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """For each model and engine the median, least and most rounds a second, and its speed beside two others.

    "by plain" is beside the faster of the two plain loops, "by serial" beside the serial executor.
    """
    table = rows.groupby(["model", "engine"], sort=False)["rounds_per_second"].agg(["median", "min", "max"])
    median = table["median"].unstack()
    references = {"plain": median[["plain, 1 thread", "plain"]].max(axis=1), "serial": median["serial"]}
    for name, reference in references.items():
        table[f"by {name}"] = table["median"] / reference.reindex(table.index, level="model")
    return table


def plot(table: pd.DataFrame, path: Path) -> None:
    """Draws each engine's speed in units of the faster plain loop's, with the range over the repeats."""
    figure = Figure(figsize=(8, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    models = table.index.get_level_values("model").unique()
    for number, (engine, colour) in enumerate(COLOURS.items()):
        part = table.xs(engine, level="engine").loc[models]
        height = part["by plain"]
        least, most = (part[end] / part["median"] * height for end in ("min", "max"))
        position = np.arange(len(models)) + (number - 2) * 0.16
        axes.bar(position, height, 0.15, yerr=[height - least, most - height], color=colour, label=engine, capsize=2)
    axes.set_xticks(np.arange(len(models)), models)
    axes.axhline(1, color="#222222", linewidth=0.8)
    axes.set_ylabel("rounds a second, the faster plain loop = 1")
    axes.set_title("How much faster than a plain loop are the executors?", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, ncols=3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each engine (default 9)")
    parser.add_argument("--models", nargs="+", default=list(ROUNDS), choices=list(ROUNDS))
    arguments = parser.parse_args()
    start_forkserver()
    threads, dataset = torch.get_num_threads(), make_dataset()
    rows = [row for model in arguments.models for row in measure(model, dataset, arguments.repeats, threads)]
    frame = pd.DataFrame(rows)
    frame.to_csv(FOLDER / "results.csv", index=False, float_format="%.4g")
    table = summarise(frame)
    plot(table, FOLDER / "figures" / "speed.png")
    print(f"{num_workers(0)} workers, {threads} threads in the plain loop, torch {torch.__version__}")
    print(table.round(2).to_string())


if __name__ == "__main__":
    main()
