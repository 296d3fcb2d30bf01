"""Trials that copy others, as those of PBT do: what they are scored by, which checkpoints stay, and old runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from killed_runs import Killed, kill_at_round

import fedtune
from fedtune.runs.prepare import prepare
from fedtune.runs.run_folder import claim_folder
from fedtune.tuning.pbt import PBT, Population

OLD_RUN = Path(__file__).parent / "pbt_run_of_format_3"
SETTINGS = {
    "executor": "serial",
    "tuners": ["pbt"],
    "max_rounds": 8,
    "total_rounds": 60,
    "cohort_size": 1,
    "parallel_trials": 3,
    "model": {"name": "logistic"},
    "data": {"num_clients": 6},
    "evaluation": {"clients": 3},
    "space": {"client": {"epochs": {"choice": [1]}}},
    "tuner": {"pbt": {"population_size": 5}},
}
FILES = ("results.csv", "rounds.parquet", "trials.parquet")


def run(folder, listener=lambda event: None, **settings):
    """The run in the folder, without figures."""
    resolved = fedtune.resolve_settings("digits", SETTINGS | settings)
    prepared = prepare(resolved)
    claim_folder(folder, prepared.settings, force=False)
    prepared.run(folder, listener)
    return fedtune.read_run(folder)


def contents(folder):
    paths = [*(folder / name for name in FILES), *sorted(folder.glob("*/checkpoints/*"))]
    return {path.name: path.read_bytes() for path in paths}


def test_a_copy_is_scored_over_the_same_tail_as_every_trial(tmp_path, monkeypatch):
    """Each score again from the rows of rounds.parquet, with the rounds of a parent up to the round of the copy."""
    parents, starts, ask = {}, {}, PBT.ask

    def watched(tuner):
        job = ask(tuner)
        parents[job.trial.number] = job.trial.parent
        starts.setdefault(job.trial.number, job.rounds - tuner.interval)
        return job

    monkeypatch.setattr(PBT, "ask", watched)
    found = run(tmp_path / "run")
    rows = found.rounds.set_index(["trial", "round"])

    def tail(trial, rounds, field):
        values = []
        for server_round in range(int(0.75 * rounds) + 1, rounds + 1):
            holder = trial
            while server_round <= starts[holder]:
                holder = parents[holder]
            values.append(rows.loc[(holder, server_round), field])
        return np.mean(values)

    scores = rows["score"].dropna()
    for (trial, rounds), score in scores.items():
        assert score == pytest.approx(tail(trial, rounds, "validation_error"), rel=1e-12)
    copies = [(trial, rounds) for trial, rounds in scores.index if rounds - 1 == starts[trial] >= 4]
    assert copies  # just copied, and the tail has more than one round
    for row in found.trials.itertuples():
        assert row.score_se == pytest.approx(tail(row.trial, row.rounds, "validation_error_se"), nan_ok=True)
    (result,) = found.results.itertuples()
    for field in ("validation_error", "validation_error_se", "test_error"):
        assert getattr(result, field) == pytest.approx(tail(result.trial, result.rounds_of_trial, field))


def test_a_replaced_trials_checkpoints_go_at_once(tmp_path, monkeypatch):
    replaced, copy, best = set(), Population.copy, []

    def watched(population, member, donor, trial):
        replaced.add(member.trial.number)
        copy(population, member, donor, trial)

    def look(event):
        """The incumbent is said after each `tell`."""
        if event["event"] == "incumbent":
            best.append(event["trial"])
            kept = {int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("*/checkpoints/*")}
            assert kept & replaced <= {event["trial"]}
            assert event["trial"] in kept

    monkeypatch.setattr(Population, "copy", watched)
    run(tmp_path / "run", look)
    assert len(replaced) > 3
    assert len(best) > 20


FAILURES = {"devices": {"drop_probability": 0.3, "straggler_std": 1.0}, "total_rounds": 40}


@pytest.fixture(scope="module")
def with_failures(tmp_path_factory):
    return run(tmp_path_factory.mktemp("copies") / "run", **FAILURES)


@pytest.mark.parametrize("after", [9, 22, 33, 38])
def test_a_run_with_copies_and_failed_attempts_is_resumed(with_failures, tmp_path, after):
    with pytest.raises(Killed):
        run(tmp_path / "run", kill_at_round(after), **FAILURES)
    fedtune.resume(tmp_path / "run", executor="serial")
    assert contents(tmp_path / "run") == contents(with_failures.folder)
    (study,) = fedtune.replay(tmp_path / "run")
    assert study.finished


def told(folder):
    lines = map(json.loads, (folder / "pbt-seed1" / "journal.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "tell"]


def test_a_run_of_journal_format_3_keeps_its_scores(tmp_path):
    """There a copy was scored by its own rounds alone, and the last copy won for it."""
    folder = shutil.copytree(OLD_RUN, tmp_path / "run")
    (study,) = fedtune.replay(folder)
    best = min((line for line in told(folder) if line["rounds"] == 8), key=lambda line: line["score"])
    assert study.finished
    assert (study.incumbent.trial, study.incumbent.error) == (best["trial"], best["score"])
    before = (folder / "pbt-seed1" / "journal.jsonl").read_bytes()
    resumed = fedtune.resume(folder, executor="serial")  # its checkpoint, which is not kept, is trained again
    assert (folder / "pbt-seed1" / "journal.jsonl").read_bytes() == before
    assert resumed.results["validation_error"].tolist() == [best["score"]]
