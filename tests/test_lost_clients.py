"""A run that goes on without a client is as reproducible as any other: stopped again and resumed, to the same bytes."""

import json
import shutil

import pytest
from killed_runs import Killed, kill_at_round

import fedtune
from fedtune.errors import InputError, RunStopped
from fedtune.runs.journal import Journal

SETTINGS = {
    "tuners": ["manual", "pbt", "asha"],
    "max_rounds": 9,
    "total_rounds": 45,
    "cohort_size": 4,
    "data": {"num_clients": 8},
    "model": {"name": "logistic"},
    "evaluation": {"every": 3},
}
LOST = "5"
AFTER = 60  # rounds of all studies: the first study has ended, the second has begun


def contents(folder):
    """What must be equal to the bit: the frames, the weights of the incumbents, and the settings."""
    files = [folder / name for name in ("results.csv", "rounds.parquet", "trials.parquet", "settings.toml")]
    paths = [*files, *sorted(folder.glob("*/checkpoints/*"))]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def stop(run, after, **keywords):
    """Runs `run` until so many rounds were heard of."""
    with pytest.raises(Killed):
        run(executor="serial", listener=kill_at_round(after), **keywords)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost") / "stopped"
    stop(lambda **keywords: fedtune.compare("digits", out=folder, **SETTINGS, **keywords), AFTER)
    return folder


@pytest.fixture(scope="module")
def finished(stopped, tmp_path_factory):
    folder = shutil.copytree(stopped, tmp_path_factory.mktemp("lost") / "finished")
    return fedtune.resume(folder, lose_clients=[LOST], executor="serial")


def notes(folder):
    """The `lose` lines of each study's journal, by study."""
    paths = sorted(folder.glob("*/journal.jsonl"))
    return {path.parent.name: Journal(path, read_only=True).notes("lose") for path in paths}


def test_a_lost_client_fails_in_each_round_after_the_latest_checkpoint(finished, stopped):
    rounds = finished.rounds.set_index(["tuner", "trial", "round"])["lost"]
    lines = notes(finished.folder)
    assert lines.pop("manual-seed0") == []  # it had ended
    assert {line["client"] for (line,) in lines.values()} == {LOST}
    trained = {study.removesuffix("-seed0"): dict(line["trained"]) for study, (line,) in lines.items()}
    assert set(trained) == {"asha", "pbt"}
    assert trained["asha"] == {}
    assert trained["pbt"] != {}
    trained["manual"] = {0: 45}
    by_round = {}
    for (tuner, trial, number), lost in rounds.items():
        after = number > trained[tuner].get(trial, 0)
        by_round.setdefault(number, set()).add(lost if after else None)
        assert lost <= after
    # All trials have the same cohorts, so all of them lose the client in the same rounds, and in some it is not there.
    assert {frozenset(lost - {None}) for lost in by_round.values()} <= {frozenset({0}), frozenset({1}), frozenset()}
    assert {0, 1} <= set(rounds)


def test_the_settings_and_the_journal_say_who_was_lost(finished):
    assert finished.settings["lost_clients"] == [LOST]
    lines = [json.loads(line) for line in (finished.folder / "asha-seed0/journal.jsonl").read_text().splitlines()]
    reasons = {reason for line in lines if line["event"] == "lost" for reason in line["reasons"]}
    assert reasons == {f"client {LOST} is lost: the run goes on without it"}


@pytest.mark.parametrize("after", [1, 62, 110])
def test_stopped_again_and_resumed(stopped, finished, tmp_path, after):
    folder = shutil.copytree(stopped, tmp_path / "run")
    stop(lambda **keywords: fedtune.resume(folder, lose_clients=[LOST], **keywords), after)
    for path in folder.glob("*/checkpoints/*"):
        if after == 62:
            path.unlink()  # what they held is trained again, with the client up to its loss
    assert contents(fedtune.resume(folder, executor="serial").folder) == contents(finished.folder)


def test_the_loss_holds_for_all_studies_from_the_moment_at_which_the_settings_name_it(stopped, finished, tmp_path):
    """As if the process had died before it wrote the first line into a journal."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    text = (folder / "settings.toml").read_text()
    (folder / "settings.toml").write_text(text.replace("lost_clients = []", f'lost_clients = [\n    "{LOST}",\n]'))
    assert contents(fedtune.resume(folder, executor="serial").folder) == contents(finished.folder)


def test_a_run_without_a_client_is_replayed(finished):
    assert all(study.finished for study in fedtune.replay(finished.folder))


@pytest.mark.slow
def test_a_run_without_a_client_is_the_same_in_the_pool(stopped, finished, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    fedtune.resume(folder, lose_clients=[LOST], executor="pool", workers=2)
    assert contents(folder) == contents(finished.folder)


def test_a_cohort_that_is_lost_in_the_first_round_does_not_end_the_run(tmp_path):
    """The user gave these clients up, so their failures do not show that the client program is at fault."""
    data = {"num_clients": 2}
    few = {**SETTINGS, "max_rounds": 3, "total_rounds": 3, "cohort_size": 2, "data": data, "lost_clients": ["0", "1"]}
    run = fedtune.train("digits", out=tmp_path / "run", executor="serial", **{**few, "tuners": ["manual"]})
    assert run.rounds["lost"].tolist() == [2, 2, 2]


def test_only_a_client_that_there_is_can_be_lost(stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"^a lost client must be the id of a client of digits, got 'nobody'$"):
        fedtune.resume(folder, lose_clients=["nobody"], executor="serial")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_finished_run_loses_no_client(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    with pytest.raises(InputError, match=r"^a client can be lost only in a run that is not finished, got "):
        fedtune.resume(folder, lose_clients=["1"], executor="serial")
    assert contents(folder) == contents(finished.folder)


def test_a_client_that_was_lost_can_not_come_back(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    text = (folder / "settings.toml").read_text()
    (folder / "settings.toml").write_text(text.replace(f'"{LOST}",\n', ""))
    for path in folder.glob("*/checkpoints/*"):
        path.unlink()  # so that something is trained
    with pytest.raises(InputError, match=rf"^lost_clients in the settings must name client '{LOST}', as .* does"):
        fedtune.resume(folder, executor="serial")


# A client that stops the run, and one that hangs: in the pool.

PROGRAM = """
import os, signal, time
from pathlib import Path

from fedtune_clients import local_sgd

HYPERPARAMETERS = local_sgd.HYPERPARAMETERS
SICK = Path(__file__).with_name("sick")


def train(model, weights, examples, config, rng):
    if SICK.exists() and examples.num_examples == int(SICK.read_text()):
        if SICK.with_name("hangs").exists():
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
    return local_sgd.train(model, weights, examples, config, rng)
"""
DATA = """
import numpy as np
from fedtune.data.federated_dataset import FederatedDataset

def make():
    rng = np.random.default_rng(0)
    clients = {f"client {size}": (rng.random((size, 4), np.float32), np.arange(size) % 3) for size in range(30, 80, 10)}
    return FederatedDataset.from_clients(clients, name="made up", num_classes=3)
"""
SICK = "client 50"


@pytest.fixture
def own(tmp_path):
    """The settings of a run on five clients, with a program that a file makes sick."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "data.py").write_text(DATA)
    return {
        "client": {"name": str(tmp_path / "program.py")},
        "data": {"name": f"{tmp_path}/data.py:make"},
        "model": {"name": "logistic"},
        "cohort_size": 5,
        "evaluation": {"every": 2},
    }


def sick_after(number, tmp_path, events):
    """A listener that makes a client sick after a round."""

    def listen(event):
        events.append(event)
        if event["event"] == "round" and event["round"] == number:
            (tmp_path / "sick").write_text("40")  # of 50 examples, so many are for training

    return listen


def frames(run):
    return [contents(run.folder)[name] for name in ("results.csv", "rounds.parquet", "trials.parquet")]


def train(own, folder, listener, **settings):
    return fedtune.train(own["data"]["name"], rounds=8, out=folder, listener=listener, **own, **settings)


def test_a_run_that_a_client_stops_says_how_to_go_on(own, tmp_path):
    expected = train(own, tmp_path / "expected", lambda event: None, executor="serial")
    folder = tmp_path / "run"
    with pytest.raises(RunStopped) as stopped:
        train(own, folder, sick_after(4, tmp_path, []), executor="pool", workers=1)
    assert str(stopped.value) == (
        f"client '{SICK}' (number 2), tuner manual, seed 0, trial 0, round 5: its worker process was killed by "
        f"signal 9 (SIGKILL), and again when the task was tried alone: out of memory?; "
        f"to resume: fedtune resume {folder}, or without the client: "
        f"fedtune resume {folder} --lose-client '{SICK}'"
    )
    without = shutil.copytree(folder, tmp_path / "without")
    (tmp_path / "sick").unlink()
    assert frames(fedtune.resume(folder, executor="serial")) == frames(expected)
    # What a client that is lost at the limit leaves behind is the same as what --lose-client leaves behind.
    stayed = fedtune.resume(without, lose_clients=[SICK], executor="serial")
    (tmp_path / "hangs").touch()
    events = []
    watch = {"limit": 0.5, "at_limit": "lose"}
    hung = train(own, tmp_path / "hung", sick_after(4, tmp_path, events), executor="pool", workers=1, watch=watch)
    assert frames(hung) == frames(stayed) != frames(expected)
    assert notes(hung.folder) == notes(stayed.folder)
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    (warning,) = [message for message in warnings if message.startswith("client ")]
    assert warning == (
        f"client '{SICK}' (number 2), tuner manual, seed 0, trial 0, round 5: no answer after 0.5 s, the "
        "watch.limit; the run goes on without this client"
    )


@pytest.mark.parametrize("where", [{"executor": "serial"}, {"executor": "batched"}])
def test_a_limit_needs_the_pool(own, tmp_path, where):
    expected = r"^watch.limit must be used with executor 'pool', which can end a client, got executor '\w+' on 'cpu'$"
    with pytest.raises(InputError, match=expected):
        train(own, tmp_path / "run", lambda event: None, watch={"limit": 1.0}, **where)
    assert not (tmp_path / "run").exists()
