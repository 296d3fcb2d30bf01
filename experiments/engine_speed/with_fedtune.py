"""fedtune: whole rounds through its strategy and grid, on the named executor, with several federations at once.

python with_fedtune.py MODEL PLANS serial|pool FEDERATIONS compiled|torch
python with_fedtune.py plan PLANS ROUNDS MODEL:COHORT_SIZE...      writes the plans that the other engines follow
"""

import sys
from collections.abc import Generator

from fedtune.executors.processes import start_forkserver

if __name__ == "__main__" and "pool" in sys.argv:
    start_forkserver()  # as fedtune's commands do: workers start while this process imports the rest

import numpy as np
import torch
import work
from flwr.app import ConfigRecord
from torch import Tensor

from fedtune.client.flat_model import FlatModel
from fedtune.client.tasks import Executor
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.executors.choice import make_executor
from fedtune.server import messages as protocol
from fedtune.server.flower_compat import pack
from fedtune.server.optimizers import HYPERPARAMETERS
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import ServerSettings, Settings
from fedtune.simulation.grid import FIRST_NODE_ID, ExecutorGrid
from fedtune.tuning.fedex import FedExPolicy, FedExSettings
from fedtune.tuning.trial import Trial

CONFIG = {"learning_rate": work.LEARNING_RATE, "batch_size": work.BATCH_SIZE, "epochs": 1}
TRIAL = Trial(0, {name: known.default for name, known in HYPERPARAMETERS.items()}, ((CONFIG,),))


def make_dataset(model: str) -> FederatedDataset:
    """All clients' examples, each client's in the order train, validation, test."""
    spec = work.make_spec(model)
    return FederatedDataset.from_arrays(
        *work.make_examples(model),
        np.full(work.NUM_CLIENTS, work.sizes(model).all),
        name="synthetic",
        num_classes=spec.num_classes,
        scale=spec.scale,
        input_kind=spec.input_kind,
    )


def make_strategy(cohort_size: int) -> FedTuneStrategy:
    """Plain federated averaging."""
    policy = FedExPolicy(TRIAL.pool, FedExSettings(), work.IMAGE_CLASSES)
    return FedTuneStrategy(TRIAL, ServerSettings(), policy, cohort_size=cohort_size, seed=work.SEED)


def federation(executor: Executor, weights: Tensor, cohort_size: int, rounds: int) -> Generator[int, None, Tensor]:
    """Yields each ticket that it waits for; returns the weights after the rounds."""
    strategy, grid = make_strategy(cohort_size), ExecutorGrid(executor, work.NUM_CLIENTS)
    for server_round in range(1, rounds + 1):
        arrays = pack(weights.numpy())
        message_ids = grid.push_messages(strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
        yield grid.ticket(message_ids)
        new_arrays, _ = strategy.aggregate_train(server_round, grid.pull_messages(message_ids))
        weights = torch.from_numpy(new_arrays["weights"].numpy())
    grid.release()
    return weights


def simulate(executor: Executor, weights: Tensor, federations: int, cohort_size: int, rounds: int) -> Tensor:
    """The weights after the rounds; several equal federations are trained at once."""
    trainings = [federation(executor, weights, cohort_size, rounds) for _ in range(federations)]
    waiting = {training: next(training) for training in trainings}
    while waiting:
        ready = [training for training, ticket in waiting.items() if executor.finished(ticket)]
        for training in ready:
            try:
                waiting[training] = next(training)
            except StopIteration as end:
                result: Tensor = end.value
                del waiting[training]
        if not ready:
            executor.step()
    return result


def make_settings(model: str, executor: str, engine: str) -> Settings:
    """The settings of a run."""
    if model in work.NOT_COMPILED:
        engine = "torch"
    return Settings(data={"name": "synthetic"}, model=work.MODELS[model], executor=executor, engine=engine)


def warn(message: str, **_: object) -> None:
    """Writes the message to the engine's log."""
    print(message, file=sys.stderr, flush=True)


def write_plan(folder: str, rounds: int, model: str, cohort_size: int) -> None:
    """Writes each round's cohort as the strategy draws it, and the order in which local SGD takes the examples."""
    strategy, grid = make_strategy(cohort_size), ExecutorGrid(None, work.NUM_CLIENTS)
    clients, orders = [], []
    for server_round in range(1, rounds + 1):
        messages = strategy.configure_train(server_round, pack(np.zeros(1, np.float32)), ConfigRecord(), grid)
        tasks = [protocol.task(message, message.metadata.dst_node_id - FIRST_NODE_ID) for message in messages]
        draws = [np.random.Generator(np.random.PCG64(task.seed)) for task in tasks]
        for draw in draws:
            draw.integers(2**63)  # the seed of the dropout layers
        clients.append([task.client for task in tasks])
        orders.append([draw.permutation(work.sizes(model).train) for draw in draws])
    np.savez(work.plan_path(folder, model, cohort_size), clients=clients, orders=orders)


def main(model: str, _plans: str, name: str, federations: str, engine: str) -> None:
    answers = work.take_stdout()
    executor = make_executor(make_settings(model, name, engine), make_dataset(model), warn)
    torch.set_num_threads(1)
    weights = FlatModel(work.make_module(model)).flat.clone()
    warn(f"clients train {executor.describe()}")
    work.serve(answers, lambda cohort_size, rounds: simulate(executor, weights, int(federations), cohort_size, rounds))
    executor.close()


if __name__ == "__main__":
    if sys.argv[1] == "plan":
        for case in sys.argv[4:]:
            model, _, cohort_size = case.partition(":")
            write_plan(sys.argv[2], int(sys.argv[3]), model, int(cohort_size))
    else:
        main(*sys.argv[1:])
