"""Trials that copy others, as those of PBT do: which checkpoints stay, and how they are resumed."""

import pytest
from killed_runs import Killed, kill_at_round

import fedtune
from fedtune.runs.prepare import prepare
from fedtune.runs.run_folder import claim_folder
from fedtune.tuning.pbt import Population

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
    claim_folder(folder, resolved, force=False)
    prepare(resolved).run(folder, listener)
    return fedtune.read_run(folder)


def contents(folder):
    paths = [*(folder / name for name in FILES), *sorted(folder.glob("*/checkpoints/*"))]
    return {path.name: path.read_bytes() for path in paths}


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
