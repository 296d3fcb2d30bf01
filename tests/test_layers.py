"""Settings made of layers: what the search space and the fixed values mean, wherever they are given."""

import json
import shutil
import tomllib
from pathlib import Path

import pandas as pd
import pytest

import fedtune
from fedtune.errors import UnknownNameError
from fedtune.hyperparameters import resolve_hyperparameters
from fedtune.layers import resolve_settings
from fedtune.settings import digest
from fedtune_clients.hyperparameters import SPACE
from fedtune_datasets import digits, femnist, mnist, shakespeare

OLD_RUN = Path(__file__).parent / "run_of_format_3"
RATE = {"log_uniform": [1e-3, 0.5]}
PROGRAM = """
from fedtune.client import Hyperparameter

HYPERPARAMETERS = {
    "learning_rate": Hyperparameter(0.1, low=0.0, low_open=True),
    "warmth": Hyperparameter(0.5, low=0.0, high=1.0),
}
SPACE = {"warmth": {"uniform": [0.0, 1.0]}}


def train(model, weights, examples, config, rng):
    return weights * (1 - 0.01 * config["warmth"])
"""
TINY = {
    "tuners": ["random"],
    "max_rounds": 1,
    "total_rounds": 3,
    "cohort_size": 2,
    "executor": "serial",
    "model": {"name": "logistic"},
    "evaluation": {"clients": 2},
}


@pytest.fixture
def users(tmp_path):
    """A settings file of one's own data."""
    rows = [f"user{number % 4},{number / 80},{number % 3},{number % 2}" for number in range(80)]
    (tmp_path / "users.csv").write_text("\n".join(["user,height,age,likes", *rows]))
    path = tmp_path / "users.toml"
    path.write_text(f'[data]\nname = "{tmp_path / "users.csv"}"\nclient = "user"\nlabel = "likes"\n')
    return path


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(PROGRAM)
    return {"name": str(path)}


def searched(what, *layers):
    """The domains of what is searched, as the hyperparameters of a run have them, by dotted names."""
    space = resolve_hyperparameters(resolve_settings(what, *layers)).space
    return {f"{part}.{name}": domain for part in ("client", "server") for name, domain in getattr(space, part).items()}


@pytest.mark.parametrize("dataset", [digits, mnist, femnist, shakespeare])
def test_what_a_data_set_ships_is_searched_if_the_user_says_nothing(dataset):
    name = dataset.__name__.rpartition(".")[2]
    assert resolve_settings(name).space.model_dump() == dataset.SETTINGS["space"]


@pytest.mark.parametrize("own", [True, False])
def test_a_users_space_is_laid_over_the_shipped_one(users, own):
    what = users if own else "digits"
    before = searched(what)
    assert {f"client.{name}" for name in SPACE} <= before.keys()
    after = searched(what, {"space": {"client": {"learning_rate": RATE}}})
    assert after == before | {"client.learning_rate": after["client.learning_rate"]}
    assert after["client.learning_rate"] != before["client.learning_rate"]
    without = searched(what, {"space": {"client": {"momentum": "fixed"}}})
    assert without == {name: domain for name, domain in before.items() if name != "client.momentum"}
    assert searched(what, {"space": {"only": ["client.dropout"]}}) == {"client.dropout": before["client.dropout"]}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("in_file", [True, False])
def test_what_the_user_fixes_is_not_searched(users, own, in_file):
    if not own:
        users.write_text('[data]\nname = "digits"\n')
    given = {"client": {"momentum": 0.9}}
    before = searched(users)
    if in_file:
        users.write_text(users.read_text() + "\n[client]\nmomentum = 0.9\n")
    layers = [] if in_file else [given]
    assert before.keys() - searched(users, *layers).keys() == {"client.momentum"}
    assert resolve_hyperparameters(resolve_settings(users, *layers)).client["momentum"] == 0.9
    # With a domain of the user's own, it is searched, and the value is that of manual.
    both = resolve_settings(users, *layers, {"space": {"client": {"momentum": {"uniform": [0.0, 0.5]}}}})
    assert both.space.client["momentum"] == {"uniform": [0.0, 0.5]}
    assert resolve_hyperparameters(both).client["momentum"] == 0.9


def test_a_server_value_of_the_users_is_not_searched():
    assert searched("digits").keys() - searched("digits", {"server": {"learning_rate": 0.5}}).keys() == {
        "server.learning_rate"
    }


def test_a_program_of_ones_own_needs_none_of_the_shipped_hyperparameters(program):
    settings = resolve_settings("digits", {"client": program})
    shipped = digits.SETTINGS["space"]
    assert settings.space.client == {
        "learning_rate": shipped["client"]["learning_rate"],
        "warmth": {"uniform": [0.0, 1.0]},
    }
    assert settings.space.server == shipped["server"]
    assert resolve_hyperparameters(settings).client == {"learning_rate": 0.1, "warmth": 0.5}


def test_a_program_of_ones_own_is_run_on_a_shipped_data_set(program, tmp_path):
    run = fedtune.compare("digits", **TINY, client=program, out=tmp_path / "run")
    assert json.loads(run.results["config"][0])["client"].keys() == {"learning_rate", "warmth"}


def test_a_program_does_not_search_what_a_data_set_has_chosen_to_fix(tmp_path):
    """Shakespeare has a value and no domain for the epochs, and a space; a program has both."""
    path = tmp_path / "own.py"
    path.write_text(PROGRAM.replace('"warmth": Hyper', '"epochs": Hyperparameter(3), "warmth": Hyper'))
    path.write_text(path.read_text().replace("SPACE = {", 'SPACE = {"epochs": {"choice": [1.0, 2.0]}, '))
    found = resolve_hyperparameters(resolve_settings("shakespeare", {"client": {"name": str(path)}}))
    assert found.space.client.keys() == {"learning_rate", "warmth"}
    assert found.client["epochs"] == shakespeare.SETTINGS["client"]["epochs"] == 1
    # Other data fix nothing.
    own = resolve_settings("mine.py:make", {"client": {"name": str(path)}})
    assert own.space.client.keys() == {"epochs", "warmth"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"client": {"momentum": 0.9}}, "unknown client hyperparameter 'client.momentum'"),
        ({"space": {"client": {"momentum": {"uniform": [0.0, 0.5]}}}}, "unknown client hyperparameter 'momentum'"),
        ({"space": {"client": {"momentum": "fixed"}}}, "unknown client hyperparameter 'momentum'"),
        ({"space": {"server": {"warmth": "fixed"}}}, "unknown server hyperparameter 'warmth'"),
        ({"space": {"only": ["client.momentum"]}}, "unknown dimension in space.only 'client.momentum'"),
    ],
)
def test_a_name_that_the_user_gives_must_be_one_of_the_programs(program, given, said):
    with pytest.raises(UnknownNameError, match=f"^{said}; known: "):
        resolve_hyperparameters(resolve_settings("digits", {"client": program}, given))


def test_the_settings_of_a_run_repeat_it_and_an_extension_keeps_what_is_fixed(users, tmp_path):
    space = {"only": ["client.learning_rate", "client.dropout"], "client": {"learning_rate": RATE}}
    given = {
        **TINY,
        "client": {"momentum": 0.5, "dropout": 0.25},
        "space": space,
        "tuner": {"random": {"num_configs": 2}},
    }
    first = fedtune.compare(users, **given, out=tmp_path / "first")
    again = fedtune.compare(tmp_path / "first" / "settings.toml", out=tmp_path / "again")
    pd.testing.assert_frame_equal(first.results, again.results)
    pd.testing.assert_frame_equal(first.trials, again.trials)
    assert first.settings == again.settings
    longer = fedtune.extend(tmp_path / "first", num_configs=3)
    configs = [json.loads(config)["pool"][0][0] for config in longer.trials["config"]]
    assert len(configs) == 3
    assert {config["momentum"] for config in configs} == {0.5}
    assert len({config["dropout"] for config in configs}) == 3
    assert longer.settings["space"] == first.settings["space"]


def test_the_settings_of_an_older_run_mean_what_they_meant():
    old = tomllib.loads((OLD_RUN / "settings.toml").read_text())
    settings = resolve_settings(OLD_RUN / "settings.toml")
    assert settings.space.model_dump() == old["space"]
    assert settings.client == old["client"]
    for name, seed in settings.studies:
        journal = (OLD_RUN / f"{name}-seed{seed}" / "journal.jsonl").read_text()
        assert json.loads(journal.splitlines()[0])["settings"] == digest(settings)


def test_the_settings_of_a_run_stand_alone(users, tmp_path):
    """The space of an older run on data of one's own replaced the client program's space."""
    old = (OLD_RUN / "settings.toml").read_text()
    head, _, tail = old.partition("[space.client.momentum]")
    text = head + tail[tail.index("[tuner.asha]") :]
    path = tmp_path / "settings.toml"
    path.write_text(
        text.replace('name = "digits"\npartition = "iid"\nnum_clients = 10', f'name = "{users.parent}/users.csv"')
    )
    assert searched(path).keys() == {"client.learning_rate"}
    assert searched(path, {"space": {"client": {"learning_rate": "fixed"}}}) == {}
    assert resolve_settings(path, {"space": {"client": {"momentum": {"uniform": [0.0, 0.5]}}}}).space.client.keys() == {
        "learning_rate",
        "momentum",
    }


def test_an_older_run_is_resumed_under_the_same_settings(tmp_path):
    folder = shutil.copytree(OLD_RUN, tmp_path / "run")
    resumed = fedtune.resume(folder)
    pd.testing.assert_frame_equal(resumed.trials, fedtune.read_run(OLD_RUN).trials)
