import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.client.flat_model import FlatModel
from fedtune.client.tasks import EvaluateTask, Failure, PersonaliseTask, TrainTask, Update
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import ClientStopped, InputError, RunStopped
from fedtune.executors.machine import Machine, MachineSettings
from fedtune.executors.pool import PoolExecutor
from fedtune.executors.processes import num_workers, start_forkserver
from fedtune.executors.serial import SerialExecutor
from fedtune.executors.worker import Answer
from fedtune.executors.workers import Worker
from fedtune.settings import WatchSettings
from fedtune_clients.kernel_library import load_library
from fedtune_clients.models import mlp

MODEL = {"name": "mlp", "hidden": [8]}
SETTINGS = MachineSettings(MODEL, "local_sgd", "cpu")
SIZES = (12, 200, 31, 90, 55, 400, 17, 60)
CONFIG = {
    **{"learning_rate": 0.2, "momentum": 0.9, "weight_decay": 1e-3, "batch_size": 8, "epochs": 2},
    **{"dropout": 0.3, "proximal_mu": 0.1},
}

# Local SGD, and what else a client program may do, by its configuration.
PROGRAM = """
import os, sys, time
from pathlib import Path

from fedtune_clients import local_sgd

HYPERPARAMETERS = local_sgd.HYPERPARAMETERS
MARK = Path(__file__).with_name("mark")


def train(model, weights, examples, config, rng):
    config = dict(config)
    if config.pop("raise", 0):
        raise ValueError("no luck")
    if config.pop("leave", 0):
        sys.exit("farewell")
    if code := config.pop("die", 0):
        os._exit(code)
    if number := config.pop("signal", 0):
        os.kill(os.getpid(), number)
    while config.get("wait", 0) and not MARK.exists():
        time.sleep(0.01)
    config.pop("wait", 0)
    if config.pop("hang once", 0) and not MARK.exists():
        part = MARK.with_suffix(".part")
        part.write_text(str(os.getpid()))
        part.rename(MARK)
        time.sleep(600)
    if config.pop("hang", 0):
        os.write(1, b"training\\n")  # at once, for two processes share the pipe
        time.sleep(600)
    return local_sgd.train(model, weights, examples, config, rng)
"""

SCRIPT = """
import sys

import numpy as np
import torch

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.executors.machine import Machine, MachineSettings
from fedtune.executors.pool import PoolExecutor
from fedtune.client.tasks import TrainTask

y = np.arange(30) % 3
dataset = FederatedDataset.from_clients({"a": (np.eye(3)[y], y)}, name="made up", num_classes=3)
executor = PoolExecutor(MachineSettings({"name": "logistic"}, PROGRAM, "cpu"), dataset, 2)
try:
    ticket = executor.submit(torch.zeros(12), [TrainTask(0, CONFIG, seed) for seed in range(2)])
    while not executor.finished(ticket):
        executor.step()
    print(len(executor.collect(ticket)), "done")
finally:
    executor.close()
"""


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    clients = {str(n): (rng.integers(0, 256, (n, 5), dtype=np.uint8), rng.integers(0, 3, n)) for n in SIZES}
    return FederatedDataset.from_clients(clients, name="made up", num_classes=3, scale=1 / 255)


@pytest.fixture(scope="module")
def weights(dataset):
    torch.manual_seed(0)
    return FlatModel(mlp(dataset.spec, hidden=MODEL["hidden"])).flat.clone()


@pytest.fixture
def program(tmp_path):
    """The settings of machines that run PROGRAM."""
    (tmp_path / "program.py").write_text(PROGRAM)
    return MachineSettings(MODEL, str(tmp_path / "program.py"), "cpu")


@pytest.fixture(params=["torch", "compiled"])
def settings(request):
    """The settings of machines of each engine."""
    if request.param == "compiled" and isinstance(load_library(), str):
        pytest.skip(load_library())
    return replace(SETTINGS, engine=request.param)


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n}-workers")
def pool(request, dataset):
    with closing(PoolExecutor(SETTINGS, dataset, request.param)) as executor:
        yield executor


def batches(weights):
    """Pairs (weights, tasks), of every kind."""
    clients = range(len(SIZES))
    return [
        (weights, [TrainTask(client, CONFIG, seed=client) for client in clients]),
        (-weights, [TrainTask(client, CONFIG | {"dropout": 0.0}, seed=9, error_before=True) for client in (5, 0, 1)]),
        (weights, [EvaluateTask((0, 3, 1)), EvaluateTask((5,)), EvaluateTask((2, 4))]),
        (weights + 1, [PersonaliseTask(client, CONFIG, seed=client) for client in reversed(clients)]),
    ]


def kept(result):
    """The result in memory of its own."""
    return (result.weights.tolist(), result.metrics) if isinstance(result, Update) else result


def run(executor, jobs):
    """What becomes of batches that are all in flight at once, the last one first in the executor's order."""
    tickets = [executor.submit(*job, order=-float(number)) for number, job in enumerate(jobs)]
    results = []
    for ticket in tickets:
        while not executor.finished(ticket):
            executor.step()
        results.append([kept(result) for result in executor.collect(ticket)])
        executor.release(ticket)
    return results


def run_serially(settings, dataset, jobs):
    with closing(SerialExecutor(settings, dataset)) as executor:
        return run(executor, jobs)


def make_chunks(executor, weights):
    """Lets the pool learn how long tasks take, from when on it sends several at a time."""
    run(executor, [(weights, [EvaluateTask((client,)) for client in range(len(SIZES))])])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_pool_gives_the_serial_executors_bits_whatever_the_order_of_submission(settings, dataset, weights, workers):
    jobs = batches(weights)
    expected = run_serially(settings, dataset, jobs)
    with closing(PoolExecutor(settings, dataset, workers)) as pool:
        for _ in jobs:  # but for the first time, in memory that was used before
            jobs, expected = [*jobs[1:], jobs[0]], [*expected[1:], expected[0]]
            assert run(pool, jobs) == expected
        assert run(pool, jobs[::-1]) == expected[::-1]


def test_studies_that_share_the_pool_get_the_serial_executors_bits(pool, dataset, weights):
    jobs = batches(weights)
    expected = run_serially(SETTINGS, dataset, jobs)
    first, second = pool.for_study(2.0), pool.for_study(1.0)
    tickets = [(first, second)[number % 2].submit(*job) for number, job in enumerate(jobs)]
    for ticket in tickets:
        while not pool.finished(ticket):
            first.step()
    assert [[kept(result) for result in second.collect(ticket)] for ticket in tickets] == expected


def test_each_study_gets_its_share_of_the_workers(dataset, weights):
    """The first study has all workers until the other comes; as it gets its answers, each comes to its share."""
    with closing(PoolExecutor(SETTINGS, dataset, 0)) as pool:
        pipes = [multiprocessing.Pipe() for _ in range(8)]  # nobody reads them
        workers = [Worker(multiprocessing.Process(), ours, ready=True, blocks={0, 1}) for ours, _ in pipes]
        pool._workers.now = list(workers)
        for study in (pool.for_study(1.0), pool.for_study(3.0)):
            study.submit(weights, [EvaluateTask((0,))] * 40)
        for worker in workers:  # a chunk is one task, for each took a second
            pool._take_answer(worker.load.popleft(), Answer(1.0, [[]]))
            pool._dispatch()
        tickets = [piece.ticket for worker in workers for chunk in worker.load for piece in chunk]
        pool._workers.now.clear()  # there are no processes to end
    assert sorted(tickets) == [0] * 2 + [1] * 6


def test_results_are_those_of_the_tasks_in_their_order(pool, dataset, weights):
    train, before, evaluate, personalise = run(pool, batches(weights))
    num_train, num_validation = dataset.num_examples("train").tolist(), dataset.num_examples("validation").tolist()
    assert [metrics["num_train"] for _, metrics in train] == num_train
    assert [metrics["num_train"] for _, metrics in before] == [num_train[client] for client in (5, 0, 1)]
    sizes = [[metrics["num_validation"] for metrics in task] for task in evaluate]
    assert sizes == [[num_validation[client] for client in task] for task in ((0, 3, 1), (5,), (2, 4))]
    assert [metrics["num_validation"] for (metrics,) in personalise] == num_validation[::-1]


def test_a_result_does_not_depend_on_the_tasks_around_it(settings, dataset, weights):
    (job, *_) = batches(weights)
    (together,) = run_serially(settings, dataset, [job])
    alone = [run_serially(settings, dataset, [(weights, [task])])[0][0] for task in job[1]]
    assert together == alone


@pytest.mark.parametrize("floats", [1, 4, 8])
def test_a_result_does_not_depend_on_where_the_weights_lie(settings, dataset, weights, floats):
    """Where memory begins can decide how a matrix product is computed."""
    moved = torch.empty(len(weights) + 16)[floats : floats + len(weights)]
    moved.copy_(weights)
    jobs = [(moved, tasks) for given, tasks in batches(weights) if given is weights]
    expected = run_serially(settings, dataset, [(weights, tasks) for _, tasks in jobs])
    assert run_serially(settings, dataset, jobs) == expected


def test_a_result_does_not_depend_on_the_thread_that_computes_it(settings, dataset, weights):
    expected = run_serially(settings, dataset, batches(weights))
    machine, results = Machine(settings, dataset), []

    def compute():
        for given, tasks in batches(weights):
            results.append([kept(result) for result in machine.run_all(given, tasks)])

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert results == expected


def test_weights_may_change_once_the_pool_has_them(pool, dataset, weights):
    (expected,) = run_serially(SETTINGS, dataset, [(weights, [EvaluateTask((0,))])])
    mine = weights.clone()
    ticket = pool.submit(mine, [EvaluateTask((0,))])
    mine.zero_()
    while not pool.finished(ticket):
        pool.step()
    assert pool.collect(ticket) == expected


def addresses(executor, weights, num_tasks):
    """A ticket for a finished batch of training tasks, and where its updates lie."""
    ticket = executor.submit(weights, [TrainTask(client, CONFIG, 1) for client in range(num_tasks)])
    while not executor.finished(ticket):
        executor.step()
    return ticket, {result.weights.data_ptr() for result in executor.collect(ticket)}


def test_memory_is_used_again_once_it_is_released_and_no_sooner(pool, weights):
    first, first_addresses = addresses(pool, weights, 3)
    second, second_addresses = addresses(pool, weights, 3)
    assert not first_addresses & second_addresses
    pool.release(first)
    third, third_addresses = addresses(pool, weights, 3)
    assert third_addresses == first_addresses
    pool.release(second)
    assert addresses(pool, weights, 2)[1] < second_addresses
    pool.release(third)


def test_a_batch_takes_the_smallest_memory_that_holds_it(pool, weights):
    tickets = [addresses(pool, weights, num_tasks) for num_tasks in (8, 2, 5)]
    for ticket, _ in tickets:
        pool.release(ticket)
    assert addresses(pool, weights, 1)[1] < tickets[1][1]
    assert addresses(pool, weights, 4)[1] < tickets[2][1]
    assert addresses(pool, weights, 8)[1] == tickets[0][1]


@pytest.mark.parametrize("make", [SerialExecutor, lambda *arguments: PoolExecutor(*arguments, 2)])
def test_a_step_without_work_returns(make, dataset, weights):
    with closing(make(SETTINGS, dataset)) as executor:
        executor.step()
        ticket = executor.submit(weights, [EvaluateTask((0,))])
        while not executor.finished(ticket):
            executor.step()
        executor.step()


@pytest.mark.parametrize("what", ["raise", "leave"])
def test_a_client_program_that_raises_or_exits_is_a_failure_of_its_client(program, dataset, weights, what):
    clumsy = CONFIG | {what: 1}
    jobs = [(weights, [TrainTask(0, CONFIG, 1), TrainTask(1, clumsy, 1), PersonaliseTask(2, clumsy, 1)])]
    ((good, *failures),) = run_serially(program, dataset, jobs)
    with closing(PoolExecutor(program, dataset, 2)) as executor:
        assert run(executor, jobs) == [[good, *failures]]
    assert run_serially(SETTINGS, dataset, [(weights, jobs[0][1][:1])]) == [[good]]
    reason = {"raise": "ValueError: no luck", "leave": "SystemExit: farewell"}[what]
    for client, failure in zip((1, 2), failures, strict=True):
        assert isinstance(failure, Failure)
        assert failure.message.startswith(f"client {client} with {clumsy}: {reason} ({program.client}:")


def test_an_evaluation_that_raises_is_a_failure(tmp_path, dataset, weights):
    code = "from torch import nn\ndef make(spec): return nn.Linear(5, 3)\n"  # takes no integers
    (tmp_path / "model.py").write_text(code)
    settings = MachineSettings({"name": f"{tmp_path}/model.py:make"}, "local_sgd", "cpu")
    jobs = [(torch.zeros(17), [EvaluateTask((0, 1))])]  # 18 weights are needed
    ((failure,),) = expected = run_serially(settings, dataset, jobs)
    assert failure.message.startswith("evaluating clients 0..1: RuntimeError: ")
    with closing(PoolExecutor(settings, dataset, 1)) as executor:
        assert run(executor, jobs) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_only_a_client_that_kills_its_worker_twice_is_a_failure(program, dataset, weights, workers):
    deadly = CONFIG | {"die": 3}
    tasks = [TrainTask(seed % len(SIZES), deadly if seed in (4, 11) else CONFIG, seed) for seed in range(16)]
    with closing(PoolExecutor(program, dataset, workers)) as executor:
        make_chunks(executor, weights)
        (results,) = run(executor, [(weights, tasks)])
    (expected,) = run_serially(program, dataset, [(weights, [task for task in tasks if task.config == CONFIG])])
    for seed in (11, 4):
        message = f"client {seed % len(SIZES)} with {deadly}: ended its worker process twice, exit code 3"
        assert results.pop(seed) == Failure(message)
    assert results == expected


@pytest.mark.parametrize(("end", "exit_code"), [({"signal": signal.SIGSEGV}, -11), ({"die": 255}, 255)])
def test_a_client_that_crashes_is_a_failure_and_its_neighbours_are_not(program, dataset, weights, end, exit_code):
    """255 is also what multiprocessing says of a process whose forkserver has ended."""
    deadly = CONFIG | end
    tasks = [TrainTask(seed % len(SIZES), deadly if seed == 9 else CONFIG, seed) for seed in range(16)]
    with closing(PoolExecutor(program, dataset, 1)) as executor:
        make_chunks(executor, weights)
        (results,) = run(executor, [(weights, tasks)])
    assert results.pop(9) == Failure(f"client 1 with {deadly}: ended its worker process twice, exit code {exit_code}")
    assert [results] == run_serially(program, dataset, [(weights, [task for task in tasks if task.config == CONFIG])])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_task_whose_worker_is_killed_twice_stops_the_run_and_is_named(program, dataset, weights, number):
    """It is not the client's failure: nobody can tell who killed the worker."""
    tasks = [TrainTask(client, CONFIG | ({"signal": number} if client == 2 else {}), 1) for client in range(8)]
    with closing(PoolExecutor(program, dataset, 2)) as executor:
        make_chunks(executor, weights)
        executor.submit(weights, tasks, place="round 7")
        with pytest.raises(ClientStopped) as caught:
            step_for_ever(executor)
    guess = ": out of memory?" if number == signal.SIGKILL else ""
    assert str(caught.value) == (
        f"client '31' (number 2), round 7: its worker process was killed by signal {number} ({number.name}), "
        f"and again when the task was tried alone{guess}"
    )
    assert (caught.value.client, caught.value.at_limit) == ("31", False)


def step_for_ever(executor):
    while True:
        executor.step()


def runs(pid):
    """Whether the process runs; nobody may have waited for its end yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_forkserver_that_is_killed_is_started_again_once(tmp_path, program, dataset, weights):
    slow = CONFIG | {"hang once": 1}
    jobs = [(weights, [TrainTask(client, slow if client == 3 else CONFIG, 5) for client in range(len(SIZES))])]
    mark = tmp_path / "mark"

    def kill():
        while not mark.exists():
            time.sleep(0.01)
        os.kill(start_forkserver(), signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    with closing(PoolExecutor(program, dataset, 2)) as executor:
        thread.start()
        results = run(executor, jobs)
        thread.join()
        assert results == run_serially(program, dataset, jobs)  # there is a mark now, so it does not hang
        assert not runs(int(mark.read_text()))  # the worker that outlived its forkserver
        os.kill(start_forkserver(), signal.SIGKILL)
        with pytest.raises(RunStopped, match=r"^the forkserver, which starts the worker processes, ended twice"):
            run(executor, jobs)


# A client that hangs.


class Heard(Exception):
    """Ends a wait that would have no end."""


def test_a_client_that_hangs_is_named_each_time_that_the_seconds_have_doubled(program, dataset, weights):
    heard = []

    def warn(message, **fields):
        heard.append((message, fields))
        if len(heard) == 3:
            raise Heard

    tasks = [TrainTask(client, CONFIG | ({"wait": 1} if client == 2 else {}), 1) for client in range(8)]
    with closing(PoolExecutor(program, dataset, 1, WatchSettings(warn_after=0.1), warn)) as executor:
        make_chunks(executor, weights)  # so that client 2 begins in one chunk with others
        executor.submit(weights, tasks, place="round 7")
        with pytest.raises(Heard):
            step_for_ever(executor)
    assert {message.partition(": no answer after ")[0] for message, _ in heard} == {"client '31' (number 2), round 7"}
    assert {(*fields["clients"], fields["place"]) for _, fields in heard} == {("31", "round 7")}
    assert all(fields["seconds"] >= least for (_, fields), least in zip(heard, (0.1, 0.2, 0.4), strict=True))


def test_a_client_that_hangs_stops_the_run_at_the_limit(program, dataset, weights):
    tasks = [TrainTask(client, CONFIG | ({"wait": 1} if client == 2 else {}), 1) for client in range(8)]
    with closing(PoolExecutor(program, dataset, 2, WatchSettings(limit=0.3))) as executor:
        make_chunks(executor, weights)
        executor.submit(weights, tasks, place="round 7")
        with pytest.raises(ClientStopped) as stop:
            step_for_ever(executor)
    assert str(stop.value) == "client '31' (number 2), round 7: no answer after 0.3 s, the watch.limit"
    assert (stop.value.client, stop.value.at_limit) == ("31", True)


def test_the_serial_executor_names_a_client_that_hangs(tmp_path, program, dataset, weights):
    heard = []

    def warn(message, **fields):
        heard.append((message, fields["clients"]))
        (tmp_path / "mark").touch()  # what the client waits for

    jobs = [(weights, [TrainTask(client, CONFIG | ({"wait": 1} if client == 2 else {}), 1) for client in range(4)])]
    with closing(SerialExecutor(program, dataset, watch=WatchSettings(warn_after=0.1), warn=warn)) as executor:
        results = run(executor, jobs)
    assert results == run_serially(program, dataset, jobs)
    ((message, clients),) = heard
    assert message.startswith("client '31' (number 2): no answer after 0.1")
    assert clients == ["31"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_is_replaced_and_its_work_done_again(tmp_path, program, dataset, weights, workers):
    slow = CONFIG | {"hang once": 1}
    jobs = [(weights, [TrainTask(client, slow if client == 3 else CONFIG, 5) for client in range(len(SIZES))])]
    mark = tmp_path / "mark"

    def kill():
        while not mark.exists():
            time.sleep(0.01)
        os.kill(int(mark.read_text()), signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with closing(PoolExecutor(program, dataset, workers)) as executor:
        results = run(executor, jobs)
        pids = {process.pid for process in multiprocessing.active_children()}
    thread.join()
    assert results == run_serially(program, dataset, jobs)  # there is a mark now, so it does not hang
    assert len(pids) == workers
    assert int(mark.read_text()) not in pids


def test_workers_that_die_idle_are_replaced_wherever_the_parent_now_works(tmp_path, dataset, weights, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    settings = MachineSettings(MODEL, "program.py", "cpu")
    expected = run_serially(settings, dataset, batches(weights))
    with closing(PoolExecutor(settings, dataset, 2)) as executor:
        make_chunks(executor, weights)
        monkeypatch.chdir("/")
        for _ in range(2):
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)
                wait([process.sentinel])
            assert run(executor, batches(weights)) == expected


def test_a_worker_that_ends_before_it_is_ready_is_an_error(tmp_path, dataset, weights):
    (tmp_path / "model.py").write_text("import os\ndef make(spec): os._exit(7)\n")
    settings = MachineSettings({"name": f"{tmp_path}/model.py:make"}, "local_sgd", "cpu")
    expected = r"^worker processes end before they are ready, exit code 7$"
    with closing(PoolExecutor(settings, dataset, 2)) as executor, pytest.raises(RuntimeError, match=expected):
        run(executor, batches(weights))


def test_a_worker_that_cannot_start_says_why(tmp_path, dataset, weights):
    (tmp_path / "model.py").write_text("def make(spec): raise ValueError('no such layer')\n")
    settings = MachineSettings({"name": f"{tmp_path}/model.py:make"}, "local_sgd", "cpu")
    expected = r"^a worker process can't start: .*ValueError: no such layer$"
    with closing(PoolExecutor(settings, dataset, 2)) as executor, pytest.raises(InputError, match=expected):
        run(executor, batches(weights))


def test_long_messages_in_both_directions_do_not_lock(program, dataset, weights):
    # A task of half a megabyte, and a failure that repeats it: more than a pipe holds.
    config = {f"a rather long name {number}": 1.0 for number in range(20_000)} | {"raise": 1}
    jobs = [(weights, [TrainTask(0, config, seed) for seed in range(12)])]
    with closing(PoolExecutor(program, dataset, 1)) as executor:
        make_chunks(executor, weights)
        (results,) = run(executor, jobs)
    assert all(str(config) in failure.message for failure in results)


def test_closing_leaves_neither_processes_nor_descriptors(program, dataset, weights):
    PoolExecutor(SETTINGS, dataset, 1).close()  # what stays for all pools is there now
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    executor = PoolExecutor(program, dataset, 2)
    run(executor, batches(weights))
    run(executor, [(weights, [TrainTask(0, CONFIG | {"die": 3}, 1)])])
    executor.submit(weights, [TrainTask(client, CONFIG | {"hang": 1}, 1) for client in range(4)])
    processes = multiprocessing.active_children()
    assert len(processes) == 2
    executor.close()
    assert not any(process.is_alive() for process in processes)
    assert not multiprocessing.active_children()
    del executor, processes
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before


def test_an_executor_that_is_dropped_ends_its_workers(dataset):
    executor = PoolExecutor(SETTINGS, dataset, 2)
    sentinels = [process.sentinel for process in multiprocessing.active_children()]
    del executor
    gc.collect()
    while sentinels:
        ended = wait(sentinels)
        sentinels = [sentinel for sentinel in sentinels if sentinel not in ended]


def script(tmp_path, **config):
    (tmp_path / "program.py").write_text(PROGRAM)
    return SCRIPT.replace("PROGRAM", repr(str(tmp_path / "program.py"))).replace("CONFIG", repr(config))


def popen(code):
    """A process that runs the code, in a process group of its own."""
    # A shell's background job ignores Ctrl-C, and would hand that down to this process.
    handle_control_c = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [sys.executable, "-c", handle_control_c + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start(tmp_path):
    """A process that runs a pool, once both of its workers are in the middle of a task."""
    process = popen(script(tmp_path, hang=1))
    assert [process.stdout.readline() for _ in range(2)] == ["training\n"] * 2
    return process


def test_workers_end_when_their_parent_is_killed(tmp_path):
    process = start(tmp_path)
    process.kill()
    # The output ends once the last process that holds it has ended.
    assert process.communicate(timeout=60) == ("", "")


def test_control_c_is_the_parents_alone(tmp_path):
    process = start(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert output == ""
    assert errors.count("Traceback") == 1
    assert errors.endswith("KeyboardInterrupt\n")


def test_control_c_while_workers_are_being_prepared_is_the_parents_alone():
    code = """
import time
from fedtune.executors.processes import start_forkserver
start_forkserver()
print("started", flush=True)
time.sleep(600)
"""
    process = popen(code)
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (output, errors.count("Traceback")) == ("", 1)


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_script_needs_no_main_guard(tmp_path, way):
    code = script(tmp_path, epochs=1)
    (tmp_path / "script.py").write_text(code)
    arguments = {"file": [str(tmp_path / "script.py")], "stdin": ["-"]}[way]
    done = subprocess.run([sys.executable, *arguments], input=code, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2 done\n", "")


def test_number_of_workers():
    assert num_workers(3) == 3
    assert 1 <= num_workers(0) <= os.cpu_count()
