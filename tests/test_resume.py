"""A run killed at any moment and resumed ends with the bytes of a run that was never stopped."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from killed_runs import Killed, kill_at_round

import fedtune
from fedtune.errors import InputError
from fedtune.runs.journal import Journal
from fedtune.runs.trial_store import TrialStore
from fedtune.simulation.records import Evaluation, RoundRecord
from fedtune.tuning.fedex import FedExPolicy

NAMES = ("manual", "asha", "fedex", "asha+fedex")
SETTINGS = {"max_rounds": 9, "total_rounds": 36, "seeds": 1, "tuners": list(NAMES)}
COMMAND = ["compare", "digits", "--tuners", ",".join(NAMES), "--max-rounds", "9", "--total-rounds", "36"]
NUM_KILLS = 12


@pytest.fixture(autouse=True)
def a_checkpoint_after_every_evaluation(monkeypatch):
    """So that these small runs are stopped between checkpoints of all kinds, as large runs are."""
    monkeypatch.setattr("fedtune.runs.trial_store.SECONDS_BETWEEN", 0.0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "uninterrupted"
    return fedtune.compare("digits", executor="serial", out=folder, **SETTINGS).folder


def contents(folder):
    """What must be equal to the bit: the frames and the weights of the incumbents."""
    files = [folder / name for name in ("results.csv", "rounds.parquet", "trials.parquet")]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in [*files, *sorted(folder.glob("*/checkpoints/*"))]
    }


def stopped(folder, settings, after):
    """The folder of a run that was stopped after so many rounds of all its studies."""
    with pytest.raises(Killed):
        fedtune.compare("digits", executor="serial", out=folder, listener=kill_at_round(after), **settings)
    return folder


def stopped_and_resumed(folder, settings, after):
    """The folder of such a run, resumed."""
    return fedtune.resume(stopped(folder, settings, after), executor="serial").folder


@pytest.mark.parametrize("after", [1, 20, 41, 90, 130, 144])
def test_stopped_after_any_round(uninterrupted, tmp_path, after):
    """In one process, so that the moment is exact: after `after` rounds of all studies."""
    assert contents(stopped_and_resumed(tmp_path / "run", SETTINGS, after)) == contents(uninterrupted)


FAMILY = {
    "max_rounds": 9,
    "total_rounds": 45,
    "seeds": 1,
    "tuners": ["uniform", "rsws", "elimination+fedex", "sha", "hyperband", "pbt", "bohb", "pbt+fedex", "bohb+fedex"],
    "evaluation": {"every": 3},
    "tuner": {
        "elimination+fedex": {"num_configs": 4, "rounds_per_halving": 2},
        "bohb+fedex": {"form": "product", "pool_size": 2},
    },
}


@pytest.fixture(scope="module")
def whole_family(tmp_path_factory):
    return fedtune.compare("digits", executor="serial", out=tmp_path_factory.mktemp("resume") / "family", **FAMILY)


def test_every_tuner_of_the_family_runs_within_its_budget(whole_family):
    results = whole_family.results
    assert results["tuner"].tolist() == FAMILY["tuners"]
    assert (results["rounds"] <= 45).all()
    assert (results["test_error"] < 0.6).all()  # guessing has 0.9


@pytest.mark.parametrize("tuner", ["pbt", "pbt+fedex"])
def test_a_trial_of_pbt_goes_on_from_its_parent(whole_family, tuner):
    trials = whole_family.trials[whole_family.trials["tuner"] == tuner]
    rounds = whole_family.rounds[whole_family.rounds["tuner"] == tuner].groupby("trial")["round"].agg(["min", "size"])
    merged = trials.set_index("trial").join(rounds)
    children = merged[merged["min"] > 1]
    assert len(children) > 0
    assert (children["rounds"] == children["min"] - 1 + children["size"]).all()


def test_fedex_in_a_copy_starts_anew_on_a_pool_of_its_own(monkeypatch, tmp_path):
    before_first_update, update = {}, FedExPolicy.update

    def watched(policy, *answers):
        before_first_update.setdefault(repr(policy.pool), policy.probabilities())
        update(policy, *answers)

    monkeypatch.setattr(FedExPolicy, "update", watched)
    run = fedtune.compare("digits", executor="serial", out=tmp_path / "run", **FAMILY | {"tuners": ["pbt+fedex"]})
    starts = run.rounds.groupby("trial")["round"].min()
    assert (starts > 1).any()
    assert len(before_first_update) == len(starts)
    for (theta,) in before_first_update.values():
        np.testing.assert_allclose(theta, 1 / 9, rtol=1e-12)


def test_theta_is_over_the_pool_beside_it(whole_family):
    """That of FedEx around the survivor, which is not the one that elimination began with."""
    trials = whole_family.trials.set_index("tuner")
    for row in whole_family.results.itertuples():
        theta, pool = json.loads(row.theta), json.loads(row.pool)
        assert list(map(len, theta)) == list(map(len, pool))
        config = json.loads(row.config)["client"]
        assert all(any(config.items() >= each.items() for each in factor) for factor in pool)
    rows = whole_family.results.set_index("tuner")
    (theta,), (pool,) = (json.loads(rows.loc["elimination+fedex", name]) for name in ("theta", "pool"))
    (first,) = json.loads(trials.loc["elimination+fedex", "config"])["pool"]
    assert (len(first), len(pool)) == (4, 9)
    assert pool[0] in first  # the survivor
    assert json.loads(rows.loc["elimination+fedex", "config"])["client"] == pool[np.argmax(theta)]
    assert json.loads(rows.loc["uniform", "pool"]) == json.loads(trials.loc["uniform", "config"])["pool"]


@pytest.mark.slow
@pytest.mark.parametrize("after", [30, 100, 170, 220, 235, 250, 290, 330, 380])
def test_the_family_stopped_after_any_round(whole_family, tmp_path, after):
    assert contents(stopped_and_resumed(tmp_path / "run", FAMILY, after)) == contents(whole_family.folder)


def test_a_torn_journal_and_a_half_written_checkpoint(uninterrupted, tmp_path):
    def stop(event):
        if event["event"] == "incumbent" and event["tuner"] == "asha" and event["trial"] > 2:
            raise Killed

    folder = tmp_path / "run"
    with pytest.raises(Killed):
        fedtune.compare("digits", executor="serial", out=folder, listener=stop, **SETTINGS)
    with (folder / "asha-seed0" / "journal.jsonl").open("a") as journal:
        journal.write('{"event": "round", "tri')
    (folder / "asha-seed0" / "checkpoints" / "trial-0-round-9.safetensors.tmp").write_bytes(b"half")
    assert contents(fedtune.resume(folder, executor="serial").folder) == contents(uninterrupted)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = [Path.unlink, lambda path: os.truncate(path, 50), flip_a_byte]
LOST = {
    "max_rounds": 9,
    "total_rounds": 45,
    "tuners": ["pbt", "asha"],
    "cohort_size": 1,
    "evaluation": {"every": 3, "clients": 3},
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return fedtune.compare("digits", executor="serial", out=tmp_path_factory.mktemp("resume") / "kept", **LOST).folder


@pytest.mark.parametrize("after", [20, 40, 70])
def test_checkpoints_that_are_lost_are_trained_again(kept, tmp_path, after):
    """Also those of a trial that goes on from its parent, whose own is lost too."""
    warnings = []
    folder = stopped(tmp_path / "run", LOST, after)
    for path, damage in zip(sorted(folder.glob("*/checkpoints/*")), itertools.cycle(DAMAGE), strict=False):
        damage(path)
    listener = lambda event: warnings.append(event["message"]) if event["event"] == "warning" else None  # noqa: E731
    fedtune.resume(folder, executor="serial", listener=listener)
    assert contents(folder) == contents(kept)
    assert warnings
    for warning in warnings:
        assert re.fullmatch(r"checkpoint \S+ is damaged: [^\n]+; trial \d+ is trained again", warning)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_finished_runs_checkpoints_come_again(kept, tmp_path, damage):
    folder = shutil.copytree(kept, tmp_path / "copy")
    for path in folder.glob("*/checkpoints/*"):
        damage(path)
    assert contents(fedtune.resume(folder, executor="serial").folder) == contents(kept)


def test_checkpoints_that_a_crash_left_behind_go_when_the_study_is_opened_again(tmp_path, monkeypatch):
    """The process died between a checkpoint's line in the journal and the removal of the one before, or before it."""
    evaluation = Evaluation(0.5, 1.0, 0.5, 1.0, 0.1)
    record = RoundRecord(1, *[1] * 10, error=0.5, loss=1.0, entropy=math.nan, evaluation=evaluation)
    ask = {"rung": 0, "attempt": 0, "started": 0.0, "finishes": 1.0, "dropped": False, "server": {}, "pool": [[{}]]}
    path, folder = tmp_path / "journal.jsonl", tmp_path / "checkpoints"
    journal = Journal(path)
    store = TrialStore(journal, folder)
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda path, **keywords: None)
        journal.decide("ask", trial=3, rounds=2, **ask)
        for number in (1, 2):
            store.write(3, replace(record, round=number), {"round": np.array(number)})
        journal.decide("tell", trial=3, rung=0, rounds=2, time=1.0, score=0.5)
        journal.decide("ask", trial=3, rounds=5, **ask | {"rung": 1})
        for number in (3, 4, 5):
            store.write(3, replace(record, round=number), {"round": np.array(number)})
    whole = [f"trial-3-round-{number}.safetensors" for number in range(1, 6)]
    for name in ("trial-3-round-6.safetensors", "trial-3-round-5.safetensors.01ef.unfinished", "notes.txt"):
        (folder / name).write_bytes(b"left behind")
    assert {*whole} < {path.name for path in folder.iterdir()}
    journal.close()
    journal = Journal(path)
    TrialStore(journal, folder)
    journal.close()
    # What stays is the state that was reported, the latest one, and a file that is not ours.
    assert {path.name for path in folder.iterdir()} == {whole[1], whole[4], "notes.txt"}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, [1, 2, 3, 4, 5]), (1e9, [1, 5])])
def test_within_a_job_checkpoints_have_a_time_between_them(tmp_path, monkeypatch, seconds, rounds):
    """The state at the end of the job is always kept."""
    monkeypatch.setattr("fedtune.runs.trial_store.SECONDS_BETWEEN", seconds)
    settings = {"cohort_size": 1, "model": {"name": "logistic"}, "evaluation": {"every": 1, "clients": 3}}
    folder = fedtune.train("digits", rounds=5, executor="serial", out=tmp_path / "run", **settings).folder
    lines = map(json.loads, (folder / "manual-seed0" / "journal.jsonl").read_text().splitlines())
    assert [line["round"] for line in lines if line["event"] == "checkpoint"] == rounds


def test_results_that_a_crash_left_half_written_go_at_the_start(kept, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "copy")
    (folder / "results.csv.0123456789abcdef.unfinished").write_text("half")
    fedtune.resume(folder, executor="serial")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in kept.iterdir())


def delete(path):
    path.unlink()


def put_another_there(path):
    path.with_name("saved").write_bytes(path.read_bytes())
    path.with_name("saved").replace(path)


@pytest.mark.parametrize("touch", [delete, put_another_there])
def test_a_journal_that_is_deleted_or_replaced_during_a_run_stops_it_and_nothing_else_is_lost(kept, tmp_path, touch):
    folder, heard = tmp_path / "run", itertools.count(1)

    def interfere(event):
        if event["event"] == "round" and next(heard) == 40:
            touch(folder / "pbt-seed0" / "journal.jsonl")

    with pytest.raises(InputError, match=r"^\S+pbt-seed0/journal.jsonl must stay as it is while the run goes on, got"):
        fedtune.compare("digits", executor="serial", out=folder, listener=interfere, **LOST)
    assert (folder / "pbt-seed0" / "journal.jsonl").exists() == (touch is put_another_there)
    assert (folder / "settings.toml").read_bytes() == (kept / "settings.toml").read_bytes()
    assert contents(fedtune.resume(folder, executor="serial").folder) == contents(kept)


def test_a_finished_run_resumes_to_itself(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "copy")
    before = {path: path.read_bytes() for path in folder.glob("*/journal.jsonl")}
    assert contents(fedtune.resume(folder, executor="serial").folder) == contents(uninterrupted)
    assert {path: path.read_bytes() for path in before} == before


def test_changed_settings_are_refused(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "copy")
    text = (folder / "settings.toml").read_text()
    (folder / "settings.toml").write_text(text.replace("cohort_size = 5", "cohort_size = 4"))
    with pytest.raises(InputError, match=r"got cohort_size = 4; .*journal.jsonl has cohort_size = 5$"):
        fedtune.resume(folder, executor="serial")


@pytest.mark.parametrize("go_on", [fedtune.resume, fedtune.replay, lambda f: fedtune.extend(f, num_configs=9)])
@pytest.mark.parametrize("name", ["", "nowhere"])
def test_no_run_folder(tmp_path, go_on, name):
    with pytest.raises(InputError, match=r"is no run folder: it has no settings.toml"):
        go_on(tmp_path / name)


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "fedtune", *arguments],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=folder.parent,
    )


def journal_size(folder):
    return sum(path.stat().st_size for path in folder.glob("*/journal.jsonl"))


def kill_in_the_middle(process, folder, wait):
    """Kills the process and its workers some time after it has written something new; False if it ended before."""
    size = journal_size(folder)
    while journal_size(folder) == size:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    try:
        process.wait(timeout=wait)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_killed_at_random_moments(uninterrupted, tmp_path, half):
    """A real process and its workers, SIGKILLed NUM_KILLS times at random moments, under both executors.

    Each half has half of the kills, so that two processes can share them.
    """
    rng = np.random.default_rng(half)
    kills = runs = 0
    while kills < NUM_KILLS // 2:
        folder = tmp_path / f"run-{runs}"
        arguments = [*COMMAND, "--out", str(folder)]
        while True:
            process = start(folder, *arguments, "--executor", ("serial", "pool")[(kills + half) % 2])
            with process.stderr:
                if not kill_in_the_middle(process, folder, rng.uniform(0.0, 2.0)):
                    assert process.wait() == 0, process.stderr.read().decode()
                    break
            kills += 1
            arguments = ["resume", str(folder)]
        assert contents(folder) == contents(uninterrupted)
        runs += 1
