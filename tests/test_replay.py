"""What `fedtune replay` rebuilds of a run, and what it finds that was changed."""

import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from killed_runs import Killed, kill_at_round

import fedtune
from fedtune import plugins
from fedtune.errors import InputError
from fedtune.runs.prepare import prepare
from fedtune.runs.run_folder import claim_folder
from fedtune.simulation.federation import Federation
from fedtune.tuning import bohb
from fedtune.tuning.tuners import TUNERS

SMALL = {
    "executor": "serial",
    "cohort_size": 1,
    "evaluation": {"every": 9, "clients": 3},
    "space": {"client": {"epochs": {"choice": [1]}, "batch_size": {"choice": [64]}}},
}
SETTINGS = {
    **SMALL,
    "max_rounds": 3,
    "total_rounds": 18,
    "tuners": sorted(TUNERS),
    "tuner": {
        **{name: {"num_configs": 4, "rounds_per_halving": 1} for name in ("elimination", "elimination+fedex")},
        **{name: {"reduction_factor": 3} for name in ("async_hyperband", "async_hyperband+fedex")},
    },
}


def finished(folder, **settings):
    """The run, without figures."""
    resolved = fedtune.resolve_settings("digits", settings)
    prepared = prepare(resolved)
    claim_folder(folder, prepared.settings, force=False)
    prepared.run(folder, lambda event: None)
    return fedtune.read_run(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("replay") / "run", **SETTINGS)


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """Three rungs, and trials that inherit."""
    folder = tmp_path_factory.mktemp("replay") / "longer"
    return finished(folder, **SMALL, tuners=["asha", "pbt"], max_rounds=9, total_rounds=45)


def copied(run, folder):
    """A run folder to be changed: without checkpoints and figures, which no replay needs."""
    return shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "figures"))


@pytest.fixture
def copy(run, tmp_path):
    return copied(run, tmp_path / "copy")


def journal(folder, study):
    return folder / f"{study}-seed0" / "journal.jsonl"


def lines_of(path):
    """The journal's lines without their checksums."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["check"]
    return lines


def seal(path, lines):
    """Writes a journal whose checksums are right, as somebody would who means to deceive."""
    checksum, text = 0, ""
    for line in map(json.dumps, lines):
        checksum = zlib.crc32(line.encode(), checksum)
        text += f'{line[:-1]}, "check": "{checksum:08x}"}}\n'
    path.write_text(text)


def numbered(lines, event, **fields):
    """The index of each line of this event with these fields."""
    return [
        index
        for index, line in enumerate(lines)
        if line["event"] == event and all(line[name] == value for name, value in fields.items())
    ]


def only(folder, *tuners):
    """The run folder as if no other tuner had run in it."""
    settings = folder / "settings.toml"
    rest = settings.read_text().partition("]\n")[2]
    settings.write_text(f"tuners = {json.dumps(tuners)}\n{rest}")
    return folder


def test_every_tuner_is_rebuilt(run):
    studies = fedtune.replay(run.folder)
    assert [study.tuner for study in studies] == SETTINGS["tuners"] == run.results["tuner"].tolist()
    for study, row in zip(studies, run.results.itertuples(), strict=True):
        assert study.finished
        assert (study.trials, study.rounds) == (row.trials, row.rounds)
        assert study.incumbent == (row.trial, row.rounds_of_trial, pytest.approx(row.validation_error, abs=1e-15))
        assert study.jobs == len(numbered(lines_of(journal(run.folder, study.tuner)), "tell"))
        assert study.under_way == 0


def test_bohbs_model_proposes_the_same_again(tmp_path, monkeypatch):
    proposed = []

    def propose(*arguments):
        proposed.append(bohb_propose(*arguments))
        return proposed[-1]

    bohb_propose = bohb.propose
    monkeypatch.setattr(bohb, "propose", propose)
    run = finished(tmp_path / "run", **SMALL, tuners=["bohb"], max_rounds=3, total_rounds=75)
    first, proposed = proposed, []
    assert fedtune.replay(run.folder)[0].finished
    assert np.array_equal(proposed, first)
    assert len(first) > 0


def test_neither_data_nor_training_nor_checkpoints_are_needed_and_nothing_is_written(copy, monkeypatch):
    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr(plugins, "load_dataset", never)
    monkeypatch.setattr(Federation, "advance", never)

    def everything():
        return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in copy.rglob("*")}

    before = everything()
    assert all(study.finished for study in fedtune.replay(copy))
    assert everything() == before


@pytest.mark.parametrize("study", ["asha", "pbt"])
def test_a_study_that_was_stopped_is_rebuilt_as_far_as_it_went(longer, tmp_path, study):
    """Wherever its journal stops: the whole lines are replayed, what a torn one held is not missed."""
    folder = only(copied(longer, tmp_path / "copy"), study)
    (folder / "results.csv").unlink()
    path = journal(folder, study)
    whole, lines = path.read_text().splitlines(keepends=True), lines_of(path)
    assert fedtune.replay(folder)[0].finished
    for end in range(0, len(lines), 6):
        path.write_text("".join(whole[:end]) + whole[end][:30])
        (replayed,) = fedtune.replay(folder)
        told = [lines[index] for index in numbered(lines[:end], "tell")]
        assert not replayed.finished
        assert replayed.jobs == len(told)
        assert replayed.under_way == len(numbered(lines[:end], "ask")) - len(told)
        assert replayed.trials == len({line["trial"] for line in told})
        best = min(told, key=lambda line: (-line["rounds"], line["score"], line["trial"]), default=None)
        assert (replayed.incumbent and replayed.incumbent.trial) == (best and best["trial"])
    first_rounds = longer.rounds[longer.rounds["tuner"] == "pbt"].groupby("trial")["round"].min()
    assert (first_rounds > 1).any()  # a trial of PBT inherits


def test_a_study_that_was_not_begun(copy):
    shutil.rmtree(copy / "asha-seed0")
    (copy / "results.csv").unlink()
    (study,) = fedtune.replay(only(copy, "asha"))
    assert str(
        study
    ) == "asha-seed0: 0 jobs, 0 trials, 0 rounds, no incumbent: as journalled; not finished, 0 jobs " + ("under way")


def test_a_run_that_was_resumed_is_rebuilt_before_and_after(tmp_path):
    settings = {**SMALL, "tuners": ["asha+fedex"], "max_rounds": 9, "total_rounds": 27}
    with pytest.raises(Killed):
        fedtune.compare("digits", out=tmp_path / "run", listener=kill_at_round(20), **settings)
    (before,) = fedtune.replay(tmp_path / "run")
    assert not before.finished
    assert before.under_way > 0
    resumed = fedtune.resume(tmp_path / "run", executor="serial")
    (after,) = fedtune.replay(tmp_path / "run")
    assert after.finished
    assert after.rounds == resumed.results["rounds"][0] > before.rounds > 0


def ask(line, **changes):
    """How a message names an ask or tell."""
    shown = {name: line[name] for name in ("trial", "rung", "rounds")} | changes
    return ", ".join([line["event"], *(f"{name} {value}" for name, value in shown.items())])


def refused(folder, message):
    with pytest.raises(InputError) as caught:
        fedtune.replay(folder)
    assert str(caught.value) == message


def repair(folder):
    """What a message says of a damaged journal."""
    return f"to go on from the line before it: fedtune resume {folder} --repair"


def misfit(path, number, expected, found):
    return f"{path}, line {number}, does not fit the tuner: expected {expected}, got {found}"


@pytest.mark.parametrize(("event", "name"), [("tell", "trial"), ("tell", "rung"), ("ask", "rung"), ("ask", "rounds")])
def test_a_decision_that_was_changed(copy, event, name):
    path = journal(only(copy, "asha"), "asha")
    lines = lines_of(path)
    index = numbered(lines, event)[5]
    right = ask(lines[index])
    lines[index][name] += 1
    seal(path, lines)
    refused(copy, misfit(path, index + 1, right, ask(lines[index])))


@pytest.mark.parametrize(("event", "name"), [("ask", "started"), ("tell", "time")])
def test_a_time_that_was_changed(copy, event, name):
    path = journal(only(copy, "asha"), "asha")
    lines = lines_of(path)
    index = numbered(lines, event)[5]
    right = ask(lines[index], **{name: lines[index][name]})
    lines[index][name] += 0.5
    seal(path, lines)
    refused(copy, misfit(path, index + 1, right, ask(lines[index], **{name: lines[index][name]})))


def test_an_end_that_was_moved(copy):
    """Whoever ends earlier than the others is told first."""
    path = journal(only(copy, "asha"), "asha")
    lines = lines_of(path)
    index = numbered(lines, "ask")[3]
    lines[index]["finishes"] = 0.5
    seal(path, lines)
    first = numbered(lines, "tell")[0]
    refused(copy, misfit(path, first + 1, ask({**lines[index], "event": "tell"}), ask(lines[first])))
    lines[index]["finishes"] = -1.0
    seal(path, lines)
    refused(copy, misfit(path, index + 1, "finishes >= 0.0", "finishes -1.0"))


def test_a_configuration_that_was_changed(copy):
    path = journal(only(copy, "asha+fedex"), "asha+fedex")
    lines = lines_of(path)
    index = numbered(lines, "ask")[5]
    config = lines[index]["pool"][0][2]
    right = config["learning_rate"]
    config["learning_rate"] = 0.125
    seal(path, lines)
    name = "pool.0.2.learning_rate"
    refused(copy, misfit(path, index + 1, ask(lines[index], **{name: right}), ask(lines[index], **{name: 0.125})))


def test_a_score_that_was_changed(copy):
    """The rounds in the journal give another; so it is found whether or not a decision hangs on it."""
    path = journal(only(copy, "asha"), "asha")
    lines = lines_of(path)
    for index in numbered(lines, "tell")[::4]:
        edited = [dict(line) for line in lines]
        right, edited[index]["score"] = edited[index]["score"], 0.987
        seal(path, edited)
        refused(copy, misfit(path, index + 1, ask(lines[index], score=right), ask(lines[index], score=0.987)))


def test_a_line_that_was_taken_out(copy):
    path = journal(only(copy, "asha"), "asha")
    lines = lines_of(path)
    index = numbered(lines, "tell")[7]
    seal(path, lines[:index] + lines[index + 1 :])
    follows = min(
        index for index in numbered(lines, "tell") + numbered(lines, "ask") if index > numbered(lines, "tell")[7]
    )
    refused(copy, misfit(path, follows, ask(lines[index]), ask(lines[follows])))


def test_a_round_that_was_taken_out(copy):
    path = journal(only(copy, "asha"), "asha")
    lines = lines_of(path)
    number = numbered(lines, "tell", rounds=1)[7]
    told = lines[number]
    (index,) = (
        i for i in numbered(lines, "round", trial=told["trial"]) if lines[i]["record"]["round"] == told["rounds"]
    )
    seal(path, lines[:index] + lines[index + 1 :])
    refused(copy, f"{path} must have a line of round {told['rounds']} of trial {told['trial']}, got none")


def test_a_drop_where_a_job_ends(copy):
    path = journal(only(copy, "asha"), "asha")
    lines = lines_of(path)
    index = numbered(lines, "tell")[7]
    right = ask(lines[index])
    job = {name: lines[index][name] for name in ("trial", "rung", "rounds")}
    lines[index] = {"event": "drop", **job, "time": lines[index]["time"], "then": "retry"}
    seal(path, lines)
    refused(copy, misfit(path, index + 1, right, ask(lines[index])))


def test_a_study_whose_attempts_all_fail_is_rebuilt_as_far_as_it_went(tmp_path):
    devices = {"drop_probability": 0.89, "straggler_std": 20.0}
    with pytest.raises(InputError, match=r"1,000 attempts at a job of 3 rounds failed$"):
        finished(tmp_path / "run", **SMALL, tuners=["random"], max_rounds=3, total_rounds=3, devices=devices)
    (study,) = fedtune.replay(tmp_path / "run")
    assert not study.finished
    assert (study.jobs, study.under_way) == (0, 0)


def test_two_lines_that_were_swapped(copy):
    path = journal(only(copy, "sha"), "sha")
    lines = lines_of(path)
    first, second = numbered(lines, "ask")[1:3]
    lines[first], lines[second] = lines[second], lines[first]
    seal(path, lines)
    refused(copy, misfit(path, first + 1, ask(lines[second]), ask(lines[first])))


def test_an_end_that_comes_early_or_is_not_the_last(copy):
    path = journal(only(copy, "random"), "random")
    lines = lines_of(path)
    index = numbered(lines, "ask")[4]
    seal(path, [*lines[:index], lines[-1]])
    refused(copy, misfit(path, index + 1, ask(lines[index]), "end"))
    seal(path, [*lines, lines[-1]])
    refused(copy, misfit(path, len(lines) + 1, "no more lines", f"end, time {lines[-1]['time']}"))
    seal(path, [*lines[:-1], {**lines[-1], "incumbent": 99}])
    incumbent = lines[-1]["incumbent"]
    refused(copy, misfit(path, len(lines), f"end, incumbent {incumbent}", "end, incumbent 99"))


def test_a_journal_of_another_study(copy):
    shutil.copy(journal(copy, "random"), journal(copy, "random+fedex"))
    path = journal(only(copy, "random+fedex"), "random+fedex")
    refused(copy, misfit(path, 1, "study, tuner random+fedex", "study, tuner random"))


def test_a_journal_that_was_edited_without_its_checksums(copy):
    path = journal(only(copy, "asha"), "asha")
    path.write_text(path.read_text().replace('"score": 0.', '"score": 1.', 1))
    number = numbered(lines_of(path), "tell")[0] + 1
    refused(copy, f"{path}, line {number}, is damaged or was edited: its checksum does not fit; {repair(copy)}")


def test_settings_that_were_edited(copy):
    path = copy / "settings.toml"
    path.write_text(path.read_text().replace("cohort_size = 1", "cohort_size = 2"))
    refused(
        only(copy, "asha"),
        f"{path} must have the settings with which the run was begun, got cohort_size = 2; "
        f"{journal(copy, 'asha')} has cohort_size = 1",
    )


def test_a_later_setting_that_was_edited(copy):
    """While it has its default, the journal does not hold it."""
    path = copy / "settings.toml"
    path.write_text(path.read_text().replace("max_examples = 1000000000", "max_examples = 1000"))
    refused(
        only(copy, "asha"),
        f"{path} must have the settings with which the run was begun, got server.max_examples = 1000; "
        f"{journal(copy, 'asha')} has server.max_examples = 1000000000",
    )


def test_settings_of_format_3_that_were_edited(tmp_path):
    """Their journal has a digest only."""
    folder = shutil.copytree(Path(__file__).parent / "run_of_format_3", tmp_path / "run")
    path = folder / "settings.toml"
    path.write_text(path.read_text().replace("cohort_size = 3", "cohort_size = 4"))
    begun = lines_of(folder / "fedex-seed1" / "journal.jsonl")[0]["settings"]
    with pytest.raises(InputError) as caught:
        fedtune.replay(folder)
    start, _, end = str(caught.value).partition(", got other ones (digest ")
    assert start == f"{path} must hold the settings of {folder / 'fedex-seed1' / 'journal.jsonl'} (digest {begun})"
    assert end.endswith(
        "): one of the two was edited, or the executor now batches clients and did not before, or the other way round"
    )


def test_a_run_of_format_3_is_resumed_and_replayed_by_its_rule(tmp_path):
    """Its first job that no longer fits is refused; a run of format 4 shortens it to the two rounds that are left."""
    run = finished(tmp_path / "run", **SMALL, tuners=["random"], max_rounds=3, total_rounds=8, parallel_trials=1)
    assert run.trials["rounds"].tolist() == [3, 3, 2]
    path = journal(run.folder, "random")
    lines = lines_of(path)
    lines[0]["format"] = 3
    del lines[0]["deciding"]
    seal(path, lines[: numbered(lines, "ask", trial=2)[0]])
    (run.folder / "results.csv").unlink()
    old = fedtune.resume(run.folder, executor="serial")
    assert old.trials["rounds"].tolist() == [3, 3]
    (replayed,) = fedtune.replay(run.folder)
    assert (replayed.finished, replayed.rounds) == (True, 6)
    assert [line for line in lines_of(path) if line["event"] == "ask"] == [
        lines[index] for trial in (0, 1) for index in numbered(lines, "ask", trial=trial)
    ]


@pytest.mark.parametrize("lost", ["asha", "fedex"])
def test_a_study_that_a_run_of_format_3_had_not_begun_gets_its_rules(tmp_path, lost):
    folder = shutil.copytree(Path(__file__).parent / "run_of_format_3", tmp_path / "run")
    shutil.rmtree(folder / f"{lost}-seed1")
    (folder / "results.csv").unlink()
    fedtune.resume(folder, executor="serial")
    assert {lines_of(path)[0]["format"] for path in folder.glob("*/journal.jsonl")} == {3}
    assert all(study.finished for study in fedtune.replay(folder))


def test_a_larger_budget_than_the_run_had(copy):
    """The budget is not in the digest: the tuner then asks for a job more than it did."""
    path = copy / "settings.toml"
    path.write_text(path.read_text().replace("total_rounds = 18", "total_rounds = 21"))
    lines = lines_of(journal(only(copy, "random"), "random"))
    last = max(numbered(lines, "ask"))
    index = next(i for i in numbered(lines, "tell") if i > last and numbered(lines[last:i], "tell"))
    wanted = {**lines[last], "trial": lines[last]["trial"] + 1}
    refused(copy, misfit(journal(copy, "random"), index + 1, ask(wanted), ask(lines[index])))


def test_results_that_were_edited(copy):
    only(copy, "asha", "sha")
    frame = pd.read_csv(copy / "results.csv", converters={"validation_error": float})
    row = frame.index[frame["tuner"] == "sha"][0]
    trial, right = frame.loc[row, "trial"], frame.loc[row, "validation_error"]
    frame.loc[row, "validation_error"] = math.nextafter(right, 1)
    frame.to_csv(copy / "results.csv", index=False)
    refused(
        copy,
        f"{copy / 'results.csv'} must have validation_error {right} for sha-seed0, trial {trial}, "
        f"as its journal has it, got {math.nextafter(right, 1)}",
    )
    frame.drop(index=row).to_csv(copy / "results.csv", index=False)
    refused(copy, f"{copy / 'results.csv'} must have 1 rows of sha-seed0, as its journal has it, got 0")


def test_trials_that_were_edited(copy):
    only(copy, "asha")
    frame = pd.read_parquet(copy / "trials.parquet")
    row = frame.index[(frame["tuner"] == "asha") & (frame["trial"] == 3)][0]
    right = frame.loc[row, "rounds"]
    frame.loc[row, "rounds"] = 27
    frame.to_parquet(copy / "trials.parquet")
    path = copy / "trials.parquet"
    refused(copy, f"{path} must have rounds {right} for asha-seed0, trial 3, as its journal has it, got 27")
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"^[^\n]*trials\.parquet can't be read: [^\n]+$"):
        fedtune.replay(copy)


def test_rounds_that_were_edited(copy):
    only(copy, "pbt")
    path = copy / "rounds.parquet"
    frame = pd.read_parquet(path)
    row = frame.index[(frame["tuner"] == "pbt") & (frame["trial"] == 3)][-1]
    right = frame.loc[row, "test_loss"]
    frame.loc[row, "test_loss"] = 0.5
    frame.to_parquet(path)
    refused(copy, f"{path} must have test_loss {right} for pbt-seed0, trial 3, as its journal has it, got 0.5")
    frame.drop(columns="round").to_parquet(path)
    refused(copy, f"{path} must have the column round, got none")


@pytest.mark.parametrize("column", ["bytes", "test_error", "test_error_personalised_at_max_rounds", "runner_up"])
def test_every_result_that_the_journal_holds_is_checked(copy, column):
    path = copy / "results.csv"
    frame = pd.read_csv(path, engine="python")
    row = frame.index[frame["tuner"] == "asha"][0]
    trial, right = frame.loc[row, "trial"], frame.loc[row, column]
    frame.loc[row, column] += 1
    frame.to_csv(path, index=False)
    only(copy, "asha")
    refused(
        copy,
        f"{path} must have {column} {right} for asha-seed0, trial {trial}, as its journal has it, got {right + 1}",
    )


def test_a_run_without_its_personalised_errors(copy):
    path = journal(only(copy, "asha"), "asha")
    lines = [line for line in lines_of(path) if line["event"] != "personalised"]
    seal(path, lines)
    trial = lines[-1]["incumbent"]
    refused(copy, f"{path} must have a line of the personalised errors of trial {trial}, got none")


def test_a_journal_that_is_shorter_than_the_results(copy):
    path, results = journal(only(copy, "asha"), "asha"), copy / "results.csv"
    whole = path.read_bytes().splitlines(keepends=True)
    said = f"{path} must hold the study to its end, as {results} does, got "
    for end in (0, 1, 7, len(whole) - 1):
        path.write_bytes(b"".join(whole[:end]))
        refused(copy, f"{said}one that stops before")
    path.unlink()
    refused(copy, f"{said}none")
    results.unlink()
    assert not fedtune.replay(copy)[0].finished


@pytest.mark.parametrize("name", ["rounds.parquet", "trials.parquet"])
def test_a_file_that_is_missing_beside_the_results(copy, name):
    (copy / name).unlink()
    refused(copy, f"{copy} must have {name} beside its results.csv, got none")
