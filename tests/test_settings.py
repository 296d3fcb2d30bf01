import json
import re
import tomllib
from pathlib import Path

import pytest

from fedtune.errors import InputError, UnknownNameError
from fedtune.settings import digest, resolve
from fedtune.settings_text import parse_assignment, read_settings, write_settings

BASE = {"data": {"name": "digits"}}


def test_later_layers_win_and_tables_merge():
    settings = resolve([BASE, {"client": {"learning_rate": 0.1, "epochs": 2}}, {"client": {"learning_rate": 0.5}}])
    assert settings.client == {"learning_rate": 0.5, "epochs": 2}


def test_a_domain_is_replaced_not_merged():
    layers = [{"space": {"client": {"dropout": {kind: [0.0, 0.5]}}}} for kind in ("uniform", "choice")]
    assert resolve([BASE, *layers]).space.client["dropout"] == {"choice": [0.0, 0.5]}


def test_a_list_elsewhere_does_not_replace_its_table():
    layers = [{"data": {"features": ["height"]}}, {"model": {"name": "mlp", "hidden": [9]}}, {"model": {"hidden": [7]}}]
    settings = resolve([BASE, *layers])
    assert settings.data == {"name": "digits", "features": ["height"]}
    assert settings.model == {"name": "mlp", "hidden": [7]}


def test_layers_are_not_changed():
    layer = {"client": {"learning_rate": 0.1}}
    resolve([BASE, layer, {"client": {"learning_rate": 0.5}}])
    assert layer == {"client": {"learning_rate": 0.1}}


def test_written_settings_resolve_to_the_same():
    settings = resolve([BASE, {"space": {"client": {"learning_rate": {"log_uniform": [1e-4, 1.0]}}}, "seeds": 3}])
    assert resolve([tomllib.loads(write_settings(settings))]) == settings


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"max_round": 9}, r"unknown setting 'max_round'; known: client, cohort_size, .*max_rounds"),
        (
            {"server": {"lr": 1.0}},
            r"unknown setting 'server.lr'; known: server.aggregation, server.beta1, .*server.learning_rate",
        ),
        ({"seeds": 0}, r"seeds must be greater than or equal to 1, got 0"),
        ({"seeds": "three"}, r"seeds must be a valid integer, got 'three'"),
        ({"seed": -1}, r"seed must be greater than or equal to 0, got -1"),
        ({"server": {"optimizer": "sgdd"}}, r"server.optimizer must be 'sgd', 'adam' or 'yogi', got 'sgdd'"),
        ({"server": {"learning_rate": float("nan")}}, r"server.learning_rate must be .*, got nan"),
        ({"server": {"trim": 0.5}}, r"server.trim must be less than 0.5, got 0.5"),
        ({"server": {"trim": 0}}, r"server.trim must be greater than or equal to 0.001, got 0"),
        ({"server": {"byzantine": 0}}, r"server.byzantine must be greater than or equal to 1, got 0"),
        ({"server": {"aggregation": "meen"}}, r"must be 'mean', 'median', 'trimmed_mean', 'krum' or 'multi_krum', got"),
        (
            {"server": {"aggregation": "krum", "byzantine": 4}},
            r"cohort_size must be at least 11 for server.aggregation 'krum' with server.byzantine 4, got 10",
        ),
        (
            {"server": {"aggregation": "trimmed_mean", "trim": 0.05}},
            r"cohort_size must be at least 20 for server.aggregation 'trimmed_mean' with server.trim 0.05, got 10",
        ),
        (
            {"server": {"aggregation": "median"}, "cohort_size": 2},
            r"cohort_size must be at least 3 for server.aggregation 'median', got 2",
        ),
        ({"max_rounds": 81, "total_rounds": 80}, r"total_rounds must be at least max_rounds \(81\), got 80"),
        ({"tuners": ["asha", "asha"]}, r"tuners must name one tuner or more, each once"),
        ({"tuners": []}, r"tuners must name one tuner or more, each once, got \[\]"),
        ({"data": {"name": 3}}, r"data needs a name"),
    ],
)
def test_bad_settings_are_one_line(layer, message):
    with pytest.raises(InputError, match=message) as caught:
        resolve([BASE, layer])
    assert "\n" not in str(caught.value)


def test_the_digest_of_a_run_whose_settings_had_no_aggregation_is_as_before():
    """The digest in the journals of run_of_format_3, from which a run is resumed."""
    settings = resolve([read_settings(Path(__file__).parent / "run_of_format_3" / "settings.toml")])
    assert digest(settings) == "6c68864d212a1fba"
    robust = [
        {"aggregation": "median"},
        {"aggregation": "krum", "byzantine": 1},
        {"aggregation": "krum", "byzantine": 2},
    ]
    digests = [digest(resolve([BASE, {"server": server}])) for server in [{}, *robust]]
    assert len(set(digests)) == 4


def test_missing_data_is_named():
    with pytest.raises(InputError, match="the setting data is missing"):
        resolve([])


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("seeds=5", {"seeds": 5}),
        ("client.learning_rate = 1e-2", {"client": {"learning_rate": 0.01}}),
        ("data.partition=dirichlet", {"data": {"partition": "dirichlet"}}),
        ("tuner.asha+fedex.pool_size=5", {"tuner": {"asha+fedex": {"pool_size": 5}}}),
        ("space.client.epochs={integer=[1,3]}", {"space": {"client": {"epochs": {"integer": [1, 3]}}}}),
    ],
)
def test_assignments(text, layer):
    assert parse_assignment(text) == layer


@pytest.mark.parametrize("text", ["seeds", "=5", "a..b=1", ""])
def test_bad_assignments(text):
    with pytest.raises(InputError, match="--set must be key=value"):
        parse_assignment(text)


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_settings(tmp_path / "missing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("seeds = ")
    with pytest.raises(InputError, match="is not TOML"):
        read_settings(broken)


def test_assignment_under_something_that_is_no_table():
    with pytest.raises(UnknownNameError, match=r"unknown setting 'server.a'"):
        resolve([BASE, {"server": {"a": {"b": 1}}}])


def test_all_clients_can_be_asked_for_by_name():
    def clients(value):
        return resolve([{"data": {"name": "digits"}, "evaluation": {"clients": value}}]).evaluation.clients

    assert clients("all") is None
    assert clients(7) == 7
    for bad in (0, "some"):
        with pytest.raises(InputError, match=r"^evaluation\.clients must be [^\n]*got " + re.escape(repr(bad))):
            clients(bad)


def test_all_clients_stay_asked_for_where_a_data_set_ships_fewer():
    shipped = {**BASE, "evaluation": {"clients": 100}}
    written = write_settings(resolve([shipped, {"evaluation": {"clients": "all"}}]))
    assert resolve([shipped, tomllib.loads(written)]).evaluation.clients is None


def test_an_earlier_version_gave_these_settings_the_same_digest():
    """Its run can be resumed: a setting that came later does not count, unless it is set."""
    folder = Path(__file__).parent / "run_of_format_3"
    begun = json.loads((folder / "asha-seed1" / "journal.jsonl").read_text().splitlines()[0])
    settings = read_settings(folder / "settings.toml")
    assert digest(resolve([settings])) == begun["settings"]
    assert digest(resolve([settings, {"server": {"max_examples": 7}}])) != begun["settings"]


@pytest.mark.parametrize("value", [0, -1, 1.0, "many", True, 10**12 + 1])
def test_max_examples_is_a_count(value):
    with pytest.raises(InputError, match=r"^server.max_examples must be .*, got "):
        resolve([BASE, {"server": {"max_examples": value}}])
