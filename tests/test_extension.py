"""A finished run that is asked for more: the same bytes as a run whose settings asked for it from the start."""

import re
import shutil

import pandas as pd
import pytest
from killed_runs import Killed, kill_at_round

import fedtune
from fedtune.cli import main
from fedtune.errors import InputError

SETTINGS = {"max_rounds": 9, "total_rounds": 27, "executor": "serial"}
TUNERS = ["random", "asha", "asha+fedex", "async_hyperband"]
OPTIONS = {"async_hyperband": {"num_configs": 13, "reduction_factor": 3}, "asha+fedex": {"pool_size": 3}}
FILES = ("settings.toml", "results.csv", "rounds.parquet", "trials.parquet")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extension") / "run"
    return fedtune.compare("digits", out=folder, tuners=TUNERS, tuner=OPTIONS, **SETTINGS)


@pytest.fixture(scope="module")
def extended(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extension") / "run"
    shutil.copytree(finished.folder, folder)
    return fedtune.extend(folder, num_configs=20, total_rounds=54, executor="serial")


def contents(folder):
    files = [folder / name for name in FILES]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in [*files, *sorted(folder.glob("*/checkpoints/*"))]
    }


def test_what_was_there_stays_and_more_comes(finished, extended):
    keys = ["tuner", "seed", "trial", "round"]
    columns = [*keys, "virtual_time", "score", "validation_error", "test_error"]
    both = finished.rounds[columns].merge(extended.rounds[columns], on=keys, how="left", suffixes=("", "_after"))
    for name in ("virtual_time", "score", "validation_error", "test_error"):
        before, after = both[name], both[f"{name}_after"]
        # What was told only later is a score that was not there before.
        told = before.notna() if name == "score" else slice(None)
        pd.testing.assert_series_equal(before[told], after[told], check_names=False)
    spent = extended.results.set_index("tuner")["rounds"]
    assert (spent > finished.results.set_index("tuner")["rounds"]).all()
    assert (spent <= 54).all()


@pytest.mark.parametrize("keywords", [{"executor": "parallel"}, {"workers": -1}])
def test_an_extension_that_can_not_be_computed_there_changes_nothing(finished, tmp_path, keywords):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    with pytest.raises(InputError, match=r"^(executor|workers) must be "):
        fedtune.extend(folder, total_rounds=54, **keywords)
    assert contents(folder) == contents(finished.folder)


def test_an_extended_run_is_the_run_of_its_settings(extended, tmp_path):
    again = fedtune.compare(extended.folder / "settings.toml", out=tmp_path / "again", executor="serial")
    assert contents(again.folder) == contents(extended.folder)


@pytest.mark.parametrize("executor", ["serial", "pool"])
def test_an_extension_that_is_killed_goes_on(finished, extended, tmp_path, executor):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    kill = kill_at_round(27 * 2 + 10)  # rounds of the past are heard again
    with pytest.raises(Killed):
        fedtune.extend(folder, num_configs=20, total_rounds=54, executor=executor, listener=kill)
    with pytest.raises(InputError, match="run must be finished"):
        fedtune.read_run(folder)
    found = contents(fedtune.resume(folder, executor="serial").folder)
    expected = contents(extended.folder)
    assert {name: found[name] for name in found if name != "settings.toml"} == {
        name: expected[name] for name in expected if name != "settings.toml"
    }


def test_a_shortened_job_continues_from_its_rounds(tmp_path):
    """Trial 1 gets two rounds of the first budget, and one of the second: no round is trained or paid for twice."""
    small = {"model": {"name": "logistic"}, "cohort_size": 2, "evaluation": {"clients": 2}, "executor": "serial"}
    budget = {"max_rounds": 3, "total_rounds": 5}
    first = fedtune.compare("digits", out=tmp_path / "run", tuners=["random"], **budget, **small)
    assert first.trials["rounds"].tolist() == [3, 2]
    assert first.results["rounds_of_trial"].tolist() == [3]
    longer = fedtune.extend(first.folder, total_rounds=10, executor="serial")
    assert longer.trials["rounds"].tolist() == [3, 3, 3, 1]
    rounds = longer.rounds.groupby("trial")["round"].agg(list)
    assert rounds.tolist() == [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1]]
    same = longer.rounds.iloc[:5].drop(columns="incumbent")
    pd.testing.assert_frame_equal(same, first.rounds.drop(columns="incumbent"))
    again = fedtune.compare(longer.folder / "settings.toml", out=tmp_path / "again", executor="serial")
    assert contents(again.folder) == contents(longer.folder)


def test_extended_twice_and_replayed(extended, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(extended.folder, folder)
    longer = fedtune.extend(folder, total_rounds=63, executor="serial")
    assert (longer.results["rounds"] <= 63).all()
    assert longer.results["rounds"].max() > 54
    studies = fedtune.replay(folder)
    assert [study.rounds for study in studies] == longer.results["rounds"].tolist()


def test_every_configuration_that_was_asked_for_is_drawn(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    longer = fedtune.extend(folder, num_configs=20, executor="serial")
    assert longer.results["trials"].tolist() == [20] * len(TUNERS)


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = str(tmp_path / "run")
    budget = ["--max-rounds", "3", "--total-rounds", "9", "--executor", "serial"]
    for arguments in (
        ["tune", "digits", "--num-configs", "4", *budget, "--out", folder],
        ["extend", folder, "--num-configs", "7", "--executor", "serial"],
    ):
        monkeypatch.setattr("sys.argv", ["fedtune", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
    assert pd.read_csv(tmp_path / "run" / "results.csv")["trials"].tolist() == [7]


@pytest.fixture(scope="module")
def ten_configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extension") / "run"
    tuner = {"asha": {"num_configs": 10}}
    return fedtune.compare("digits", out=folder, tuners=["asha"], tuner=tuner, **SETTINGS).folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "extend needs --num-configs, --total-rounds or both, got neither"),
        (["--num-configs", "2"], "num_configs must be a whole number >= 11, got 2"),
        (["--total-rounds", "27"], "total_rounds must be more than the present budget, 27, got 27"),
        (
            ["--num-configs", "90", "--total-rounds", "3"],
            "total_rounds must be more than the present budget, 27, got 3",
        ),
    ],
)
def test_impossible_extensions_are_one_line_and_change_nothing(ten_configs, monkeypatch, capsys, arguments, message):
    folder = ten_configs
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr("sys.argv", ["fedtune", "extend", str(folder), *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"fedtune: {message}\n"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("option", ["--max-rounds", "--model", "--set", "--seed", "--seeds", "--tuner", "--precision"])
def test_an_extension_has_no_option_for_what_its_run_has_decided(tmp_path, monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["fedtune", "extend", str(tmp_path), "--num-configs", "90", option, "2"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "No such option" in error
    assert f"'{option}'" in error


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        ("sha", "only random, asha and async_hyperband, with or without +fedex, can be extended, got sha"),
        ("manual", "only random, asha and async_hyperband, with or without +fedex, can be extended, got manual"),
    ],
)
def test_a_tuner_that_cannot_go_on_is_named(tmp_path, tuner, message):
    fedtune.compare("digits", out=tmp_path / "run", tuners=[tuner], **SETTINGS)
    with pytest.raises(InputError, match=re.escape(message)):
        fedtune.extend(tmp_path / "run", num_configs=100)


def test_a_run_that_was_stopped_is_to_be_resumed_first(tmp_path):
    def stop(event):
        if event["event"] == "round" and event["round"] == 3:
            raise Killed

    with pytest.raises(Killed):
        fedtune.compare("digits", out=tmp_path / "run", tuners=["asha"], listener=stop, **SETTINGS)
    with pytest.raises(
        InputError, match=r"run must be finished \(`fedtune resume .*run`\), got the unfinished study asha-seed0"
    ):
        fedtune.extend(tmp_path / "run", num_configs=100)
