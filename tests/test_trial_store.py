import math

import numpy as np
import pytest

from fedtune.errors import InputError
from fedtune.runs.journal import Journal
from fedtune.runs.trial_store import TrialStore
from fedtune.simulation.records import KEY_TYPES, Evaluation, record_from_json


def record(server_round, *, evaluated=True):
    values = dict.fromkeys(KEY_TYPES, 0) | {"error": math.nan, "loss": 0.5, "entropy": 0.0}
    evaluation = [0.5] * len(Evaluation._fields) if evaluated else None
    return record_from_json(values | {"round": server_round, "evaluation": evaluation})


def state(server_round):
    return {"round": np.array(server_round), "weights": np.full(2, server_round, np.float32)}


@pytest.fixture
def store(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    yield TrialStore(journal, tmp_path / "checkpoints")
    journal.close()


def kept(folder):
    """The rounds of the checkpoints, by trial."""
    found = {}
    for path in (folder / "checkpoints").iterdir():
        _, trial, _, server_round = path.stem.split("-")
        found.setdefault(int(trial), set()).add(int(server_round))
    return found


def train(store, trial, *rounds):
    for server_round in rounds:
        store.write(trial, record(server_round), state(server_round))


def test_the_latest_checkpoint_and_that_of_the_last_report_stay(store, tmp_path):
    """A copy starts from the reported one, also while the trial is trained on."""
    train(store, 0, 1, 2)
    assert kept(tmp_path) == {0: {2}}
    store.report(0, 2)
    train(store, 0, 3)
    assert kept(tmp_path) == {0: {2, 3}}
    train(store, 0, 4, 5)
    assert kept(tmp_path) == {0: {2, 5}}
    assert store.load(0, 2)["weights"].tolist() == [2.0, 2.0]
    store.report(0, 5)
    assert kept(tmp_path) == {0: {5}}
    assert store.latest(0) == 5


def test_a_round_without_a_state_leaves_the_checkpoint(store, tmp_path):
    train(store, 0, 1)
    store.write(0, record(2, evaluated=False), None)
    assert kept(tmp_path) == {0: {1}}
    assert store.latest(0) == 1


def test_a_trial_that_is_removed_is_needed_no_more(store, tmp_path):
    train(store, 0, 1, 2)
    store.report(0, 2)
    train(store, 0, 3)
    train(store, 1, 1)
    store.remove(0)
    assert kept(tmp_path) == {1: {1}}
    assert store.load(0, 3) is None
    for server_round in (2, 3):  # it was trained again for a copy that had not begun
        store.replace(0, server_round, state(server_round))
    assert kept(tmp_path) == {1: {1}}


def test_a_lost_checkpoint_is_written_again_while_it_is_needed(store, tmp_path):
    train(store, 0, 1, 2)
    store.report(0, 2)
    train(store, 0, 3)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    for server_round in (1, 2, 3):
        store.replace(0, server_round, state(server_round))
    assert kept(tmp_path) == {0: {2, 3}}


def test_a_copy_has_a_checkpoint_of_its_own(store, tmp_path):
    train(store, 0, 1)
    store.inherit(1, 1, state(1))
    store.remove(0)
    assert kept(tmp_path) == {1: {1}}
    assert store.latest(1) == 1


def test_only_one_trial_stays_at_the_end(store, tmp_path):
    train(store, 0, 1)
    store.report(0, 1)
    train(store, 0, 2)
    train(store, 1, 1)
    (tmp_path / "checkpoints" / "trial-0-round-9.safetensors.tmp").write_bytes(b"half")
    store.keep_only(0, 1)
    assert kept(tmp_path) == {0: {1, 2}}


def test_a_checkpoint_of_another_round_is_an_error(store, tmp_path):
    train(store, 0, 1, 2)
    folder = tmp_path / "checkpoints"
    (folder / "trial-0-round-2.safetensors").rename(folder / "trial-0-round-3.safetensors")
    with pytest.raises(InputError, match=r"trial-0-round-3.safetensors must be of round 3, got 2"):
        store.load(0, 3)


def test_what_the_journal_holds_is_known_to_a_new_store(store, tmp_path):
    store._journal.decide(
        "ask",
        trial=0,
        rung=0,
        rounds=2,
        attempt=0,
        started=0.0,
        finishes=2.0,
        dropped=False,
        server={},
        pool=[[{}]],
    )
    train(store, 0, 1, 2)
    journal = Journal(tmp_path / "journal.jsonl", read_only=True)
    again = TrialStore(journal, tmp_path / "checkpoints")
    assert again.latest(0) == 2
    assert [found.round for found in again.past_rounds.of(0, 0, 2)] == [1, 2]
    with pytest.raises(InputError, match="must have a line of round 3 of trial 0, got none"):
        again.past_rounds.of(0, 2, 3)
