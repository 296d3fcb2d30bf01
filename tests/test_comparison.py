"""Whole runs on the bundled digits: what is in the run folder, and that it is repeated to the bit."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import fedtune
from fedtune import cli, rng
from fedtune.client.examples import StoredExamples
from fedtune.errors import InputError, UnknownNameError
from fedtune.runs.prepare import prepare
from fedtune.runs.run_folder import claim_folder
from fedtune.simulation import federation
from fedtune.simulation.evaluation import evaluation_tasks

TUNERS = ["manual", "random", "asha", "fedex", "asha+fedex"]
SMALL = {"max_rounds": 9, "total_rounds": 27, "seeds": 2, "tuners": TUNERS}
FILES = ["results.csv", "rounds.parquet", "trials.parquet", "settings.toml"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fedtune.compare("digits", executor="serial", out=tmp_path_factory.mktemp("runs") / "first", **SMALL)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES[:3]}


def test_the_run_folder_is_complete(run):
    names = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
    assert {*FILES, "environment.json", "timings.csv", "figures/incumbents.png", "figures/entropy.png"} <= names
    for tuner in TUNERS:
        for seed in (0, 1):
            assert f"{tuner}-seed{seed}/journal.jsonl" in names
    versions = json.loads((run.folder / "environment.json").read_text())["versions"]
    assert torch.__version__.startswith(versions["torch"])  # which goes on with "+cpu" and the like


def test_no_tuner_spends_more_than_it_may(run):
    assert (run.results["rounds"] <= 27).all()
    spent = run.rounds.groupby(["tuner", "seed"]).size()
    assert run.results.set_index(["tuner", "seed"])["rounds"].equals(
        spent.loc[run.results.set_index(["tuner", "seed"]).index]
    )
    assert (run.trials["rounds"] <= 27).all()
    searched = run.trials[run.trials["tuner"].isin(["random", "asha", "asha+fedex"])]
    assert (searched["rounds"] <= 9).all()


@pytest.mark.parametrize(("executor", "workers"), [("pool", 1), ("pool", 2)])
def test_it_repeats_to_the_bit_from_its_own_settings(run, tmp_path, executor, workers):
    again = fedtune.compare(run.folder / "settings.toml", executor=executor, workers=workers, out=tmp_path / "again")
    assert contents(again.folder) == contents(run.folder)


def test_every_trial_that_is_counted_was_trained(run):
    assert (run.trials["rounds"] > 0).all()
    counts = run.trials.groupby(["tuner", "seed"]).size()
    for row in run.results.itertuples():
        assert counts[row.tuner, row.seed] == row.trials


def test_another_seed_gives_other_numbers(run):
    by_seed = run.results.set_index(["tuner", "seed"])["test_error"].unstack()
    assert (by_seed[0] != by_seed[1]).any()


def test_manual_is_trained_to_the_end_and_reported_at_both_readings(run):
    manual = run.results[run.results["tuner"] == "manual"]
    assert (manual["rounds_of_trial"] == 27).all()
    assert (manual["test_error_at_max_rounds"] != manual["test_error"]).all()
    searched = run.results[run.results["tuner"] == "asha"]
    assert (searched["test_error_at_max_rounds"] == searched["test_error"]).all()


def test_errors_are_tail_means_of_the_recorded_evaluations(run):
    rounds = run.rounds[(run.rounds["tuner"] == "manual") & (run.rounds["seed"] == 0)]
    evaluated = rounds.dropna(subset="test_error")
    tail = evaluated[evaluated["round"] > 0.75 * 27]
    row = run.results[(run.results["tuner"] == "manual") & (run.results["seed"] == 0)].iloc[0]
    assert row["test_error"] == pytest.approx(tail["test_error"].mean(), abs=1e-12)
    assert row["validation_error"] == pytest.approx(tail["validation_error"].mean(), abs=1e-12)
    assert row["test_error_last"] == evaluated["test_error"].iloc[-1]


def test_tuners_are_paired(run):
    """Trial 0 has the fixed values under every tuner, and trial n the same centre under random and ASHA."""
    trials = run.trials.set_index(["tuner", "seed", "trial"])["config"].map(json.loads)
    centre = {key: trial["pool"][0][0] for key, trial in trials.items()}
    for seed in (0, 1):
        assert all(centre[tuner, seed, 0] == centre["manual", seed, 0] for tuner in TUNERS)
        for number in (1, 2):
            same = centre["random", seed, number]
            assert centre["asha", seed, number] == centre["asha+fedex", seed, number] == same
            assert same != centre["manual", seed, 0]


def test_journals_tell_the_same_story_as_the_frames(run):
    lines = (run.folder / "asha-seed0" / "journal.jsonl").read_text().splitlines()
    events = pd.DataFrame(map(json.loads, lines))
    told = events[events["event"] == "tell"].reset_index(drop=True)
    assert told["time"].is_monotonic_increasing
    rounds = run.rounds[(run.rounds["tuner"] == "asha") & (run.rounds["seed"] == 0)]
    scored = rounds.dropna(subset="score")
    assert sorted(zip(scored["trial"], scored["round"], scored["score"], strict=True)) == sorted(
        zip(told["trial"].astype(int), told["rounds"].astype(int), told["score"], strict=True)
    )
    assert len(events[events["event"] == "round"]) == len(rounds)
    assert events.iloc[-1]["event"] == "end"


def test_only_the_incumbents_checkpoint_is_kept(run):
    for row in run.results.itertuples():
        kept = [path.name for path in (run.folder / f"{row.tuner}-seed{row.seed}" / "checkpoints").iterdir()]
        assert kept == [f"trial-{row.trial}-round-{row.rounds_of_trial}.safetensors"]


def test_shuffling_the_test_labels_changes_no_decision(tmp_path, monkeypatch):
    """Nothing that decides anything reads the test part."""
    settings = fedtune.resolve_settings("digits", SMALL | {"seeds": 1, "executor": "serial", "tuners": ["asha+fedex"]})
    plain = prepare(settings)
    labels = plain.dataset.y.copy()
    for client in range(plain.dataset.num_clients):
        start, stop = plain.dataset.ranges[client, 2]
        labels[start:stop] = (labels[start:stop] + 1) % 10
    spoilt = replace(plain, dataset=type(plain.dataset)(**{**vars(plain.dataset), "y": labels}))
    frames = []
    for name, each in (("plain", plain), ("spoilt", spoilt)):
        folder = tmp_path / name
        claim_folder(folder, each.settings, force=False)
        each.run(folder, lambda event: None)
        frames.append(pd.read_parquet(folder / "rounds.parquet"))
    decided = frames[0].columns.drop(["test_error", "test_loss"])
    pd.testing.assert_frame_equal(frames[0][decided], frames[1][decided])
    assert not frames[0]["test_error"].equals(frames[1]["test_error"])


def settings_with(**changes):
    return fedtune.resolve_settings("digits", SMALL | {"seeds": 1} | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tuners": ["ashaa"]}, UnknownNameError, "unknown tuner 'ashaa'; known: asha, asha\\+fedex, .*manual"),
        ({"tuner": {"ashaa": {}}}, UnknownNameError, "unknown tuner 'ashaa'"),
        ({"tuner": {"asha": {"eta": 3}}}, UnknownNameError, "unknown option of tuner asha 'eta'; known: .*reduction_f"),
        ({"data": {"name": "digit"}}, InputError, "data.name must be 'digits', the data set that is asked for, got 'd"),
        ({"data": {"clients": 3}}, UnknownNameError, "unknown setting of the data set 'digits' 'data.clients'; known"),
        ({"model": {"name": "resnet"}}, UnknownNameError, "unknown model 'resnet'; known: cnn, logistic"),
        ({"model": {"name": "mlp", "width": 3}}, UnknownNameError, "'model.width'; known: model.hidden"),
        (
            {"client": {"lr": 0.1}},
            UnknownNameError,
            "unknown client hyperparameter 'client.lr'; known: .*learning_rate",
        ),
        ({"client": {"name": "sgd"}}, UnknownNameError, "unknown client program 'sgd'; known: local_sgd"),
        ({"client": {"batch_size": 0}}, InputError, "client.batch_size must be a whole number >= 1, got 0"),
        ({"client": {"momentum": 1.0}}, InputError, "client.momentum must be .* < 1.0, got 1.0"),
        ({"space": {"client": {"lr": {"uniform": [0, 1]}}}}, UnknownNameError, "unknown client hyperparameter 'lr'"),
        ({"space": {"client": {"dropout": {"normal": [0, 1]}}}}, UnknownNameError, "unknown domain of .*dropout"),
        ({"cohort_size": 31}, InputError, "cohort_size must be at most the number of clients, 30, got 31"),
        (
            {"max_rounds": 10},
            InputError,
            r"^tuner asha: max_rounds must be a multiple of reduction_factor \(3\), got 10",
        ),
        ({"device": "abacus"}, InputError, "device must be one that torch can use here, got 'abacus'"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        prepare(settings_with(**changes))
    assert "\n" not in str(caught.value)


def test_a_search_needs_something_to_search():
    base = {"data": {"name": "digits"}, "max_rounds": 9, "total_rounds": 27, "tuners": ["asha"]}
    from fedtune.settings import resolve

    with pytest.raises(InputError, match=r"\[space.client\] or \[space.server\] must name what asha may search"):
        prepare(resolve([base]))


def test_a_run_folder_is_never_overwritten_unasked(tmp_path):
    folder, settings = tmp_path / "run", settings_with()
    claim_folder(folder, settings, force=False)
    with pytest.raises(InputError, match="exists; choose another, or give --force"):
        claim_folder(folder, settings, force=False)
    (folder / "results.csv").write_text("old")
    claim_folder(folder, settings, force=True)
    assert {path.name for path in folder.iterdir()} == {"settings.toml", "environment.json"}
    (folder / "settings.toml").rename(folder / "notes.toml")
    with pytest.raises(InputError, match="exists and is not a run folder"):
        claim_folder(folder, settings, force=True)


FAULTY_PROGRAM = """
import torch
from fedtune_clients.local_sgd import HYPERPARAMETERS, train as sgd

def train(model, weights, examples, config, rng):
    trained = sgd(model, weights, examples, config, rng)
    fault = FAULTS.get(float(examples.x.sum()))
    if fault == "nan":
        return torch.full_like(trained, float("nan"))
    if fault == "explode":
        return weights + 1e20 * (trained - weights)
    if fault == "raise":
        raise RuntimeError("out of battery")
    return trained
"""


def test_clients_that_explode_return_nan_or_raise_do_not_spoil_a_run(tmp_path):
    dataset = fedtune.load("digits")
    sums = [
        float(StoredExamples(*dataset.examples(client, "train"), dataset.spec, "cpu").all().x.sum())
        for client in range(3)
    ]
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY_PROGRAM + f"\nFAULTS = {dict(zip(sums, ['nan', 'explode', 'raise'], strict=True))}\n")
    keywords = {"tuners": ["manual"], "max_rounds": 30, "total_rounds": 30, "cohort_size": 10, "executor": "serial"}
    sound = fedtune.compare("digits", out=tmp_path / "sound", **keywords)
    faulty = fedtune.compare("digits", out=tmp_path / "faulty", client={"name": str(program)}, **keywords)
    met = dict.fromkeys(range(3), 0)
    for server_round in range(1, 31):
        for client in rng.stream(0, "cohort", server_round).choice(30, 10, replace=False).tolist():
            met[client] = met.get(client, 0) + 1
    counts = faulty.results.iloc[0]
    assert counts[["dropped", "lost"]].tolist() == [met[0], met[2]]
    lines = map(json.loads, (faulty.folder / "manual-seed0" / "journal.jsonl").read_text().splitlines())
    reasons = [reason for line in lines if line["event"] == "lost" for reason in line["reasons"]]
    assert len(reasons) == met[2]
    assert all("client 2 " in reason and "RuntimeError: out of battery" in reason for reason in reasons)
    assert counts["clipped"] >= met[1] > 0
    assert counts["test_error"] < sound.results.iloc[0]["test_error"] + 0.05


@pytest.mark.parametrize("executor", ["serial", "pool"])
def test_studies_at_once_give_the_same_bytes(tmp_path, executor):
    settings = {"tuners": ["manual", "asha", "fedex"], "max_rounds": 3, "total_rounds": 9, "seeds": 2}
    settings |= {"executor": executor, "workers": 2}
    one = fedtune.compare("digits", out=tmp_path / "one", **settings)
    started, at_once = [], []

    def watch(event):
        key = (event.get("tuner"), event.get("seed"))
        if event["event"] == "round" and key not in started:
            started.append(key)
        if event["event"] == "study_end":
            at_once.append(len(started) - len(at_once))

    many = fedtune.compare(
        "digits", out=tmp_path / "many", parallel_studies=4, shares={"asha": 2.0}, listener=watch, **settings
    )
    assert max(at_once) == 4
    for name in ("results.csv", "rounds.parquet", "trials.parquet"):
        assert (one.folder / name).read_bytes() == (many.folder / name).read_bytes()


def test_a_share_of_a_tuner_that_is_not_run_is_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown tuner in shares 'ash'; known: asha, manual"):
        fedtune.compare("digits", out=tmp_path / "run", tuners=["asha", "manual"], shares={"ash": 2.0})


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"executor": "pool", "workers": 2}, "in torch, in 2 worker processes"),
        ({"executor": "pool", "workers": 1}, "in torch, in 1 worker process"),
        ({"executor": "serial", "precision": "bf16"}, "in torch, in this process"),
        ({"workers": 1, "model": {"name": "cnn"}}, "in torch, in this process"),
        ({"executor": "batched"}, "in torch, in one tensor program on cpu"),
    ],
    ids=str,
)
def test_a_run_says_where_its_clients_train(tmp_path, settings, line):
    said = []
    settings = {"cohort_size": 2, "evaluation": {"clients": 2}, "engine": "torch"} | settings
    fedtune.train("digits", 1, out=tmp_path / "run", listener=said.append, **settings)
    assert [event["message"] for event in said if event["event"] == "executor"] == [f"clients train {line}"]


def test_only_a_comparison_begins_every_search_with_the_fixed_values(tmp_path, monkeypatch):
    """Unless the user says otherwise; the settings of an older run, which lack the key, mean what they meant."""
    assert fedtune.compare_settings("digits").fixed_first
    assert not fedtune.compare_settings("digits", {"fixed_first": False}).fixed_first
    assert not fedtune.resolve_settings("digits").fixed_first
    assert not fedtune.tune_settings("digits", "asha", 9).fixed_first
    assert fedtune.tune_settings("digits", "asha", 9, {"fixed_first": True}).fixed_first
    own = tmp_path / "own.toml"
    for line, on in (("", True), ("fixed_first = false\n", False)):
        own.write_text(f'{line}data.name = "digits"\n')
        assert fedtune.compare_settings(own).fixed_first is on
    old = Path(__file__).parent / "run_of_format_3" / "settings.toml"
    assert not fedtune.compare_settings(old).fixed_first
    assert fedtune.compare_settings(old, {"fixed_first": True}).fixed_first
    # Python's functions and the commands agree.
    seen = []
    monkeypatch.setattr(fedtune, "run", lambda settings, **options: seen.append(settings))
    monkeypatch.setattr(cli, "_show", lambda run: None)
    for function in (fedtune.compare, fedtune.train, fedtune.tune):
        function("digits")
        monkeypatch.setattr("sys.argv", ["fedtune", function.__name__, "digits"])
        with pytest.raises(SystemExit):
            cli.main()
        assert seen[-1] == seen[-2]
    assert [settings.fixed_first for settings in seen] == [True, True, False, False, False, False]


def test_a_search_needs_no_more_than_n_and_r():
    """Section 3.5.1: the budget is what n configurations can use at R rounds each, unless one is set."""
    asked = {"max_rounds": 1024}  # more than all rounds that the data set's own settings allow
    assert fedtune.tune_settings("digits", "async_hyperband", 361, asked).total_rounds == 361 * 1024
    assert fedtune.tune_settings("digits", "asha+fedex", 20).total_rounds == 20 * 9  # R is the data set's
    table = {"tuner": {"random": {"num_configs": 30}}}
    assert fedtune.tune_settings("digits", "random", None, table).total_rounds == 30 * 9
    assert fedtune.tune_settings("digits", "random", 10, table).total_rounds == 10 * 9
    assert fedtune.tune_settings("digits", "random", 10, {"total_rounds": 50}).total_rounds == 50
    for name, n in {"asha": None, "sha": 27, "elimination": 8, "manual": None}.items():  # these don't end after n
        assert fedtune.tune_settings("digits", name, n).total_rounds == 45


def test_a_settings_file_may_set_the_budget_of_a_search(tmp_path):
    path = tmp_path / "my.toml"
    for budget, total_rounds in (("", 81), ("total_rounds = 60\n", 60)):
        path.write_text(f'{budget}max_rounds = 27\ndata.name = "digits"\n')
        assert fedtune.tune_settings(path, "random", 3).total_rounds == total_rounds


@pytest.mark.parametrize("n", [0, -3])
def test_what_is_no_number_of_configurations_is_said(tmp_path, n):
    with pytest.raises(InputError, match=f"^tuner asha: num_configs must be a whole number >= 9, got {n}$"):
        fedtune.tune("digits", "asha", n, out=tmp_path / "run")


def test_a_search_ends_when_its_configurations_are_drawn_and_promoted(tmp_path):
    found = fedtune.tune("digits", "async_hyperband", 6, max_rounds=4, executor="serial", out=tmp_path / "run")
    assert found.results["trials"].item() == 6
    assert found.results["rounds_of_trial"].item() == 4


SEARCHES = ["random", "sha", "asha", "hyperband", "async_hyperband", "pbt", "bohb"]


def test_every_search_spends_its_whole_budget_and_tries_the_fixed_values(tmp_path):
    """47 rounds are no sum of whole jobs for most of them: the last job of a search is shortened to what is left."""
    tuners = ["manual", *SEARCHES]
    small = {"model": {"name": "logistic"}, "cohort_size": 1, "evaluation": {"clients": 2}, "executor": "serial"}
    options = {"async_hyperband": {"reduction_factor": 3}}
    budget = {"max_rounds": 9, "total_rounds": 47}
    found = fedtune.compare("digits", out=tmp_path / "run", tuners=tuners, tuner=options, **budget, **small)
    for column in ("rounds", "charged_rounds", "total_rounds"):
        assert found.results[column].tolist() == [47] * len(tuners)
    assert (found.trials.loc[found.trials["tuner"] != "manual", "rounds"] <= 9).all()
    configs = found.trials.loc[found.trials["trial"] == 0, "config"]
    assert configs.tolist() == [configs.iloc[0]] * len(tuners)
    assert all(study.finished for study in fedtune.replay(found.folder))


def test_an_infinite_horizon_trains_beyond_max_rounds(tmp_path):
    """The rungs go on at 3 times the rounds each, as long as the budget lasts, and a replay agrees."""
    options = {"asha": {"infinite_horizon": True}}
    found = fedtune.compare(
        "digits", tuners=["asha"], max_rounds=3, total_rounds=80, tuner=options, executor="serial", out=tmp_path / "on"
    )
    result = found.results.iloc[0]
    assert result["rounds_of_trial"] in (9, 27)
    trial = found.rounds[found.rounds["trial"] == result["trial"]]
    at_three = trial.loc[trial["round"] == 3, "test_error"].item()  # the tail of three rounds is the third
    assert result["test_error_at_max_rounds"] == at_three
    assert math.isnan(result["test_error_personalised_at_max_rounds"])  # nobody looked then
    assert fedtune.replay(tmp_path / "on")[0].rounds == result["rounds"]


def test_all_trials_of_a_seed_are_scored_on_the_same_clients(tmp_path, monkeypatch):
    """Those of every tuner, whether they are compared within a study or between two."""
    seen = set()

    def spy(dataset, clients):
        seen.add(tuple(clients.tolist()))
        return evaluation_tasks(dataset, clients)

    monkeypatch.setattr(federation, "evaluation_tasks", spy)
    settings = {"max_rounds": 3, "total_rounds": 9, "executor": "serial", "evaluation": {"clients": 4}}
    for seed in (0, 1):
        run = fedtune.compare("digits", tuners=["asha", "fedex"], seed=seed, out=tmp_path / str(seed), **settings)
        assert run.results["trials"].sum() > 2
        assert len(seen) == seed + 1
    assert {len(clients) for clients in seen} == {4}
