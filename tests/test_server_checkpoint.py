import logging

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_server_app import NUM_CLIENTS, TABLE, RenumberedGrid, app, assert_equal, context, executor_grid, trained

from fedtune.errors import InputError
from fedtune.runs import checkpoint, server_checkpoint
from fedtune.runs.server_checkpoint import ServerState
from fedtune.settings import resolve
from fedtune.simulation.grid import ExecutorGrid

STATE = ServerState(2, np.arange(3, dtype=np.float32), [0, 1, 4], {"policy.rounds": np.array([2])})


class Killed(Exception):
    """Stands for the end of the server's process."""


def killed_at(grid, message_type, number):
    """The grid, which is killed before it sends messages of this type for the nth time."""
    receive, left = grid.send_and_receive, [number]

    def send_and_receive(messages, *, timeout=None):
        messages = list(messages)
        if messages and messages[0].metadata.message_type == message_type:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
        return receive(messages, timeout=timeout)

    grid.send_and_receive = send_and_receive
    return grid


def stop(table, folder, message_type="train", number=2, **run_config):
    with pytest.raises(Killed):
        app(
            killed_at(executor_grid(table), message_type, number),
            context(table, out=str(folder / "new" / "weights.safetensors"), **run_config),
        )


# The file.


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "checkpoint"
    assert server_checkpoint.load(path, "mine") is None
    server_checkpoint.save(path, "mine", STATE)
    loaded = server_checkpoint.load(path, "mine")
    assert (loaded.round, loaded.weights.tobytes(), loaded.clients) == (2, STATE.weights.tobytes(), STATE.clients)
    assert loaded.strategy == STATE.strategy
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "text", "no checksum", "of a trial", "another run"])
def test_a_file_that_is_no_checkpoint_of_the_run_is_refused_in_one_line(damage, tmp_path):
    path = tmp_path / "checkpoint"
    server_checkpoint.save(path, "mine", STATE)
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-1])
        case "changed":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("weights")
        case "no checksum":
            save_file({"weights": STATE.weights}, path)
        case "of a trial":
            checkpoint.save(path, {"round": np.array(1), "weights": STATE.weights})
        case "another run":
            server_checkpoint.save(path, "another", STATE)
    says = "must be of a ServerApp with these settings" if damage in ("of a trial", "another run") else "is damaged: "
    with pytest.raises(InputError) as raised:
        server_checkpoint.load(path, "mine")
    assert str(raised.value).startswith(f"checkpoint {path} {says}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"workers": 2}, True),
        ({"total_rounds": 20}, True),
        ({"seed": 4}, False),
        ({"max_rounds": 4}, False),
        ({"tuners": ["uniform"]}, False),
        ({"client": {"learning_rate": 0.3}}, False),
        ({"server": {"max_examples": 100}}, False),
        ({"data": {**TABLE["data"], "partition": "iid"}}, False),
    ],
)
def test_a_run_is_known_by_what_decides_its_weights(change, same):
    settings = [resolve([table]) for table in (TABLE, TABLE | change)]
    names = [server_checkpoint.run_name(each, each.tuners[0]) for each in settings]
    assert (names[0] == names[1]) == same


# The ServerApp.


@pytest.mark.parametrize(
    ("tuner", "options"),
    [("fedex", {"pool_size": 3, "baseline": "client"}), ("elimination+fedex", {"num_configs": 2}), ("rsws", {})],
)
@pytest.mark.parametrize(("message_type", "number"), [("train", 1), ("train", 2), ("evaluate", 2), ("train", 5)])
def test_it_goes_on_after_the_last_complete_round_to_the_same_bits(tuner, options, message_type, number, tmp_path):
    table = TABLE | {
        "tuners": [tuner],
        "tuner": {tuner: options},
        "max_rounds": 5,
        "server": {"optimizer": "adam", "learning_rate": 0.05},
    }
    expected = trained(executor_grid(table), table, tmp_path)
    stop(table, tmp_path, message_type, number)
    asked = []

    class Listening(ExecutorGrid):
        def push_messages(self, messages):
            messages = list(messages)
            asked.extend(messages[:1])
            return super().push_messages(messages)

    grid = executor_grid(table)
    grid.__class__ = Listening
    assert_equal(trained(grid, table, tmp_path), expected)
    rounds = sum(message.metadata.message_type == "train" for message in asked)
    done = number - 1 if message_type == "train" else number
    assert rounds == 5 - done
    assert list((tmp_path / "new").iterdir()) == []  # without `out` the next start is the first one of a new run


def test_it_can_be_stopped_again_and_again(tmp_path):
    expected = trained(executor_grid(TABLE), TABLE, tmp_path)
    for _ in range(2):  # each time one of the three rounds is done
        stop(TABLE, tmp_path, number=2)
    assert_equal(trained(executor_grid(TABLE), TABLE, tmp_path), expected)


def test_the_checkpoint_has_a_file_of_its_own(tmp_path):
    file = tmp_path / "states" / "mine"
    app(executor_grid(TABLE), context(TABLE, checkpoint=str(file)))
    assert [path.name for path in tmp_path.rglob("*")] == ["states", "mine"]  # it is all that is left of the run
    weights = server_checkpoint.load(
        file, server_checkpoint.run_name(resolve([TABLE, {"engine": "torch"}]), "fedex")
    ).weights
    app(executor_grid(TABLE), context(TABLE, checkpoint=str(file), out=str(tmp_path / "weights")))
    assert not file.exists()
    assert np.isfinite(weights).all()
    assert (tmp_path / "weights").is_file()


def test_other_settings_are_refused_before_anything_is_sent(tmp_path):
    stop(TABLE, tmp_path)
    grid = executor_grid(TABLE)
    grid.send_and_receive = None
    with pytest.raises(InputError, match=r"^checkpoint .*weights\.safetensors\.checkpoint must be of .*these settings"):
        app(grid, context(TABLE | {"seed": 4}, out=str(tmp_path / "new" / "weights.safetensors")))


def test_clients_that_took_part_before_keep_their_places(tmp_path, caplog):
    """Client 1 is away at the second start and client 4 at the first one; the others have other nodes."""

    def grid_of(node_of, table):
        grid = RenumberedGrid(table, list(node_of.values()))
        grid.client_of = {node: client for client, node in node_of.items()}
        return grid

    table = TABLE | {"cohort_size": 4}
    before = {client: 50 - client for client in (0, 1, 2, 3)}
    after = {client: 60 + client for client in (0, 2, 3, 4)}
    run_config = {"out": str(tmp_path / "weights")}
    with pytest.raises(Killed):
        app(killed_at(grid_of(before, table), "train", 3), context(table, **run_config))
    app(grid_of(after, table), context(table, **run_config))
    lost = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in lost] == [
        "client 1 took part before and has no node now: it is lost in every round"
    ]
    assert "'lost': 1" in caplog.text
    assert set(before) < set(range(NUM_CLIENTS))


@pytest.mark.parametrize(
    ("run_config", "said"),
    [
        ({"out": "."}, "out in the run's config must be a file, got the folder ."),
        ({"checkpoint": ""}, "checkpoint in the run's config must be a file, got the folder ."),
        (
            {"checkpoint": "file/new/checkpoint"},
            "checkpoint in the run's config must be in a folder that can be made: ",
        ),
        ({"out": "w", "checkpoint": "./w"}, "checkpoint in the run's config must be another file than out, got w for"),
    ],
)
def test_files_that_can_not_be_written(run_config, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as raised:
        app(executor_grid(TABLE), context(TABLE, **run_config))
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]
