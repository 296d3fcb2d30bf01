import numpy as np
import pytest
import torch

import fedtune
from fedtune import rng
from fedtune.client.tasks import Failure, Ticket, TrainTask, Update
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.server.optimizers import HYPERPARAMETERS
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import ServerSettings
from fedtune.simulation.devices import Devices
from fedtune.simulation.federation import Federation
from fedtune.tuning.fedex import FedExPolicy, FedExSettings
from fedtune.tuning.trial import Trial

SEED, TRIAL, ROUND, NUM_CLIENTS = 5, 3, 7, 400
THETA = [0.5, 0.3, 0.2]
CONFIGS = ({"learning_rate": 0.1}, {"learning_rate": 0.2}, {"learning_rate": 0.3})
RIGHT = {
    "num_validation": 1,
    "validation_error": 0.0,
    "validation_loss": 0.5,
    "num_test": 1,
    "test_error": 0.0,
    "test_loss": 0.5,
}


class Recorder:
    """An executor that keeps the tasks, and answers with metrics of a model without an error."""

    def __init__(self, failed=()):
        self.tasks, self.failed = [], failed

    def describe(self):
        return "nowhere"

    def submit(self, weights, tasks, *order, **place):
        self.tasks = list(tasks)
        return Ticket(0)

    def step(self):
        pass

    def finished(self, ticket):
        return True

    def collect(self, ticket):
        return [Failure("no") if task.client in self.failed else [RIGHT] for task in self.tasks]

    def release(self, ticket):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def dataset():
    examples = np.zeros((3, 1), np.float32), np.arange(3) % 3
    return FederatedDataset.from_clients({str(client): examples for client in range(NUM_CLIENTS)}, name="tiny")


def federation(dataset, executor, clients=NUM_CLIENTS, server_round=ROUND):
    policy = FedExPolicy((CONFIGS,), FedExSettings(), num_classes=3)
    policy.state = policy.state._replace(log_theta=(np.log(THETA),), rounds=server_round)
    strategy = FedTuneStrategy(Trial(TRIAL, {}, (CONFIGS,)), ServerSettings(), policy, cohort_size=2, seed=SEED)
    settings = fedtune.resolve_settings("digits", {})
    devices = Devices(settings, SEED, dataset.num_examples("train"), 4)
    made = Federation(
        strategy, torch.zeros(2), dataset, executor, np.arange(clients), devices, on_round=lambda *arguments: None
    )
    made.round = server_round
    return made


def personalised(made, config_of):
    """What `personalise` returns; the executor needs no time."""
    work = made.personalise(config_of)
    next(work)
    with pytest.raises(StopIteration) as end:
        next(work)
    return end.value.value


def drawn(made, executor):
    personalised(made, made.sampled_config)
    return [task.config["learning_rate"] for task in executor.tasks]


def test_sampled_configurations_are_drawn_from_theta_by_each_client(dataset):
    """Each client has a stream of its own. False alarm of the shares below 3 * 2 exp(-2 * 400 * 0.12^2) = 6e-5."""
    executor = Recorder()
    rates = drawn(federation(dataset, executor), executor)
    np.testing.assert_allclose(
        [rates.count(config["learning_rate"]) / NUM_CLIENTS for config in CONFIGS], THETA, atol=0.12
    )
    for client, task in enumerate(executor.tasks):
        uniform = 1 - rng.stream(SEED, "personalise", TRIAL, ROUND, client).random()
        index = sum(uniform > total for total in np.cumsum(THETA)[:-1])
        assert (task.client, task.config) == (client, CONFIGS[index])
        assert task.seed == rng.derived_seed(SEED, "personalise", TRIAL, ROUND, client)


def test_what_a_client_draws_depends_on_the_round_but_not_on_who_else_is_evaluated(dataset):
    executor = Recorder()
    all_clients = drawn(federation(dataset, executor), executor)
    seeds = [task.seed for task in executor.tasks]
    assert drawn(federation(dataset, executor, clients=50), executor) == all_clients[:50]
    assert drawn(federation(dataset, executor, server_round=ROUND + 1), executor) != all_clients
    assert not set(seeds) & {task.seed for task in executor.tasks}


def test_the_best_configuration_is_the_same_for_all_clients(dataset):
    executor = Recorder()
    made = federation(dataset, executor)
    best = made.best_config()
    personalised(made, lambda client: best)
    assert {task.config["learning_rate"] for task in executor.tasks} == {0.1}


def test_a_client_whose_program_raises_counts_as_wrong_on_every_example(dataset):
    executor = Recorder(failed=(0, 1, 2, 3))
    made = federation(dataset, executor, clients=16)
    evaluation = personalised(made, made.sampled_config)
    assert (evaluation.validation_error, evaluation.test_error) == (4 / 16, 4 / 16)
    worst = 2 * np.log(3)
    assert evaluation.test_loss == pytest.approx((4 * worst + 12 * 0.5) / 16)


class InOrder:
    """An executor that does one batch at a time, and writes down what happens in `events`."""

    def __init__(self):
        self.events, self.batches, self.done = [], [], 0

    def describe(self):
        return "nowhere"

    def submit(self, weights, tasks, order, place):
        kind = "train" if isinstance(tasks[0], TrainTask) else "evaluate"
        self.events.append((kind, int(place.split()[-1]), float(weights[0])))
        self.batches.append((weights.clone(), list(tasks)))
        return Ticket(len(self.batches))

    def finished(self, ticket):
        return ticket <= self.done

    def step(self):
        self.done += 1

    def collect(self, ticket):
        weights, tasks = self.batches[ticket - 1]
        metrics = {"error": 0.5, "loss": 0.5, "num_train": 1, "num_validation": 1}
        return [
            Update(weights + 1, dict(metrics)) if isinstance(task, TrainTask) else [RIGHT] * len(task.clients)
            for task in tasks
        ]

    def release(self, ticket):
        pass

    def close(self):
        pass


def test_a_round_is_evaluated_and_recorded_while_the_clients_of_the_next_one_train(dataset):
    executor = InOrder()
    strategy = FedTuneStrategy(
        Trial(TRIAL, {name: known.default for name, known in HYPERPARAMETERS.items()}, (CONFIGS,)),
        ServerSettings(),
        FedExPolicy((CONFIGS,), FedExSettings(), num_classes=3),
        cohort_size=2,
        seed=SEED,
    )

    def on_round(made, record):
        executor.events.append(("record", record.round, record.evaluation is not None))
        assert made.round == record.round
        assert made.weights[0] == made.arrays()["weights"][0] == record.round  # of this round, not of a later one
        assert strategy.policy.state.rounds == record.round

    settings = fedtune.resolve_settings("digits", {"cohort_size": 2})
    devices = Devices(settings, SEED, dataset.num_examples("train"), 4)
    made = Federation(strategy, torch.zeros(2), dataset, executor, np.arange(3), devices, on_round)
    for ticket in made.advance(4, evaluate_every=2):
        while not executor.finished(ticket):
            executor.step()
    assert executor.events == [
        ("train", 1, 0.0),
        ("train", 2, 1.0),
        ("record", 1, False),
        ("evaluate", 2, 2.0),
        ("train", 3, 2.0),
        ("record", 2, True),
        ("train", 4, 3.0),
        ("record", 3, False),
        ("evaluate", 4, 4.0),
        ("record", 4, True),
    ]
