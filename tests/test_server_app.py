import numpy as np
import pytest
import tomli_w
import torch
from client_app_grid import ClientAppGrid
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.object_ref import validate
from forged_replies import FORGED, Sent, fill, good, with_error
from safetensors.torch import load_file

from fedtune import plugins
from fedtune.errors import InputError
from fedtune.executors.machine import MachineSettings
from fedtune.executors.serial import SerialExecutor
from fedtune.hyperparameters import resolve_hyperparameters
from fedtune.initial_weights import initial_weights
from fedtune.server.flower_compat import pack
from fedtune.server.messages import run_settings
from fedtune.server.strategy import FedTuneStrategy
from fedtune.server_app import app, nodes_by_client
from fedtune.settings import resolve
from fedtune.settings_text import write_settings
from fedtune.simulation.grid import ExecutorGrid
from fedtune.study_tuners import make_draw, tuner_settings
from fedtune.tuning.fedex import FedExPolicy, FedExSettings
from fedtune_clients.app import app as client_app

NUM_CLIENTS = 5
TABLE = {
    "tuners": ["fedex", "asha"],
    "seed": 3,
    "max_rounds": 3,
    "total_rounds": 9,
    "cohort_size": 2,
    "data": {"name": "digits", "num_clients": NUM_CLIENTS, "examples_per_client": 30},
    "model": {"name": "mlp", "hidden": [12]},
    "client": {"learning_rate": 0.2, "batch_size": 8},
    "space": {"client": {"learning_rate": {"log_uniform": [0.01, 1.0]}}},
    "tuner": {"fedex": {"pool_size": 3}},
}


@pytest.mark.parametrize("name", ["fedtune.server.app:app", "fedtune_clients.app:app"])
def test_flower_finds_the_documented_apps(name):
    """`flwr run` checks the names before it starts: it reads the source and imports nothing."""
    assert validate(name) == (True, None)


def context(table, **run_config):
    return Context(1, 1, {}, RecordDict(), {"settings": tomli_w.dumps(table), **run_config})


def client_app_grid(table):
    text = tomli_w.dumps(table)

    def client_context(client):
        return Context(1, client, {"partition-id": client}, RecordDict(), {"settings": text})

    return ClientAppGrid(client_app, client_context, NUM_CLIENTS)


def executor_grid(table):
    settings = resolve([table])
    machine = MachineSettings(settings.model, "local_sgd", "cpu")
    return ExecutorGrid(SerialExecutor(machine, plugins.load_dataset(settings.data)), NUM_CLIENTS)


class RenumberedGrid(ClientAppGrid):
    """A grid whose nodes have other ids, in no order, and answer in no order, as in a deployment of Flower."""

    def __init__(self, table, node_of):
        super().__init__(client_app, self.context_of, NUM_CLIENTS)
        self.text = tomli_w.dumps(table)
        self.client_of = {node: client for client, node in enumerate(node_of)}

    def context_of(self, node):
        partition = self.client_of[node + 2]  # the plain grid takes a node's id - 2 for its client
        return Context(1, node, {"partition-id": partition}, RecordDict(), {"settings": self.text})

    def get_node_ids(self):
        return set(self.client_of)

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        return sorted(replies, key=lambda reply: hash(reply.metadata.src_node_id % 7))


def trained(grid, table, folder):
    out = folder / "new" / "weights.safetensors"
    app(grid, context(table, out=str(out)))
    weights = load_file(out)
    out.unlink()
    return weights


def by_hand(table):
    """The weights by name after the same rounds, driven here."""
    settings = resolve([table])
    dataset = plugins.load_dataset(settings.data)
    name = settings.tuners[0]
    options = settings.tuner.get(name, {})
    trial = make_draw(tuner_settings(name, settings), settings.seed, resolve_hyperparameters(settings))(0)
    strategy = FedTuneStrategy(
        trial,
        settings.server,
        FedExPolicy(trial.pool, FedExSettings(**options), num_classes=10),
        cohort_size=settings.cohort_size,
        seed=settings.seed,
    )
    grid = executor_grid(table)
    arrays = pack(initial_weights(settings, dataset.spec, settings.seed).numpy())
    for server_round in range(1, settings.max_rounds + 1):
        replies = grid.send_and_receive(strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
        arrays, _ = strategy.aggregate_train(server_round, replies)
    module = plugins.make_model(settings.model, dataset.spec)
    flat = torch.from_numpy(arrays["weights"].numpy())
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tuners", [["manual"], ["fedex", "asha"]])
@pytest.mark.parametrize("make_grid", [client_app_grid, executor_grid])
def test_it_trains_the_first_tuner_for_max_rounds_and_writes_the_weights(tuners, make_grid, tmp_path):
    table = TABLE | {"tuners": tuners, "tuner": TABLE["tuner"] if "fedex" in tuners else {}}
    weights = trained(make_grid(table), table, tmp_path)
    assert_equal(weights, by_hand(table))
    spec = plugins.load_dataset(table["data"]).spec
    plugins.make_model(table["model"], spec).load_state_dict(weights)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 0, 4, 2, 1]])
def test_node_ids_do_not_matter(order, tmp_path):
    nodes = [2**62 + 17 * client for client in order]
    grid = RenumberedGrid(TABLE, nodes)
    assert nodes_by_client(grid) == dict(enumerate(nodes))
    assert_equal(trained(grid, TABLE, tmp_path), by_hand(TABLE))


def test_without_out_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app(executor_grid(TABLE), context(TABLE))
    assert list(tmp_path.iterdir()) == []


def test_two_nodes_that_say_they_are_the_same_client():
    grid = RenumberedGrid(TABLE, [10, 11, 12, 13, 14])
    grid.client_of |= {12: 4}
    with pytest.raises(InputError, match=r"^every node must be a client of its own, got nodes 12, 14 for client 4$"):
        nodes_by_client(grid)


def test_a_node_that_can_not_say_which_client_it_is():
    grid = RenumberedGrid(TABLE, [10, 11, 12, 13, 14])
    grid.client_of |= {12: 5}
    said = r"^a node can't say which client it is: InputError: the client must be a whole number in 0\.\.4, got 5$"
    with pytest.raises(InputError, match=said):
        nodes_by_client(grid)


def test_a_client_that_always_fails_costs_its_updates_only(tmp_path):
    class Failing(RenumberedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            replies = super().send_and_receive(messages)
            return [
                Message(Error(2, "crashed"), reply_to=message)
                if message.metadata.message_type == "train" and message.metadata.dst_node_id == 10
                else reply
                for message, reply in zip(messages, sorted(replies, key=self.position(messages)), strict=True)
            ]

        def position(self, messages):
            ids = [message.metadata.message_id for message in messages]
            return lambda reply: ids.index(reply.metadata.reply_to_message_id)

    table = TABLE | {"cohort_size": 5}
    weights = trained(Failing(table, [10, 11, 12, 13, 14]), table, tmp_path)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    name = next(iter(weights))
    assert not torch.equal(weights[name], by_hand(table)[name])


def test_the_apps_settings_have_a_search_space_like_those_of_a_run():
    domain = TABLE["space"]["client"]["learning_rate"]
    space = {"client": {"learning_rate": domain, "momentum": "fixed", "dropout": {"uniform": [0.0, 0.5]}}}
    for given in ({"client": {**space["client"], "dropout": "fixed"}}, {**space, "only": ["client.learning_rate"]}):
        settings = run_settings(tomli_w.dumps(TABLE | {"space": given}))
        assert settings.space.client == {"learning_rate": domain, "momentum": "fixed", "dropout": "fixed"}
        assert resolve_hyperparameters(settings).space.client.keys() == {"learning_rate"}
        assert run_settings(write_settings(settings)) == settings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tuners": ["asha", "fedex"]}, "a ServerApp trains one federation: tuners must begin with one such as fedex"),
        ({"cohort_size": 6}, "cohort_size must be at most the number of clients, 5, got 6"),
        ({"client": {"rate": 1}}, "unknown client hyperparameter 'client.rate'; known: client.batch_size, "),
        ({"tuner": {"fedex": {"pool_size": 0}}}, "pool_size must be a whole number >= 1, got 0"),
        ({"max_rounds": 0}, "max_rounds "),
    ],
)
def test_settings_that_are_not_allowed(change, said):
    with pytest.raises(InputError) as raised:
        app(executor_grid(TABLE), context(TABLE | change))
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)


def test_a_run_without_settings_or_with_broken_ones():
    grid = executor_grid(TABLE)
    with pytest.raises(InputError, match="the run's config must hold 'settings'"):
        app(grid, Context(1, 1, {}, RecordDict(), {}))
    with pytest.raises(InputError, match=r"^'settings' in the run's config is not TOML: .*line 1"):
        app(grid, Context(1, 1, {}, RecordDict(), {"settings": "seed = = 1"}))


def test_nodes_evaluate_as_often_as_the_settings_say(monkeypatch):
    grid, asked = executor_grid(TABLE), []
    push = grid.push_messages

    def listen(messages):
        messages = list(messages)
        asked.append([message.metadata.message_type for message in messages])
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", listen)
    app(grid, context(TABLE | {"evaluation": {"every": 2}}))
    train, evaluate = ["train"] * 2, ["evaluate"] * NUM_CLIENTS
    assert asked == [["query"] * NUM_CLIENTS, train, [], train, evaluate, train, []]


@pytest.mark.parametrize("side", ["server", "client"])
def test_one_thread_for_it_might_add_in_another_order_than_two(side):
    threads, grid = torch.get_num_threads(), executor_grid(TABLE)
    torch.set_num_threads(2)
    try:
        if side == "server":
            with pytest.raises(InputError, match="cohort_size"):
                app(grid, context(TABLE | {"cohort_size": 6}))
        else:  # another seed: settings that the client was not asked about before
            grid = client_app_grid(TABLE | {"seed": 1234})
            assert list(nodes_by_client(grid).values()) == list(grid.get_node_ids())
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_the_initial_weights_are_those_of_the_seed(tmp_path):
    weights = [trained(executor_grid(TABLE | {"seed": seed}), TABLE | {"seed": seed}, tmp_path) for seed in (3, 4)]
    assert not any(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


class ForgingGrid(ExecutorGrid):
    """A grid on which one node's replies of a type are forged: `forgeries` gives the forgery of each round in turn."""

    node = 4

    def forge(self, message_type, forgeries):
        self.message_type, self.forgeries = message_type, iter(forgeries)
        return self

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = super().send_and_receive(messages, timeout=timeout)
        by_node = {message.metadata.dst_node_id: message for message in messages}
        if self.node not in by_node or by_node[self.node].metadata.message_type != self.message_type:
            return replies
        message = by_node.pop(self.node)
        weights = message.content["arrays"]["weights"].numpy() if "arrays" in message.content else np.zeros(1)
        forged = next(self.forgeries)(Sent(message, list(by_node.values()), weights))
        return [*forged, *(reply for reply in replies if reply.metadata.src_node_id != self.node)]


def forging_grid(table, message_type, forgeries):
    grid = executor_grid(table)
    grid.__class__ = ForgingGrid
    return grid.forge(message_type, forgeries)


def test_no_forged_reply_ends_the_app_or_changes_more_than_a_lost_client_does(tmp_path, caplog):
    """All forgeries, one in each round, against a node that never answers."""
    rounds = len(FORGED)
    budget = {"max_rounds": rounds, "total_rounds": rounds}
    table = TABLE | budget | {"cohort_size": NUM_CLIENTS, "evaluation": {"every": rounds}}
    silent = trained(forging_grid(table, "train", [lambda sent: []] * rounds), table, tmp_path)
    caplog.clear()
    assert_equal(trained(forging_grid(table, "train", FORGED.values()), table, tmp_path), silent)
    assert caplog.text.count("'lost': 1,") == rounds
    assert caplog.text.count("a client was lost: ") >= rounds
    assert "\x1b" not in caplog.text
    assert not all(np.array_equal(tensor, by_hand(TABLE)[name]) for name, tensor in silent.items())


def test_forged_evaluations_change_nothing(tmp_path, caplog):
    forgeries = [FORGED["no metrics"], FORGED["an error"], FORGED["a node that was not asked"]]
    weights = trained(forging_grid(TABLE, "evaluate", forgeries), TABLE, tmp_path)
    assert_equal(weights, by_hand(TABLE))
    assert caplog.text.count("a client was not evaluated: ") == len(forgeries)


def client_number(value):
    return lambda sent: [good(sent, arrays=None, metrics=fill(MetricRecord(), {"client": value}))]


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (
            client_number("2"),
            "the reply of node 4 is bad: client must be a whole number in 0..9223372036854775807, got ",
        ),
        (client_number(2.0), "the reply of node 4 is bad: client must be a whole number in "),
        (client_number(True), "the reply of node 4 is bad: client must be a whole number in "),
        (client_number([2]), "the reply of node 4 is bad: client must be a whole number in "),
        (client_number(-1), "the reply of node 4 is bad: client must be a whole number in "),
        (client_number(float("nan")), "the reply of node 4 is bad: client must be a whole number in "),
        (client_number(2**64), "the reply of node 4 is bad: client must be a whole number in "),
        (lambda sent: client_number(2)(sent) * 2, "node 4 must reply once, got 2 replies"),
        (lambda sent: [good(sent, arrays=None, metrics=None)], "the reply of node 4 is bad: it must hold the records "),
        (lambda sent: [good(sent, arrays=None)], "the reply of node 4 is bad: client must be a whole number in "),
        (with_error(1, None), "node 4: failed and gave no reason"),
        (with_error(1000, "no\n\x1b[2Jreason"), r"no\n\x1b[2Jreason"),
        (lambda sent: [], "node 4 did not answer"),
    ],
)
def test_a_forged_answer_to_the_query_is_one_line_before_the_first_round(forge, said):
    with pytest.raises(InputError) as raised:
        app(forging_grid(TABLE, "query", [forge]), context(TABLE))
    assert str(raised.value).startswith(f"a node can't say which client it is: {said}")
    assert "\n" not in str(raised.value)


def test_a_node_that_says_it_is_another_client():
    said = "every node must be a client of its own, got nodes 2, 4 for client 0"
    with pytest.raises(InputError, match=f"^{said}$"):
        app(forging_grid(TABLE, "query", [client_number(0)]), context(TABLE))
