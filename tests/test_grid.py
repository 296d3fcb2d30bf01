import json

import numpy as np
import pytest
import torch
from client_app_grid import ClientAppGrid
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.run import Run

from fedtune import plugins
from fedtune.client.tasks import EvaluateTask, TrainTask, Update
from fedtune.executors.machine import MachineSettings
from fedtune.executors.serial import SerialExecutor
from fedtune.initial_weights import initial_weights
from fedtune.server import messages as protocol
from fedtune.server.flower_compat import pack
from fedtune.server.messages import CLIENT_ERROR
from fedtune.server.optimizers import HYPERPARAMETERS
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import ServerSettings
from fedtune.settings import resolve as resolve_settings
from fedtune.settings_text import write_settings
from fedtune.simulation.grid import FIRST_NODE_ID, ExecutorGrid
from fedtune.tuning.fedex import FedExPolicy, FedExSettings
from fedtune.tuning.trial import Trial
from fedtune_clients.app import app

SETTINGS = resolve_settings(
    [
        {
            "data": {"name": "digits", "num_clients": 6, "examples_per_client": 30},
            "model": {"name": "mlp", "hidden": [12]},
        }
    ]
)
CONFIG = {"learning_rate": 0.2, "batch_size": 8, "epochs": 2, "dropout": 0.3, "momentum": 0.5}
POOL = ((CONFIG, {**CONFIG, "learning_rate": 0.02}, {**CONFIG, "batch_size": 3, "proximal_mu": 0.1}),)
NUM_CLIENTS = 6


@pytest.fixture(scope="module")
def dataset():
    return plugins.load_dataset(SETTINGS.data)


@pytest.fixture(scope="module")
def initial(dataset):
    return initial_weights(SETTINGS, dataset.spec, 0)


@pytest.fixture
def executor(dataset):
    return SerialExecutor(MachineSettings(SETTINGS.model, "local_sgd", "cpu"), dataset)


@pytest.fixture
def executor_grid(executor):
    return ExecutorGrid(executor, NUM_CLIENTS)


@pytest.fixture
def client_app_grid():
    text = write_settings(SETTINGS)

    def context(client):
        return Context(1, client, {"partition-id": client}, RecordDict(), {"settings": text})

    return ClientAppGrid(app, context, NUM_CLIENTS)


@pytest.fixture(params=["executor_grid", "client_app_grid"])
def grid(request):
    return request.getfixturevalue(request.param)


def make_strategy(**options):
    server = {name: hyperparameter.default for name, hyperparameter in HYPERPARAMETERS.items()}
    return FedTuneStrategy(
        Trial(0, server, POOL),
        ServerSettings(),
        FedExPolicy(POOL, FedExSettings(baseline="client"), num_classes=10),
        cohort_size=4,
        seed=5,
        **options,
    )


def train_rounds(strategy, grid, weights, num_rounds):
    """Weights and metrics after each round, driven by hand."""
    arrays, seen = pack(weights.numpy()), []
    for server_round in range(1, num_rounds + 1):
        replies = grid.send_and_receive(strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
        arrays, metrics = strategy.aggregate_train(server_round, replies)
        seen.append((arrays["weights"].numpy().tobytes(), dict(metrics)))
    return seen


def message(arrays, client=0, message_type=MessageType.TRAIN, **config):
    hyperparameters = {"learning_rate": 0.1, "epochs": 1} | config.pop("hyperparameters", {})
    record = ConfigRecord({"seed": 3, "hyperparameters": json.dumps(hyperparameters), **config})
    content = RecordDict({"arrays": arrays, "config": record})
    return Message(content, dst_node_id=client + FIRST_NODE_ID, message_type=message_type)


def query(client):
    return Message(RecordDict(), dst_node_id=client + FIRST_NODE_ID, message_type=MessageType.QUERY)


def by_message(replies):
    """The replies' nodes by the id of the message that they answer."""
    return {reply.metadata.reply_to_message_id: reply.metadata.src_node_id for reply in replies}


# Both grids.


def test_the_executor_grid_equals_the_client_app_to_the_bit(executor_grid, client_app_grid, initial):
    strategies = make_strategy(), make_strategy()
    first = train_rounds(strategies[0], executor_grid, initial, 4)
    second = train_rounds(strategies[1], client_app_grid, initial, 4)
    assert first == second
    assert len({weights for weights, _ in first}) == 4
    thetas = [strategy.policy.state.log_theta[0] for strategy in strategies]
    assert np.array_equal(*thetas)


def test_flowers_own_loop_equals_rounds_by_hand_to_the_bit(grid, initial):
    by_hand = train_rounds(make_strategy(), grid, initial, 3)
    strategy = make_strategy(evaluate_every=2)
    result = strategy.start(grid, pack(initial.numpy()), num_rounds=3)
    assert result.arrays["weights"].numpy().tobytes() == by_hand[-1][0]
    assert [dict(result.train_metrics_clientapp[t]) for t in (1, 2, 3)] == [metrics for _, metrics in by_hand]
    assert list(result.evaluate_metrics_clientapp) == [2]


@pytest.mark.parametrize("config", [{"personalise": False}, {"personalise": True}, {}])
def test_both_grids_evaluate_alike(executor_grid, client_app_grid, initial, config):
    replies = []
    for grid in (executor_grid, client_app_grid):
        arrays = pack(initial.numpy())
        sent = [message(arrays, client, MessageType.EVALUATE, **config) for client in (4, 1)]
        replies.append([dict(reply.content["metrics"]) for reply in grid.send_and_receive(sent)])
    assert replies[0] == replies[1]
    assert replies[0][0] != replies[0][1]


def test_a_query_is_answered_with_the_client(grid):
    replies = grid.send_and_receive([query(4), query(0)])
    assert {reply.metadata.src_node_id: dict(reply.content["metrics"]) for reply in replies} == {
        4 + FIRST_NODE_ID: {"client": 4},
        0 + FIRST_NODE_ID: {"client": 0},
    }


def test_a_reply_says_which_message_of_which_node_it_answers(grid, initial):
    arrays = pack(initial.numpy())
    message_ids = grid.push_messages([message(arrays, client) for client in (3, 1, 5)])
    assert len(set(message_ids)) == 3
    while len(replies := grid.pull_messages(message_ids)) == 0:
        grid._executor.step()
    nodes = [client + FIRST_NODE_ID for client in (3, 1, 5)]
    assert by_message(replies) == dict(zip(message_ids, nodes, strict=True))


def test_a_program_that_raises_answers_with_an_error(grid, initial):
    arrays = pack(initial.numpy())
    sent = [message(arrays, 0), message(arrays, 1, hyperparameters={"learning_rate": -1.0})]
    good, bad = sorted(grid.send_and_receive(sent), key=lambda reply: reply.metadata.src_node_id)
    assert good.has_content()
    assert (bad.error.code, bad.metadata.src_node_id) == (CLIENT_ERROR, 1 + FIRST_NODE_ID)
    assert "InputError: learning_rate must be a finite number > 0.0, got -1.0" in bad.error.reason


def test_nothing_is_received_for_nothing(grid):
    assert grid.send_and_receive(messages=[], timeout=3600) == []
    assert list(grid.push_messages([])) == []
    assert grid.pull_messages([]) == []
    assert grid.pull_messages(["unknown"]) == []


def test_a_reply_is_pulled_once_and_in_parts_if_one_likes(grid, initial):
    arrays = pack(initial.numpy())
    first, second, third = grid.push_messages([message(arrays, client) for client in (0, 1, 2)])
    if not isinstance(grid, ClientAppGrid):
        assert grid.pull_messages([first, second, third]) == []  # nothing was computed yet
        grid._executor.step()
    assert list(by_message(grid.pull_messages([second]))) == [second]
    assert grid.pull_messages([second]) == []
    assert list(by_message(grid.pull_messages(iter([first, second, first])))) == [first]
    assert list(by_message(grid.pull_messages({third}))) == [third]
    assert grid.pull_messages([first, second, third]) == []


def test_what_flower_asks_of_a_grid(grid):
    assert list(grid.get_node_ids()) == list(range(FIRST_NODE_ID, FIRST_NODE_ID + NUM_CLIENTS))
    assert [node.node_id for node in grid.get_nodes()] == list(grid.get_node_ids())
    run = Run.create_empty(12)
    assert grid.run != run
    grid.set_run(run)
    assert grid.run is run
    made = grid.create_message(RecordDict(), MessageType.QUERY, FIRST_NODE_ID, "group", ttl=5.0)
    assert (made.metadata.dst_node_id, made.metadata.group_id, made.metadata.ttl) == (FIRST_NODE_ID, "group", 5.0)


# The executor grid alone.


class SlowExecutor:
    """An executor that finishes a batch when it is told to, and takes notes."""

    def __init__(self):
        self.batches, self.done, self.collected, self.released = [], set(), [], []

    def describe(self):
        return "nowhere"

    def submit(self, weights, tasks, order=0.0, place=""):
        self.batches.append((weights, list(tasks), order))
        return len(self.batches) - 1

    def finished(self, ticket):
        return ticket in self.done

    def collect(self, ticket):
        assert ticket not in self.collected
        self.collected.append(ticket)
        weights, tasks, _ = self.batches[ticket]
        return [Update(weights + task.client, {"error": task.client / 10}) for task in tasks]

    def release(self, ticket):
        self.released.append(ticket)

    def step(self):
        self.done.add(min(set(range(len(self.batches))) - self.done))

    def close(self):
        pass


def test_a_push_becomes_one_batch_of_the_executor(initial):
    executor = SlowExecutor()
    grid = ExecutorGrid(executor, NUM_CLIENTS, order=7.0)
    arrays = pack(initial.numpy())
    sent = [message(arrays, 4), message(arrays, 2, error_before=True, hyperparameters={"epochs": 3})]
    assert grid.ticket(grid.push_messages(sent)) == 0
    ((weights, tasks, order),) = executor.batches
    assert weights.data_ptr() == initial.data_ptr()  # not a copy
    assert tasks == [
        TrainTask(4, {"learning_rate": 0.1, "epochs": 1}, 3),
        TrainTask(2, {"learning_rate": 0.1, "epochs": 3}, 3, error_before=True),
    ]
    assert order == 7.0
    evaluate = [message(pack(initial.numpy()), 5, MessageType.EVALUATE)]
    assert grid.ticket(grid.push_messages(evaluate)) == 1
    assert executor.batches[1][1] == [EvaluateTask((5,))]


def test_pushes_may_overtake_each_other(initial):
    executor = SlowExecutor()
    grid = ExecutorGrid(executor, NUM_CLIENTS)
    first = grid.push_messages([message(pack(initial.numpy()), 1)])
    second = grid.push_messages([message(pack(initial.numpy() + 1), 2)])
    executor.done.add(1)
    (reply,) = grid.pull_messages(first + second)
    assert by_message([reply]) == {second[0]: 2 + FIRST_NODE_ID}
    assert torch.equal(protocol.weights(reply), initial + 1 + 2)
    executor.done.add(0)
    assert list(by_message(grid.pull_messages(first + second))) == first


def test_a_reply_keeps_its_memory_until_the_push_after_its_pull(initial):
    executor = SlowExecutor()
    grid = ExecutorGrid(executor, NUM_CLIENTS)
    arrays = pack(initial.numpy())
    first, second = grid.push_messages([message(arrays, client) for client in (1, 2)])
    executor.step()
    grid.pull_messages([first])
    grid.push_messages([message(arrays, 3)])
    assert executor.released == []  # the second reply was not pulled yet
    grid.pull_messages([second])
    assert executor.released == []  # somebody may still look at it
    grid.push_messages([message(arrays, 4)])
    assert executor.released == [0]
    grid.release()
    assert executor.released == [0]  # once


def test_sending_waits_for_its_own_batch_only(initial):
    executor = SlowExecutor()
    grid = ExecutorGrid(executor, NUM_CLIENTS)
    waiting = ExecutorGrid(executor, NUM_CLIENTS).push_messages([message(pack(initial.numpy()), 1)])
    arrays = pack(initial.numpy())
    replies = grid.send_and_receive(messages=[message(arrays, 2), query(5), message(arrays, 3)], timeout=1e-9)
    assert sorted(by_message(replies).values()) == [client + FIRST_NODE_ID for client in (2, 3, 5)]
    grid.push_messages([message(arrays, 4)])
    assert grid.send_and_receive([query(1)])[0].has_content()
    assert executor.done == {0, 1}  # two steps, neither for the query
    assert waiting


def test_a_push_must_be_alike(initial):
    grid = ExecutorGrid(SlowExecutor(), NUM_CLIENTS)
    arrays, others = pack(initial.numpy()), pack(initial.numpy())
    with pytest.raises(ValueError, match="all messages of a push must carry the same ArrayRecord"):
        grid.push_messages([message(arrays, 1), message(others, 2)])
    with pytest.raises(ValueError, match="all work of a push must be of one message type"):
        grid.push_messages([message(arrays, 1), message(arrays, 2, MessageType.EVALUATE)])
    with pytest.raises(ValueError, match=r"message type must be train, evaluate or query, got 'train\.other'"):
        grid.push_messages([message(arrays, 1, "train.other")])


def test_a_configuration_that_is_changed_is_not_changed_for_the_next_who_reads_it():
    config = protocol.train_config(ConfigRecord(), {"learning_rate": 0.5}, 1, error_before=False)
    message = Message(RecordDict({"config": config}), dst_node_id=FIRST_NODE_ID, message_type=MessageType.TRAIN)
    protocol.task(message, 0).config.clear()
    assert protocol.task(message, 0) == TrainTask(0, {"learning_rate": 0.5}, 1)
