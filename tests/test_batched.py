import gc
import re
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fedtune
import fedtune.executors.batched as batched_module
from fedtune import plugins
from fedtune.client import measure, stacked_layers
from fedtune.client.device_examples import DeviceExamples
from fedtune.client.examples import Examples
from fedtune.client.flat_model import FlatModel
from fedtune.client.tasks import EvaluateTask, Failure, PersonaliseTask, TrainTask, Update
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.spec import IGNORED, DatasetSpec
from fedtune.errors import InputError
from fedtune.executors.batched import BatchedMachine
from fedtune.executors.machine import Machine, MachineSettings
from fedtune.layers import resolve_settings
from fedtune.runs.prepare import prepare
from fedtune.runs.run_folder import claim_folder
from fedtune.settings import resolve
from fedtune_clients import batched_sgd, batched_steps, local_sgd
from fedtune_clients.batched_steps import Steps
from fedtune_clients.cuda_graphs import WARM_UP
from fedtune_clients.local_sgd import HYPERPARAMETERS, train_batched
from fedtune_clients.models import cnn, logistic, lstm, mlp

SPEC = DatasetSpec((8, 8), "real", 4)
MODELS = {
    "logistic": logistic,
    "mlp": lambda spec: mlp(spec, hidden=[9, 8]),
    "cnn": lambda spec: cnn(spec, dense=6),
}
# Every hyperparameter differs, and two clients of one batch size differ in the length of their last batch and in steps.
SIZES = (23, 1, 7, 40, 12, 5)
CONFIGS = (
    {"learning_rate": 0.1, "batch_size": 5, "epochs": 2, "momentum": 0.9, "dropout": 0.3},
    {"learning_rate": 0.3, "batch_size": 5, "epochs": 3, "weight_decay": 0.1},
    {"learning_rate": 0.2, "batch_size": 7, "proximal_mu": 0.5, "dropout": 0.1},
    {"learning_rate": 0.05, "batch_size": 5, "momentum": 0.5, "weight_decay": 0.01, "proximal_mu": 0.2},
    {"learning_rate": 0.15, "batch_size": 50, "epochs": 4, "dropout": 0.6, "momentum": 0.3},
    {},
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a run. On a busy machine two threads would spend most of their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(make, spec=SPEC, objective="classification"):
    torch.manual_seed(0)
    return FlatModel(make(spec), objective=objective)


def make_examples(sizes=SIZES, shape=(8, 8)):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sum(sizes), *shape)).astype(np.float32)
    return Examples(torch.from_numpy(x), torch.from_numpy(rng.integers(0, 4, sum(sizes))))


def generators(seeds):
    return [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]


def batched(model, weights, examples, sizes=SIZES, configs=CONFIGS, seeds=None):
    return train_batched(model, weights, examples, sizes, configs, generators(seeds or range(len(sizes))))


def one_by_one(model, weights, examples, sizes=SIZES, configs=CONFIGS):
    parts = [Examples(*part) for part in zip(*(tensor.split(sizes) for tensor in examples), strict=True)]
    clients = zip(parts, configs, generators(range(len(sizes))), strict=True)
    return torch.stack([local_sgd.train(model, weights, *client).clone() for client in clients])


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", MODELS)
def test_equals_local_sgd_on_ragged_clients_of_which_each_has_its_own_hyperparameters(name):
    assert {key for config in CONFIGS for key in config} == HYPERPARAMETERS.keys()
    model, examples = make_model(MODELS[name]), make_examples()
    weights = model.flat.clone()
    trained = batched(model, weights, examples)
    expected = one_by_one(model, weights, examples)
    assert (expected - weights).abs().amax(1).min() > 0.01  # so that agreement says something
    assert_close(trained, expected)


TOKENS = DatasetSpec((6,), "token", 4)


def client_updates(model, weights, examples):
    parts = [Examples(*part) for part in zip(*(tensor.split(SIZES) for tensor in examples), strict=True)]
    clients = zip(parts, CONFIGS, generators(range(len(SIZES))), strict=True)
    return torch.stack([local_sgd.client_update(model, weights, *client).clone() for client in clients])


@pytest.mark.parametrize("convolve", ["_convolved_apart", "_convolved_by_products"])
@pytest.mark.parametrize("name", [*MODELS, "lstm"])
def test_the_steps_that_a_gpu_records_equal_client_update(name, convolve, monkeypatch):
    """With a stand-in for CUDA graphs, which does what a replay does."""
    if name == "lstm":
        model = make_model(lambda spec: lstm(spec, hidden=5), TOKENS)
        examples = Examples(torch.randint(4, (sum(SIZES), 6)), make_examples().y)
    else:
        model, examples = make_model(MODELS[name]), make_examples()
    weights = model.flat.clone()
    plain = batched(model, weights, examples)
    captured = []
    monkeypatch.setattr(batched_steps, "capture_on", lambda device: lambda step: captured.append(step) or step)
    monkeypatch.setattr(stacked_layers, "_convolved_apart", getattr(stacked_layers, convolve))
    rounds = [batched(model, weights, examples) for _ in range(WARM_UP + 2)]
    assert captured
    assert all(torch.equal(trained, rounds[0]) for trained in rounds)
    assert_close(rounds[0], plain)
    expected = client_updates(model, weights, examples)
    distances = (rounds[0] - expected).norm(dim=1) / (expected - weights).norm(dim=1)
    assert distances.max() < 1e-5


def test_nothing_is_recorded_on_a_cpu():
    assert not Steps(make_model(MODELS["mlp"]), 2).stay


def test_recorded_steps_go_with_their_model(monkeypatch):
    monkeypatch.setattr(batched_steps, "capture_on", lambda device: lambda step: step)
    model = make_model(MODELS["mlp"])
    batched(model, model.flat.clone(), make_examples())
    assert model in batched_sgd._STEPS
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


def test_steps_that_did_not_fit_the_memory_are_not_kept(monkeypatch):
    def no_memory(step):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(batched_steps, "capture_on", lambda device: no_memory)
    model, examples = make_model(MODELS["mlp"]), make_examples((60,))
    with pytest.raises(torch.OutOfMemoryError):
        batched(model, model.flat.clone(), examples, (60,), [{}])
    assert model not in batched_sgd._STEPS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_have_the_bits_of_others_on_a_gpu(name, monkeypatch):
    model = FlatModel(make_model(MODELS[name]).module, "cuda")
    examples = Examples(*(tensor.cuda() for tensor in make_examples()))
    weights = model.flat.clone()
    rounds = [batched(model, weights, examples) for _ in range(WARM_UP + 2)]
    monkeypatch.setattr(batched_steps, "capture_on", lambda device: None)
    batched_sgd._STEPS.clear()
    rounds.append(batched(model, weights, examples))
    assert all(torch.equal(trained, rounds[0]) for trained in rounds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["logistic", "mlp"])
def test_equals_local_sgd_on_a_gpu(name):
    torch.manual_seed(0)
    model = FlatModel(MODELS[name](SPEC), "cuda")
    examples = Examples(*(tensor.cuda() for tensor in make_examples()))
    weights = model.flat.cpu()
    configs = [config | {"dropout": 0.0} for config in CONFIGS]  # there the draws differ
    trained = batched(model, weights, examples, configs=configs)
    torch.testing.assert_close(trained, one_by_one(model, weights, examples, configs=configs), rtol=1e-4, atol=1e-4)


def test_equals_local_sgd_for_real_targets_of_several_numbers():
    model = make_model(
        lambda spec: nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Unflatten(1, (2, 3))), objective="regression"
    )
    x = make_examples().x
    examples = Examples(x, x[:, :2, :3].tanh())
    assert_close(batched(model, model.flat.clone(), examples), one_by_one(model, model.flat.clone(), examples))


def test_equals_local_sgd_for_a_label_a_position_of_which_some_do_not_count():
    model = make_model(lambda spec: nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5)), objective="next_token")
    rng = np.random.default_rng(1)
    x, y = (torch.from_numpy(rng.integers(0, 5, (sum(SIZES), 9))) for _ in range(2))
    for row, num_positions in enumerate(rng.integers(0, 9, len(y))):
        y[row, :num_positions] = IGNORED  # another number of positions in each example
    examples = Examples(x, y)
    assert_close(batched(model, model.flat.clone(), examples), one_by_one(model, model.flat.clone(), examples))


class Awkward(nn.Module):
    """Tied weights, two parameters of one gradient, an unused one, a frozen one, a buffer."""

    def __init__(self, spec):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 64))
        self.tied = self.weight
        self.bias, self.second_bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.unused = nn.Parameter(torch.randn(7))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("scale", torch.rand(4))
        self.register_buffer("number", torch.tensor(3))

    def forward(self, x):
        return (x.flatten(1) @ self.weight.t() + self.tied.mean()) * self.scale * self.frozen + (
            self.bias + self.second_bias
        )


def test_equals_local_sgd_for_an_awkward_model():
    model, examples = make_model(Awkward), make_examples()
    weights = model.flat.clone()
    assert_close(batched(model, weights, examples), one_by_one(model, weights, examples))


def test_a_client_does_not_depend_on_those_beside_it():
    model, examples = make_model(MODELS["mlp"]), make_examples()
    weights = model.flat.clone()
    together = batched(model, weights, examples)
    for client, part in enumerate(zip(*(tensor.split(SIZES) for tensor in examples), strict=True)):
        alone = batched(model, weights, Examples(*part), SIZES[client : client + 1], [CONFIGS[client]], [client])
        assert_close(alone[0], together[client])


def test_a_client_that_explodes_leaves_the_others_as_they_are():
    model, examples = make_model(MODELS["mlp"]), make_examples()
    weights = model.flat.clone()
    exploding = [*CONFIGS[:1], {"batch_size": 5, "learning_rate": 1e30, "epochs": 5}, *CONFIGS[2:]]
    trained = batched(model, weights, examples, configs=exploding)
    assert not trained[1].isfinite().all()
    others = [client for client in range(len(SIZES)) if client != 1]
    assert trained[others].isfinite().all()
    assert_close(trained[others], batched(model, weights, examples)[others])


def test_the_same_bits_whatever_ran_before_and_the_arguments_stay_as_they_are():
    model, examples = make_model(MODELS["logistic"]), make_examples()
    weights = model.flat.clone()
    sent, kept = weights.clone(), Examples(*(tensor.clone() for tensor in examples))
    first = batched(model, sent, examples)
    assert torch.equal(sent, weights)
    assert all(map(torch.equal, examples, kept))
    batched(model, torch.full_like(weights, torch.nan), examples)
    torch.rand(17)
    assert torch.equal(batched(model, weights, examples), first)
    model.load(weights)
    assert torch.equal(batched(model, model.flat, examples), first)
    assert not torch.equal(batched(model, weights, examples, seeds=range(1, 7)), first)


def test_dropout_along_another_axis_than_the_examples_is_an_error_and_leaves_the_layer_as_it_was():
    class Sideways(nn.Module):
        def __init__(self, spec):
            super().__init__()
            self.dropout, self.linear = nn.Dropout(0.0), nn.Linear(64, 4)

        def forward(self, x):
            return self.linear(self.dropout(x.flatten(1).t()).t())

    model = make_model(Sideways)
    with pytest.raises(InputError, match=r"a dropout layer must have the example as its first axis, got shape \(64, 2"):
        batched(model, model.flat.clone(), make_examples())
    assert "forward" not in vars(model.module.dropout)


# The machine.

DATA_SIZES = (12, 130, 31, 200, 55, 17, 60, 40)
CONFIG = {"learning_rate": 0.1, "momentum": 0.9, "batch_size": 8, "epochs": 2, "dropout": 0.3, "proximal_mu": 0.1}


ALL = range(len(DATA_SIZES))


def make_dataset(input_kind="real"):
    rng = np.random.default_rng(0)
    inputs = {
        "real": lambda n: rng.integers(0, 256, (n, 8, 8), np.uint8),
        "token": lambda n: rng.integers(0, 3, (n, 6)),
    }
    return FederatedDataset.from_clients(
        {str(n): (inputs[input_kind](n), rng.integers(0, 3, n)) for n in DATA_SIZES},
        **{"name": "made up", "num_classes": 3, "scale": 1 / 255, "input_kind": input_kind},
    )


DATASET = make_dataset()


def machine_settings(model="mlp", client="local_sgd", **options):
    return MachineSettings({"name": str(model), **options}, str(client), "cpu")


def make_tasks(clients=ALL):
    """Of every kind, in no order; one client is there twice."""
    return [
        *(TrainTask(client, CONFIG, seed=client, error_before=client % 3 == 0) for client in clients),
        EvaluateTask((0, 3, 1)),
        *(PersonaliseTask(client, CONFIG | {"batch_size": 5}, seed=client) for client in reversed(clients)),
        TrainTask(3, CONFIG | {"epochs": 1}, seed=7),
    ]


def run(settings, tasks, dataset=DATASET):
    """What the batched and the plain machine answer, and what the batched one said."""
    said = []
    machine = BatchedMachine(settings, dataset, said.append)
    plain = Machine(settings, dataset)
    # For some other weights a unit lies within a rounding of its kink, and training goes on from there another way.
    torch.manual_seed(0)
    weights = FlatModel(plugins.make_model(settings.model, dataset.spec)).flat.clone()
    results = [machine.run_all(weights, tasks) for _ in range(2)]
    assert list(map(kept, results[0])) == list(map(kept, results[1]))
    return results[0], plain.run_all(weights, tasks), said


def kept(result):
    return (result.weights.tolist(), result.metrics) if isinstance(result, Update) else result


def assert_alike(results, expected):
    for result, other in zip(results, expected, strict=True):
        if isinstance(other, Update):
            assert_close(result.weights, other.weights)
            result, other = [result.metrics], [other.metrics]
        assert result == [pytest.approx(metrics, abs=1e-5) for metrics in other]
        assert [list(metrics) for metrics in result] == [list(metrics) for metrics in other]


@pytest.mark.parametrize("name", ["logistic", "mlp"])
def test_the_machine_answers_as_the_plain_one(name):
    results, expected, said = run(machine_settings(name), make_tasks())
    assert_alike(results, expected)
    assert said == []


def test_parts_larger_than_a_batch_are_measured_in_several(monkeypatch):
    model = make_model(MODELS["mlp"], DATASET.spec)
    weights = torch.stack([model.flat * (1 + client) for client in ALL])
    parts = [[(client, "train"), (client, "test")] for client in ALL]
    expected = [measure.measure_alone(model, row, DATASET, own) for row, own in zip(weights, parts, strict=True)]
    monkeypatch.setattr(measure, "EVALUATION_BATCH", 7)
    examples = DeviceExamples(DATASET, "cpu")
    flat = [part for client_parts in parts for part in client_parts]
    measured = measure.measure_batched(model, weights, examples.take(flat), list(map(examples.sizes, parts)))
    np.testing.assert_allclose(measured, expected, atol=1e-5)


# Local SGD whose train_batched does what the test says; it notes how many clients it was given.
PROGRAM = """
import torch

from fedtune_clients import batched_sgd, batched_steps, local_sgd
from fedtune_clients.batched_steps import Steps
from fedtune_clients.cuda_graphs import WARM_UP

HYPERPARAMETERS = local_sgd.HYPERPARAMETERS
train = local_sgd.train
CALLS = []


def train_batched(model, weights, examples, sizes, configs, rngs):
    CALLS.append(len(sizes))
    {body}
    return local_sgd.train_batched(model, weights, examples, sizes, configs, rngs)
"""


def write_program(tmp_path, body):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(body=body))
    return path


def test_a_chunk_is_halved_until_it_fits(tmp_path):
    path = write_program(tmp_path, "if len(sizes) > 3: raise torch.OutOfMemoryError('out of memory')")
    results, expected, said = run(machine_settings(client=path), make_tasks())
    assert_alike(results, expected)
    assert said == []
    # The trial of two clients; 17 tasks, halved to 8, 4 and 2, in the second run too.
    assert plugins.load_client_program(str(path)).CALLS == [2, 17, 8, 4] + 2 * ([2] * 8 + [1])


def test_a_client_that_does_not_fit_alone_is_an_error_that_names_it(tmp_path):
    path = write_program(tmp_path, "if any(size > 100 for size in sizes): raise torch.OutOfMemoryError('no\\nmemory')")
    expected = rf"^client 1 with {re.escape(str(CONFIG))} must fit the memory of cpu: no$"
    with pytest.raises(InputError, match=expected):
        run(machine_settings(client=path), make_tasks())


def test_a_chunk_holds_as_many_clients_as_the_bytes_allow(monkeypatch):
    monkeypatch.setattr(batched_module, "CHUNK_BYTES", 4 * 3 * (64 * 3 + 3) * 4)
    assert BatchedMachine(machine_settings("logistic"), DATASET, print)._chunk_size == 3
    monkeypatch.setattr(batched_module, "CHUNK_BYTES", 1)
    assert BatchedMachine(machine_settings("logistic"), DATASET, print)._chunk_size == 1


MODEL_FILE = """
import torch
from torch import nn


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Centre(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def centred(spec):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), Centre(), nn.Linear(9, spec.num_classes))


def batch_norm(spec):
    norm = nn.BatchNorm1d(9, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), norm, nn.Linear(9, spec.num_classes))


def running(spec):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.Linear(9, spec.num_classes))


def random(spec):
    return nn.Sequential(Noise(), nn.Flatten(), nn.Linear(64, spec.num_classes))


def data_dependent(spec):
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return nn.Sequential(nn.Flatten(), Branch(), nn.Linear(64, spec.num_classes))
"""

MIXED = "a client's training is not the same if other clients train with it"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("centred", MIXED),
        ("batch_norm", MIXED),
        ("running", ""),
        ("random", "RuntimeError: vmap: called random operation while in randomness error mode"),
        ("data_dependent", ""),
    ],
)
def test_a_model_that_can_not_be_batched_trains_one_client_at_a_time_and_that_is_said_once(tmp_path, name, reason):
    (tmp_path / "model.py").write_text(MODEL_FILE)
    tasks = make_tasks(range(1, 4))
    results, expected, said = run(machine_settings(f"{tmp_path}/model.py:{name}"), tasks)
    assert list(map(kept, results)) == list(map(kept, expected))
    (message,) = said
    assert message.startswith(f"clients train one at a time: {reason}")


def test_the_machine_answers_as_the_plain_one_for_an_lstm():
    results, expected, said = run(machine_settings("lstm", hidden=4), make_tasks(range(3)), make_dataset("token"))
    assert_alike(results, expected)
    assert said == []


def test_a_client_program_without_the_twin_trains_one_client_at_a_time(tmp_path):
    path = write_program(tmp_path, "")
    path.write_text(path.read_text().replace("def train_batched", "def other"))
    results, expected, said = run(machine_settings(client=path), make_tasks())
    assert list(map(kept, results)) == list(map(kept, expected))
    assert said == [f"clients train one at a time: the client program '{path}' has no train_batched"]


def test_what_only_real_work_shows_is_said_once_and_the_work_is_done(tmp_path):
    path = write_program(tmp_path, "if len(sizes) > 2: raise ValueError('too many. Or not')")
    results, expected, said = run(machine_settings(client=path), make_tasks())
    assert list(map(kept, results)) == list(map(kept, expected))
    assert said == ["clients train one at a time: ValueError: too many"]


def test_a_clients_fault_is_its_own():
    tasks = [TrainTask(0, CONFIG, 1), TrainTask(1, {"lr": 1.0}, 1), TrainTask(2, CONFIG, 1)]
    results, expected, said = run(machine_settings(), tasks)
    assert isinstance(expected[1], Failure)
    assert results[1] == expected[1]
    assert_alike(results[::2], expected[::2])
    assert said == []


# The run.


def compare(folder, executor):
    changes = {
        "tuners": ["manual", "fedex"],
        "max_rounds": 2,
        "total_rounds": 4,
        "cohort_size": 5,
        "model": {"name": "mlp"},  # on a CPU logistic regression has the serial bits
        "client": {"dropout": 0.2},
        "executor": executor,
    }
    settings = resolve_settings("digits", changes)
    events = []
    prepared = prepare(settings)
    claim_folder(folder, prepared.settings, force=False)
    prepared.run(folder, events.append)  # without the figures that a command draws
    assert "warning" not in {event["event"] for event in events}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, executor in {"serial": "serial", "batched": "batched", "again": "batched"}.items():
        compare(folder / name, executor)
    return folder


def test_a_comparison_gives_the_serial_results_to_rounding(runs):
    results, expected = (fedtune.read_run(runs / name) for name in ("batched", "serial"))
    for frame in ("results", "rounds", "trials"):
        pd.testing.assert_frame_equal(
            getattr(results, frame), getattr(expected, frame), check_exact=False, rtol=1e-4, atol=1e-4
        )
    assert (runs / "batched" / "rounds.parquet").read_bytes() != (runs / "serial" / "rounds.parquet").read_bytes()


def test_the_same_command_gives_the_same_bits(runs):
    for name in ("results.csv", "rounds.parquet", "trials.parquet"):
        assert (runs / "batched" / name).read_bytes() == (runs / "again" / name).read_bytes()


@pytest.mark.parametrize(("first", "second"), [("serial", "batched"), ("batched", "serial")])
def test_a_run_is_not_resumed_with_an_executor_of_other_numbers(runs, first, second):
    with pytest.raises(
        InputError,
        match=r"must hold the settings of .*: one of the two was edited, or the executor now batches clients "
        "and did not before, or the other way round$",
    ):
        fedtune.resume(runs / first, executor=second)


def test_auto_is_batched_elsewhere_than_on_a_cpu():
    def settings(**keywords):
        return resolve([{"data": {"name": "digits"}}, keywords])

    assert settings(device="cuda").batches_clients
    assert settings(device="cpu", executor="batched").batches_clients
    assert not settings(device="cpu").batches_clients
    assert not settings(device="cuda", executor="serial").batches_clients


def test_a_warning_reaches_the_listener(tmp_path):
    (tmp_path / "model.py").write_text(MODEL_FILE)
    events = []
    fedtune.train(
        "digits",
        rounds=1,
        **{"executor": "batched", "model": {"name": f"{tmp_path}/model.py:centred"}, "cohort_size": 2},
        **{"out": tmp_path / "run", "listener": events.append},
    )
    messages = [event["message"] for event in events if event["event"] == "warning"]
    assert messages == [f"clients train one at a time: {MIXED}"]
