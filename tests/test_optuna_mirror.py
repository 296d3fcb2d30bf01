"""The Optuna mirror shows what a run did, and changes nothing of it."""

import json
import math
import sqlite3
import sys

import numpy as np
import optuna
import pytest
from killed_runs import Killed, kill_at_round
from optuna.trial import TrialState
from typer.testing import CliRunner

import fedtune
from fedtune import cli
from fedtune.errors import InputError
from fedtune.report.optuna_mirror import OptunaMirror, distribution
from fedtune.tuning.domains import Choice, Integer, LogUniform, PowerOfTwo, Uniform
from fedtune.tuning.space import SearchSpace

TUNERS = ["manual", "asha", "asha+fedex"]
SETTINGS = {"tuners": TUNERS, "max_rounds": 3, "total_rounds": 8, "executor": "serial"}
FILES = ["results.csv", "rounds.parquet", "trials.parquet"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return fedtune.compare("digits", out=tmp_path_factory.mktemp("plain") / "run", **SETTINGS)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mirrored")
    return fedtune.compare("digits", out=folder / "run", optuna=url(folder), **SETTINGS)


def url(folder):
    return f"sqlite:///{folder}/trials.db"


def contents(run):
    return [(run.folder / name).read_bytes() for name in FILES]


def trials_in(folder, study):
    """Optuna's own view of a study's trials, by our number."""
    loaded = optuna.load_study(study_name=study, storage=url(folder))
    assert loaded.direction == optuna.study.StudyDirection.MINIMIZE
    trials = {trial.user_attrs["fedtune_trial"]: trial for trial in loaded.trials}
    assert len(trials) == len(loaded.trials)
    return trials


def story(folder):
    """All that a storage holds but times and Optuna's own numbers."""
    return {
        study: {
            number: (trial.state, trial.values, trial.intermediate_values, trial.params, trial.user_attrs)
            for number, trial in trials_in(folder, study).items()
        }
        for study in optuna.get_all_study_names(url(folder))
    }


def test_a_run_has_the_same_bytes_with_and_without_it(plain, mirrored):
    assert contents(plain) == contents(mirrored)


def test_the_mirrored_trials_are_those_of_the_run(mirrored):
    folder = mirrored.folder.parent
    assert sorted(optuna.get_all_study_names(url(folder))) == sorted(f"run/{tuner}-seed0" for tuner in TUNERS)
    scored = mirrored.rounds.dropna(subset="score")
    for tuner in TUNERS:
        trials = trials_in(folder, f"run/{tuner}-seed0")
        rows = mirrored.trials[mirrored.trials["tuner"] == tuner].set_index("trial")
        assert sorted(trials) == sorted(rows.index)
        for number, trial in trials.items():
            assert trial.state == TrialState.COMPLETE
            assert trial.value == rows["score"][number]
            assert trial.user_attrs["config"] == json.loads(rows["config"][number])
            of_trial = scored[(scored["tuner"] == tuner) & (scored["trial"] == number)]
            assert trial.intermediate_values == dict(zip(of_trial["round"], of_trial["score"], strict=True))
            assert max(trial.intermediate_values) == rows["rounds"][number]


def test_parameters_are_what_is_searched_with_its_domain(mirrored):
    folder, space = mirrored.folder.parent, mirrored.settings["space"]
    searched = {f"{part}.{name}" for part in ("client", "server") for name in space[part]}
    (manual,) = trials_in(folder, "run/manual-seed0").values()
    for tuner in ("asha", "asha+fedex"):
        trials = trials_in(folder, f"run/{tuner}-seed0")
        assert trials.pop(0).params == manual.params  # it has the fixed values
        for trial in trials.values():
            config = trial.user_attrs["config"]
            centre = config["pool"][0][0]  # of digits' flat pools, the first element is what was drawn
            values = {f"client.{name}": value for name, value in centre.items()}
            values |= {f"server.{name}": value for name, value in config["server"].items()}
            assert trial.params == {name: values[name] for name in searched}
            rate = trial.distributions["client.learning_rate"]
            assert [rate.low, rate.high] == space["client"]["learning_rate"]["log_uniform"]
            assert rate.log
    # The fixed rate, 0.1, lies in [1e-4, 1]; the fixed proximal_mu, 0, is not in [1e-5, 1].
    assert manual.params["client.learning_rate"] == 0.1
    assert set(manual.params) < searched
    assert "client.proximal_mu" not in manual.params


def test_a_killed_run_has_running_trials_and_resumed_no_trial_twice(mirrored, tmp_path):
    kill = kill_at_round(8 + 7)  # in asha, after the last of manual
    with pytest.raises(Killed):
        fedtune.compare("digits", out=tmp_path / "run", optuna=url(tmp_path), listener=kill, **SETTINGS)
    stopped = story(tmp_path)
    (manual,) = stopped["run/manual-seed0"].values()
    assert manual[0] == TrialState.COMPLETE
    paused = [trial for trial in stopped["run/asha-seed0"].values() if trial[2]]
    assert len(paused) > 0
    assert {state for state, *_ in stopped["run/asha-seed0"].values()} == {TrialState.RUNNING}
    assert stopped["run/asha+fedex-seed0"] == {}
    for _ in range(2):  # a finished run resumes to itself
        warned = []
        resumed = fedtune.resume(tmp_path / "run", executor="serial", optuna=url(tmp_path), listener=warned.append)
        assert [event for event in warned if event["event"] == "warning"] == []
        assert story(tmp_path) == story(mirrored.folder.parent)
    assert contents(resumed) == contents(mirrored)


def test_a_mirror_may_begin_when_a_run_is_resumed(plain, mirrored, tmp_path):
    fedtune.resume(plain.folder, executor="serial", optuna=url(tmp_path))
    assert story(tmp_path) == story(mirrored.folder.parent)


def test_a_storage_that_fails_is_one_warning_and_the_run_goes_on(plain, tmp_path):
    heard = []

    def spoil(event):
        heard.append(event)
        if sum(each["event"] == "round" for each in heard) == 8 + 5:
            with sqlite3.connect(tmp_path / "trials.db") as database:
                database.execute("DROP TABLE IF EXISTS trials")
            database.close()

    run = fedtune.compare("digits", out=tmp_path / "run", optuna=url(tmp_path), listener=spoil, **SETTINGS)
    (warning,) = [event["message"] for event in heard if event["event"] == "warning"]
    assert warning.startswith(
        "the Optuna storage failed, nothing more of this run is written to it: OperationalError: "
    )
    assert "no such table: trials" in warning
    assert "\n" not in warning
    assert contents(run) == contents(plain)


def test_studies_of_another_run_are_left_alone(mirrored, tmp_path):
    folder = mirrored.folder.parent
    before = story(folder)
    changed = SETTINGS | {"total_rounds": 9}
    with pytest.raises(InputError, match=r"--optuna must hold no study of another run of this name, got run/\S+ in "):
        fedtune.compare("digits", out=tmp_path / "run", optuna=url(folder), **changed)
    assert not (tmp_path / "run").exists()
    assert story(folder) == before


@pytest.mark.parametrize("bad", ["trials.db", "sqlite:////proc/trials.db", "nodb:///x"])
def test_what_is_no_storage_is_one_line_and_leaves_nothing(tmp_path, bad):
    with pytest.raises(
        InputError, match=f"--optuna must be the URL of a database that opens, .*, got '{bad}': .+"
    ) as e:
        fedtune.compare("digits", out=tmp_path / "run", optuna=bad, **SETTINGS)
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_no_password_is_printed():
    with pytest.raises(InputError, match="got 'nodb://me:\\*\\*\\*@host/x'"):
        OptunaMirror("nodb://me:secret@host/x", "run", "", SearchSpace({}, {}), print)


def test_on_the_command_line(tmp_path):
    folder = str(tmp_path / "run")
    train = ["train", "digits", "--rounds", "2", "--executor", "serial", "--out", folder, "--optuna", url(tmp_path)]
    for command in (train, ["resume", folder, "--executor", "serial", "--optuna", url(tmp_path)]):
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 0, done.output
        assert "warning" not in done.output
        ((state, _, scores, *_),) = story(tmp_path)["run/manual-seed0"].values()
        assert (state, list(scores)) == (TrialState.COMPLETE, [2])


def test_without_the_package_it_is_one_line_and_a_plain_run_needs_none(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "fedtune.report.optuna_mirror")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"^--optuna needs the package optuna \(pip install 'optuna>=4'\)"):
        fedtune.train("digits", rounds=1, out=tmp_path / "run", optuna=url(tmp_path), executor="serial")
    assert list(tmp_path.iterdir()) == []
    fedtune.train("digits", rounds=1, out=tmp_path / "run", executor="serial")


def told(mirror, event, trial, **fields):
    mirror({"event": event, "tuner": "asha", "seed": 0, "trial": trial, "rung": 0, "rounds": 1, **fields})


def test_trials_that_diverged_or_were_lost_fail_and_drops_are_counted(tmp_path):
    space = SearchSpace({"learning_rate": LogUniform(0.1, 1.0)}, {})
    heard = []
    with OptunaMirror(url(tmp_path), "run", "", space, heard.append) as mirror:
        mirror({"event": "plan", "studies": [{"tuner": "asha", "seed": 0, "total_rounds": 3}]})
        for trial in range(4):
            told(mirror, "ask", trial, attempt=0, server={}, pool=[[{"learning_rate": 0.5}]])
        told(mirror, "tell", 0, score=math.nan)
        told(mirror, "tell", 1, score=math.inf)
        told(mirror, "drop", 2, then="lose")
        told(mirror, "drop", 3, then="retry")
        told(mirror, "ask", 3, attempt=1, server={}, pool=[[{"learning_rate": 0.5}]])
        told(mirror, "drop", 3, then="retry")
        told(mirror, "tell", 3, score=0.25)
        mirror({"event": "study_end", "tuner": "asha", "seed": 0})
    ends = ["tell", "tell", "drop", "drop", "ask", "drop", "tell"]
    assert [event["event"] for event in heard] == ["plan", *["ask"] * 4, *ends, "study_end"]
    trials = trials_in(tmp_path, "run/asha-seed0")
    failed, complete = TrialState.FAIL, TrialState.COMPLETE
    assert [trials[number].state for number in range(4)] == [failed, complete, failed, complete]
    assert math.isnan(trials[0].intermediate_values[1])
    assert [trials[1].value, trials[3].value] == [math.inf, 0.25]
    assert [trials[number].user_attrs.get("dropped_jobs") for number in range(4)] == [None, None, 1, 2]


@pytest.mark.parametrize(
    "domain", [Uniform(0, 0.5), LogUniform(1e-4, 1.0), Integer(1, 5), PowerOfTwo(8, 128), Choice((0.0, 0.9))]
)
def test_a_distribution_holds_every_value_of_its_domain(domain):
    theirs = distribution(domain)
    rng = np.random.default_rng(0)
    ends = domain.options if isinstance(domain, Choice) else (domain.low, domain.high)
    for value in [*ends, *(domain.sample(rng) for _ in range(50))]:
        assert theirs.to_external_repr(theirs.to_internal_repr(value)) == value
        assert theirs._contains(theirs.to_internal_repr(value))
    if not isinstance(domain, Choice):
        assert (theirs.low, theirs.high) == ends
        assert theirs.log == isinstance(domain, LogUniform | PowerOfTwo)
        assert isinstance(theirs, optuna.distributions.IntDistribution) == isinstance(domain, Integer | PowerOfTwo)
