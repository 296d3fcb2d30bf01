"""clients/README.md: its files work as they are written there, and its tables say what there is."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune import plugins
from fedtune.cli import app
from fedtune.client.flat_model import FlatModel
from fedtune.client.stacked import is_stackable
from fedtune.data.spec import DatasetSpec
from fedtune.testing import check_client
from fedtune_clients import local_sgd
from fedtune_clients.hyperparameters import HYPERPARAMETERS

PAGE = (Path(__file__).parents[1] / "clients" / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {re.match(r"# ([\w.]+)", text)[1]: text for language, text in BLOCKS if language == "python"}
TABLES = [text for language, text in BLOCKS if language == "toml"]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files of the page, in which one works and whose modules can be imported."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_page_has_its_files():
    assert FILES.keys() == {"my_model.py", "my_text_model.py", "my_client.py", "test_my_client.py", "halved.py"}


def test_the_text_model_of_the_page_has_a_stacked_form(folder):
    module = plugins.make_model({"name": "my_text_model.py:Text"}, DatasetSpec((6,), "token", 4))
    assert is_stackable(FlatModel(module))


SETTINGS = """
max_rounds = 1
total_rounds = 1
cohort_size = 2

[data]
name = "users.csv"
client = "user"
label = "likes"

[client]
"""


def test_a_run_with_the_model_and_the_client_program_of_the_page(folder):
    lines = [f"user{number % 4},{number / 80},{number % 3},{number % 2}" for number in range(80)]
    (folder / "users.csv").write_text("\n".join(["user,height,age,likes", *lines]))
    (client,) = re.findall(r"names it: `(name = .*?)`", PAGE)
    model = next(table for table in TABLES if "my_model.py" in table)
    (folder / "settings.toml").write_text(f"{SETTINGS}{client}\n\n{model}")
    done = CliRunner().invoke(app, ["train", "settings.toml", "--executor", "serial", "--out", "run"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "warning" not in done.output


def test_the_search_space_of_the_program_on_a_data_set_that_ships_one(folder):
    (command,) = re.findall(r"`fedtune (space .*?)`", PAGE)
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, (done.output, done.exception)
    searched, _, rest = done.output.partition("fixed:")
    assert re.findall(r"^  client\.(\w+)", searched, re.MULTILINE) == ["learning_rate"]
    left_out = {f"client.{name}" for name in HYPERPARAMETERS} - {"client.learning_rate"}
    assert set(re.findall(r"^  (client\.\w+)", rest, re.MULTILINE)) == left_out


def test_the_test_of_the_client_program(folder):
    import test_my_client

    test_my_client.test_my_client()


def test_the_program_that_trains_in_the_kernel(folder):
    import halved

    check_client(halved)
    assert halved.compile_model is local_sgd.compile_model


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_settings_name_what_can_be_made(table):
    parsed = tomllib.loads(table)
    assert parsed.keys() <= {"model", "project"}
    assert set(parsed.get("project", {}).get("entry-points", {})) <= {"fedtune.models", "fedtune.clients"}


def test_the_tables_of_models_and_programs_list_what_is_installed():
    names = {row[0].strip("`") for row in ROWS}
    models, programs = plugins.known("models").keys(), plugins.known("clients").keys()
    assert names == models | programs | HYPERPARAMETERS.keys()


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_the_table_of_hyperparameters_has_their_ranges_and_defaults(name):
    (row,) = [row for row in ROWS if row[0] == f"`{name}`"]
    hyperparameter = HYPERPARAMETERS[name]
    signs = {"> ": hyperparameter.low_open, "≥ ": not hyperparameter.low_open}
    low = next(sign for sign, is_right in signs.items() if is_right) + f"{hyperparameter.low:g}"
    high = [f"< {hyperparameter.high:g}"] if hyperparameter.high < float("inf") else []
    assert row[1] == ", ".join([*(["whole"] if hyperparameter.integer else []), low, *high])
    assert float(row[2]) == hyperparameter.default


def test_the_page_shows_no_deeper_path_of_the_library():
    paths = set(re.findall(r"\bfedtune(?:\.\w+)+", PAGE))
    public = r"fedtune\.(data|tuning|testing|client)(\.[A-Z]\w*)?|fedtune\.testing\.\w+|fedtune\.(models|clients)"
    assert {path for path in paths if not re.fullmatch(public, path)} == set()
