"""In which engine clients train: chosen once for a run, said, kept in its folder, and required from then on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_in_torch import written
from killed_runs import Killed, kill_at_round

import fedtune
from fedtune import plugins
from fedtune.client.tasks import TrainTask
from fedtune.errors import InputError, NoKernelError
from fedtune.executors.batched import BatchedMachine
from fedtune.executors.engine import choose_engine
from fedtune.executors.machine import Machine, MachineSettings
from fedtune.executors.pool import PoolExecutor
from fedtune.runs.prepare import checked_model
from fedtune.runs.server_checkpoint import run_name
from fedtune.server.messages import run_settings
from fedtune.settings import digest, resolve
from fedtune.settings_text import read_settings
from fedtune_clients.kernel_library import load_library

OLD_RUN = Path(__file__).parent / "run_of_format_3"
TINY = {
    "executor": "serial",
    "cohort_size": 2,
    "model": {"name": "logistic"},
    "data": {"num_clients": 4},
    "evaluation": {"clients": 2},
}
FILES = ("results.csv", "rounds.parquet", "trials.parquet")
NO_COMPILE_MODEL = "HYPERPARAMETERS = {}\n\n\ndef train(model, weights, examples, config, rng):\n    return weights\n"


def train(folder, client, said=None, **settings):
    """A run of three rounds with this client program."""
    listener = (said if said is not None else []).append
    return fedtune.train("digits", 3, out=folder, listener=listener, client={"name": client}, **TINY | settings)


def where(said):
    """The lines that say where clients train."""
    return [event["message"] for event in said if event["event"] == "executor"]


def contents(folder):
    """The results and the weights of a run."""
    return [(folder / name).read_bytes() for name in FILES] + [
        path.read_bytes() for path in sorted(folder.glob("*/checkpoints/*"))
    ]


def first_line(folder):
    return json.loads((folder / "manual-seed0" / "journal.jsonl").read_text().splitlines()[0])


def chosen(**settings):
    """The engine of a run on the digits with these settings."""
    resolved = resolve([{"data": {"name": "digits"}, "model": {"name": "logistic"}}, settings])
    dataset = plugins.load_dataset(resolved.data)
    return choose_engine(resolved, checked_model(resolved, dataset), dataset.spec)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A finished run in the kernel."""
    folder = tmp_path_factory.mktemp("compiled")
    return train(folder / "run", written(folder))


# The choice.


def test_auto_takes_the_kernel_if_the_client_program_has_one(tmp_path):
    engine = chosen(client={"name": written(tmp_path)})
    assert (engine.name, engine.kernel, engine.reason) == ("compiled", "kernel-1", "")
    assert chosen(client={"name": written(tmp_path)}, engine="compiled") == engine
    assert engine.describe("in 2 worker processes") == "in a compiled kernel, in 2 worker processes"


BATCHED = "the batched executor trains many clients in one tensor program"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"executor": "batched"}, BATCHED),
        ({"precision": "bf16"}, "a kernel needs precision 'fp32', got 'bf16'"),
        ({"device": "meta", "executor": "serial"}, "a kernel needs device 'cpu', got 'meta'"),
        ({"device": "meta"}, BATCHED),
    ],
    ids=str,
)
def test_a_run_that_can_have_no_kernel_trains_in_torch_and_says_why(tmp_path, settings, reason):
    settings = {"client": {"name": written(tmp_path)}, **settings}
    engine = chosen(**settings)
    assert (engine.name, engine.kernel, engine.reason) == ("torch", None, reason)
    assert engine.describe("in this process") == f"in torch, in this process: {reason}"
    with pytest.raises(NoKernelError, match=f"^engine must be 'torch' here, got 'compiled': {reason}$"):
        chosen(**settings, engine="compiled")
    assert chosen(**settings, engine="torch").describe("in this process") == "in torch, in this process"


def test_torch_asks_no_client_program_for_a_kernel(tmp_path):
    client = written(tmp_path)
    (tmp_path / "kernel").unlink()  # so that compile_model would raise
    assert chosen(client={"name": client}, engine="torch").name == "torch"
    assert chosen(client={"name": client}).reason.startswith(f"compile_model of '{client}' raised FileNotFoundError: ")


def test_why_a_client_program_has_no_kernel(tmp_path):
    assert chosen(client={"name": written(tmp_path, "it has no such layer")}).reason == "it has no such layer"
    path = tmp_path / "plain.py"
    path.write_text(NO_COMPILE_MODEL)
    assert chosen(client={"name": str(path)}).reason == f"the client program '{path}' has no compile_model"
    path = tmp_path / "odd.py"
    path.write_text(f"{NO_COMPILE_MODEL}\n\ndef compile_model(model, spec):\n    return None\n")
    returned = f"compile_model of '{path}' must return a CompiledModel or a str, got NoneType"
    assert chosen(client={"name": str(path)}).reason == returned


# Machines.


@pytest.fixture
def dataset():
    return plugins.load_dataset({"name": "digits", "num_clients": 4})


def test_a_machine_compiles_only_if_it_must(tmp_path, dataset):
    settings = MachineSettings({"name": "logistic"}, written(tmp_path), "cpu")
    assert Machine(settings, dataset).model.compiled is None
    assert Machine(replace(settings, engine="compiled"), dataset).model.compiled.digest == "kernel-1"
    batched = BatchedMachine(replace(settings, engine="compiled"), dataset, say=lambda message: None)
    assert batched._machine.model.compiled is None


def test_a_machine_that_cannot_compile_is_an_error(tmp_path, dataset):
    settings = MachineSettings({"name": "logistic"}, written(tmp_path, "not built"), "cpu", engine="compiled")
    with pytest.raises(NoKernelError, match=r"got 'compiled': not built$"):
        Machine(settings, dataset)
    with pytest.raises(NoKernelError, match=r"got 'compiled': a kernel needs precision 'fp32', got 'bf16'$"):
        Machine(replace(settings, precision="bf16"), dataset)


def test_a_worker_that_cannot_compile_stops_the_run(tmp_path, dataset):
    settings = MachineSettings({"name": "logistic"}, written(tmp_path, "not built"), "cpu", engine="compiled")
    executor = PoolExecutor(settings, dataset, 1)
    try:
        executor.submit(torch.zeros(650), [TrainTask(0, {}, seed=0)])
        with pytest.raises(InputError, match=r"engine must be 'torch' here, got 'compiled': not built$"):
            executor.step()
    finally:
        executor.close()


# Runs.


def test_a_run_says_in_which_engine_its_clients_train(tmp_path):
    said = []
    client = written(tmp_path)
    run = train(tmp_path / "compiled", client, said)
    in_torch = train(tmp_path / "torch", client, said, engine="torch")
    (tmp_path / "kernel").write_text("not built")
    fallen_back = train(tmp_path / "fallen back", client, said)
    assert where(said) == [
        "clients train in a compiled kernel, in this process",
        "clients train in torch, in this process",
        "clients train in torch, in this process: not built",
    ]
    assert [each.settings["engine"] for each in (run, in_torch, fallen_back)] == ["compiled", "torch", "torch"]
    assert contents(in_torch.folder) == contents(fallen_back.folder) != contents(run.folder)


def test_workers_train_in_the_kernel_too(compiled, tmp_path):
    said = []
    client = compiled.settings["client"]["name"]
    pooled = train(tmp_path / "run", client, said, executor="pool", workers=2)
    assert where(said) == ["clients train in a compiled kernel, in 2 worker processes"]
    assert contents(pooled.folder) == contents(compiled.folder)


@pytest.mark.skipif(isinstance(load_library(), str), reason=f"{load_library()}")
def test_the_kernel_of_local_sgd_gives_the_same_bits_with_any_number_of_workers(tmp_path):
    said = []
    settings = {"engine": "compiled", "executor": "pool"}
    runs = [
        train(tmp_path / "serial", "local_sgd", said, engine="compiled"),
        *(train(tmp_path / str(workers), "local_sgd", said, workers=workers, **settings) for workers in (1, 2)),
    ]
    places = ["this process", "1 worker process", "2 worker processes"]
    assert where(said) == [f"clients train in a compiled kernel, in {place}" for place in places]
    assert contents(runs[0].folder) == contents(runs[1].folder) == contents(runs[2].folder)


def test_an_engine_that_must_be_and_cannot_be_is_one_line_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"^engine must be 'torch' here, got 'compiled': not built$"):
        train(tmp_path / "run", written(tmp_path / "program", "not built"), engine="compiled")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"^engine must be 'auto', 'torch' or 'compiled', got 'cuda'$"):
        fedtune.train("digits", 1, engine="cuda")


def test_tune_and_compare_take_the_engine_as_any_other_setting(tmp_path):
    budget = {"max_rounds": 1, "total_rounds": 1, "client": {"name": written(tmp_path)}, **TINY}
    tuned = fedtune.tune("digits", "random", engine="torch", out=tmp_path / "tuned", **budget)
    compared = fedtune.compare("digits", tuners=["manual"], engine="compiled", out=tmp_path / "compared", **budget)
    assert [run.settings["engine"] for run in (tuned, compared)] == ["torch", "compiled"]


def test_the_settings_of_a_run_repeat_it_in_its_engine(compiled, tmp_path):
    settings = compiled.folder / "settings.toml"
    assert 'engine = "compiled"' in settings.read_text()
    again = fedtune.compare(settings, out=tmp_path / "again")
    assert contents(again.folder) == contents(compiled.folder)
    in_torch = fedtune.compare(settings, out=tmp_path / "torch", engine="torch")
    assert in_torch.settings["engine"] == "torch"
    assert contents(in_torch.folder) != contents(compiled.folder)


def test_the_journal_of_a_run_holds_its_engine_and_kernel(compiled, tmp_path):
    line = first_line(compiled.folder)
    assert (line["deciding"]["engine"], line["kernel"]) == ("compiled", "kernel-1")
    in_torch = first_line(train(tmp_path / "run", written(tmp_path), engine="torch").folder)
    assert "engine" not in in_torch["deciding"]
    assert "kernel" not in in_torch
    assert [study.finished for study in fedtune.replay(compiled.folder)] == [True]


def stopped(folder, client, **settings):
    """The folder of a run that was stopped after its second round."""
    with pytest.raises(Killed):
        fedtune.train("digits", 3, out=folder, listener=kill_at_round(2), client={"name": client}, **TINY | settings)
    return folder


def test_a_run_is_resumed_in_its_engine(compiled, tmp_path):
    client = compiled.settings["client"]["name"]
    said = []
    resumed = fedtune.resume(stopped(tmp_path / "run", client), listener=said.append)
    assert where(said) == ["clients train in a compiled kernel, in this process"]
    assert contents(resumed.folder) == contents(compiled.folder)
    # A run that began in torch stays there, although there is a kernel now.
    late = written(tmp_path, "not built")
    folder = stopped(tmp_path / "late", late)
    (tmp_path / "kernel").write_text("kernel-1")
    said.clear()
    fedtune.resume(folder, listener=said.append)
    assert where(said) == ["clients train in torch, in this process"]


def test_a_run_is_not_resumed_without_its_kernel_or_with_another_one(tmp_path):
    folder = stopped(tmp_path / "run", written(tmp_path))
    before = (folder / "manual-seed0" / "journal.jsonl").read_bytes()
    advice = (
        "install the version of the client program that it was begun with, or, to repeat the run in torch: "
        f"fedtune compare {folder}/settings.toml --set engine=torch --out NEW"
    )
    (tmp_path / "kernel").write_text("not built")
    with pytest.raises(InputError) as raised:
        fedtune.resume(folder)
    assert str(raised.value) == f"engine must be 'torch' here, got 'compiled': not built; {advice}"
    (tmp_path / "kernel").write_text("kernel-2")
    with pytest.raises(InputError) as raised:
        fedtune.resume(folder)
    assert str(raised.value) == (
        "the run must be resumed with the kernel with which it was begun, got kernel kernel-2; "
        f"{folder}/manual-seed0/journal.jsonl has kernel kernel-1: {advice}"
    )
    assert (folder / "manual-seed0" / "journal.jsonl").read_bytes() == before
    (tmp_path / "kernel").write_text("kernel-1")
    assert len(fedtune.resume(folder).rounds) == 3


def test_a_search_is_not_extended_without_its_kernel_and_nothing_is_changed(tmp_path):
    settings = {**TINY, "client": {"name": written(tmp_path)}, "max_rounds": 1, "engine": "compiled"}
    folder = fedtune.tune("digits", "random", 1, out=tmp_path / "run", **settings).folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for kernel, message in (("not built", "'compiled': not built; install"), ("kernel-2", "got kernel kernel-2; ")):
        (tmp_path / "kernel").write_text(kernel)
        with pytest.raises(InputError, match=message):
            fedtune.extend(folder, num_configs=2)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (tmp_path / "kernel").write_text("kernel-1")
    assert len(fedtune.extend(folder, num_configs=2).trials) == 2


@pytest.mark.parametrize(("begun", "edited"), [("compiled", "torch"), ("torch", "compiled"), ("compiled", "auto")])
def test_settings_whose_engine_was_edited_are_refused(tmp_path, begun, edited):
    folder = stopped(tmp_path / "run", written(tmp_path), engine=begun)
    path = folder / "settings.toml"
    path.write_text(path.read_text().replace(f'engine = "{begun}"', f'engine = "{edited}"'))
    with pytest.raises(InputError) as raised:
        fedtune.resume(folder)
    assert str(raised.value) == (
        f"{path} must have the settings with which the run was begun, got engine = {edited!r}; "
        f"{folder}/manual-seed0/journal.jsonl has engine = {begun!r}; to repeat the run in torch: "
        f"fedtune compare {path} --set engine=torch --out NEW"
    )


def test_a_compiled_run_is_not_resumed_by_the_batched_executor(tmp_path):
    folder = stopped(tmp_path / "run", written(tmp_path))
    with pytest.raises(InputError, match="the executor now batches clients and did not before"):
        fedtune.resume(folder, executor="batched")


# Runs of older versions, whose settings and journals name no engine.


def without_engine(folder):
    """The run folder as an older version wrote it."""
    path = folder / "settings.toml"
    path.write_text(path.read_text().replace('engine = "torch"\n', ""))
    return folder


def test_older_runs_trained_in_torch_and_go_on_there(tmp_path):
    client = written(tmp_path)
    whole = train(tmp_path / "whole", client, engine="torch").folder
    said = []
    folder = without_engine(stopped(tmp_path / "run", client, engine="torch"))
    resumed = fedtune.resume(folder, listener=said.append)
    assert where(said) == ["clients train in torch, in this process"]
    assert contents(folder) == contents(whole)
    assert resumed.settings["engine"] == "torch"
    assert [study.finished for study in fedtune.replay(folder)] == [True]
    again = fedtune.compare(folder / "settings.toml", out=tmp_path / "again")
    assert contents(again.folder) == contents(whole)


def test_an_older_search_is_extended_in_torch(tmp_path):
    settings = {**TINY, "client": {"name": written(tmp_path)}, "max_rounds": 1, "engine": "torch"}
    short, long = (fedtune.tune("digits", "random", num, out=tmp_path / str(num), **settings).folder for num in (1, 2))
    said = []
    extended = fedtune.extend(without_engine(short), num_configs=2, listener=said.append)
    assert where(said) == ["clients train in torch, in this process"]
    assert contents(extended.folder)[3:] == contents(long)[3:]  # the weights
    assert 'engine = "torch"' in (short / "settings.toml").read_text()


def test_the_run_folder_of_another_version_is_a_run_in_torch():
    assert read_settings(OLD_RUN / "settings.toml")["engine"] == "torch"
    assert fedtune.read_run(OLD_RUN).settings["engine"] == "torch"
    assert fedtune.resolve_settings(OLD_RUN / "settings.toml").engine == "torch"


def test_only_the_kernel_changes_the_digest_of_settings():
    tables = [{"data": {"name": "digits"}}]
    in_torch, in_kernel = (resolve([*tables, {"engine": engine}]) for engine in ("torch", "compiled"))
    begun = json.loads((OLD_RUN / "asha-seed1" / "journal.jsonl").read_text().splitlines()[0])
    assert digest(resolve([read_settings(OLD_RUN / "settings.toml")])) == begun["settings"]
    old = run_settings((OLD_RUN / "settings.toml").read_text())
    assert run_name(old, "asha") == f"{begun['settings']} asha {old.seed}"  # in the checkpoint of a ServerApp
    assert digest(in_torch) != digest(in_kernel)
    assert run_name(in_torch, "manual") != run_name(in_kernel, "manual")
