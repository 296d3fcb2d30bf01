"""A run killed at any moment and resumed ends with the bytes of a run that was never stopped."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from killed_runs import Killed, kill_at_round

import fedtune
from fedtune.errors import InputError
from fedtune.tuning.fedex import FedExPolicy

NAMES = ("manual", "asha", "fedex", "asha+fedex")
SETTINGS = {"max_rounds": 9, "total_rounds": 36, "seeds": 1, "tuners": list(NAMES)}
COMMAND = ["compare", "digits", "--tuners", ",".join(NAMES), "--max-rounds", "9", "--total-rounds", "36"]
NUM_KILLS = 20


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


def test_a_checkpoint_that_a_crash_left_behind_goes_at_the_end(kept, tmp_path):
    """As if the process had died between a checkpoint's line in the journal and the removal of the one before."""
    folder = shutil.copytree(kept, tmp_path / "copy")
    for path in list(folder.glob("*/checkpoints/*")):
        shutil.copy(path, path.with_name(re.sub(r"round-\d+", "round-1", path.name)))
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
    with pytest.raises(
        InputError, match=r"settings.toml must hold the settings of .*journal.jsonl \(digest \w+\), got other ones"
    ):
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
