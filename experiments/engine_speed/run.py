"""Measures rounds a second of the executors and of a plain loop, in turn, on equal work; see README.md."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import ConfigRecord
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fedtune import rng
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.server.flower_compat import pack
from fedtune.server.grid import FIRST_NODE_ID, ExecutorGrid
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import ServerSettings
from fedtune.tasks import Executor
from fedtune.tuning.fedex import FedExSettings
from fedtune.tuning.policy import FedExPolicy
from fedtune.tuning.trial import Trial

FOLDER = Path(__file__).parent
ROUNDS = {"logistic": 40, "mlp": 12, "cnn": 2}  # of one measurement: some tenths of a second
CONFIG = {"learning_rate": 0.05, "batch_size": 20, "epochs": 1}
COHORT_SIZE = 10
NUM_CLIENTS = 40
EXAMPLES = 124  # of a client: 100 to train, 12 to validate, 12 to test
NUM_CLASSES = 10
IN_FLIGHT = 4  # federations at once, as `parallel_trials` has it
SEED = 0
TRIAL = Trial(0, ServerSettings().model_dump(), ((CONFIG,),))
# Engines sum in different orders: their weights differ by this much at most, as a share of how far training moved them.
TOLERANCE = 1e-2

Measure = Callable[[int], torch.Tensor]  # the weights after that many rounds from the initial ones


class Engine(NamedTuple):
    """Something that trains: its threads in this process, the rounds that it does side by side, and how."""

    threads: int
    federations: int
    measure: Measure


class Work(NamedTuple):
    """A client's training in a round, as the plain loop needs it."""

    client: int
    order: list[int]  # of its training examples


def make_dataset() -> FederatedDataset:
    """Clients of MNIST's shape: noise around a pattern for each class."""
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
    return FedTuneStrategy(
        TRIAL,
        ServerSettings(),
        FedExPolicy(TRIAL.pool, FedExSettings(), NUM_CLASSES),
        cohort_size=COHORT_SIZE,
        seed=SEED,
    )


def federation(executor: Executor, weights: torch.Tensor, rounds: int) -> Iterator[int]:
    """Yields the tickets that it waits for; returns the weights after the rounds."""
    strategy, grid = make_strategy(), ExecutorGrid(executor, NUM_CLIENTS)
    for server_round in range(1, rounds + 1):
        arrays = pack(weights.numpy())
        message_ids = grid.push_messages(strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
        yield grid.ticket(message_ids)
        new_arrays, _ = strategy.aggregate_train(server_round, grid.pull_messages(message_ids))
        weights = torch.from_numpy(new_arrays["weights"].numpy())
    grid.release()
    return weights


def simulate(executor: Executor, weights: torch.Tensor, rounds: int, federations: int) -> torch.Tensor:
    """The weights after the rounds of several federations in flight at once, all alike."""
    waiting = {
        training: next(training) for training in (federation(executor, weights, rounds) for _ in range(federations))
    }
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


def plan(rounds: int) -> list[list[Work]]:
    """What the clients do in each round: the cohorts that the strategy draws, the orders that local SGD draws."""
    strategy, grid = make_strategy(), ExecutorGrid(None, NUM_CLIENTS)
    rounds_of_work = []
    for server_round in range(1, rounds + 1):
        messages = strategy.configure_train(server_round, pack(np.zeros(1, np.float32)), ConfigRecord(), grid)
        rounds_of_work.append([])
        for message in messages:
            generator = np.random.Generator(np.random.PCG64(message.content.config_records["config"]["seed"]))
            generator.integers(2**63)  # the seed of the dropout layers
            order = generator.permutation(100).tolist()
            rounds_of_work[-1].append(Work(message.metadata.dst_node_id - FIRST_NODE_ID, order))
    return rounds_of_work


def plain_rounds(module: torch.nn.Module, parts: dict, works: list[list[Work]], rounds: int) -> torch.Tensor:
    """What most simulators do: a copy of the model, a DataLoader and an optimiser for each client."""
    for cohort in works[:rounds]:
        states = []
        for client, order in cohort:
            local = copy.deepcopy(module)
            train, (x, y) = parts[client]
            optimizer = torch.optim.SGD(local.parameters(), lr=CONFIG["learning_rate"])
            local.train()
            for _ in range(CONFIG["epochs"]):
                for inputs, labels in DataLoader(train, CONFIG["batch_size"], sampler=order):
                    optimizer.zero_grad()
                    cross_entropy(local(inputs), labels).backward()
                    optimizer.step()
            local.eval()
            with torch.no_grad():
                logits = local(x)
                cross_entropy(logits, y).item()
                (logits.argmax(1) != y).float().mean().item()
            states.append(local.state_dict())
        mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
        module = copy.deepcopy(module)
        module.load_state_dict(mean)
    return torch.cat([tensor.reshape(-1) for tensor in module.state_dict().values()])
