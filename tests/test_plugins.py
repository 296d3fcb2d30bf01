import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from torch import nn

from fedtune import plugins
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.space import Hyperparameter
from fedtune_clients import local_sgd

SPEC = DatasetSpec((8, 8), "real", 10)
DATASET = """
import numpy as np
from fedtune.data.federated_dataset import FederatedDataset


def make(folder: str, *, num_clients: int = 3, noise: float = 0.0):
    rng = np.random.default_rng(0)
    clients = {f"{folder}{i}": (rng.normal(noise, 1.0, (10, 2)), rng.integers(0, 2, 10)) for i in range(num_clients)}
    return FederatedDataset.from_clients(clients, name="mine", num_classes=2)


def wrong():
    return {}


number = 3
"""
MODEL = """
from torch import nn


def make(spec, *, width: int = 4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, spec.num_classes))


def wrong(spec):
    return None


def none():
    return nn.Linear(1, 1)
"""


@pytest.fixture
def write(tmp_path):
    """Writes a file and gives its path."""

    def write(text, name="plug_in.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def error_of(function, *arguments):
    """The InputError's text, one line."""
    with pytest.raises(InputError) as raised:
        function(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# What a name stands for.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mnist", "installed"),
        ("mine.py:make", "file"),
        ("my.folder/mine.py", "file"),
        ("users.csv", "table"),
        ("tables/users.parquet", "table"),
        ("images/", "folder"),
        ("./images", "folder"),
        ("users.python/", "folder"),
        ("copy.pyc/users.csv", "table"),
    ],
)
def test_what_a_name_stands_for(name, kind):
    assert plugins.name_kind(name) == kind


def test_a_folder_with_leafs_files_is_a_leaf_folder(tmp_path):
    assert plugins.name_kind(str(tmp_path)) == "folder"
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "all_data.json").write_text("{}")
    assert plugins.name_kind(str(tmp_path)) == "LEAF folder"


# Installed plug-ins.


def test_what_is_installed():
    assert {"digits", "mnist"} <= set(plugins.known("datasets"))
    assert {"logistic", "mlp", "cnn"} <= set(plugins.known("models"))
    assert set(plugins.known("clients")) == {"local_sgd"}


def test_installed_plug_ins_by_name():
    dataset = plugins.load_dataset({"name": "digits", "num_clients": 4})
    assert isinstance(dataset, FederatedDataset)
    assert dataset.num_clients == 4
    model = plugins.make_model({"name": "mlp", "hidden": [7]}, SPEC)
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [7, 10]
    assert plugins.load_client_program("local_sgd") is local_sgd
    assert plugins.prepare_dataset("digits") is None


def test_the_settings_that_a_data_set_ships():
    settings = plugins.dataset_settings("digits")
    assert settings["data"]["name"] == "digits"
    assert settings["cohort_size"] == 5
    assert plugins.dataset_settings("mine.py:make") == {"data": {"name": "mine.py:make"}}
    settings["data"]["name"] = "other"  # belongs to whoever asked
    assert plugins.dataset_settings("digits")["data"]["name"] == "digits"


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        (plugins.load_dataset, [{"name": "digit"}], r"unknown data set 'digit'; known: .*digits, .*mnist"),
        (plugins.dataset_settings, ["digit"], r"unknown data set 'digit'; known: .*digits, .*mnist"),
        (plugins.prepare_dataset, ["digit"], r"unknown data set 'digit'; known: .*digits, .*mnist"),
        (plugins.make_model, [{"name": "net"}, SPEC], r"unknown model 'net'; known: cnn, .*logistic, .*mlp"),
        (plugins.load_client_program, ["adam"], r"unknown client program 'adam'; known: local_sgd"),
        (
            plugins.load_dataset,
            [{"name": "digits", "clients": 3}],
            r"unknown setting of the data set 'digits' 'data\.clients'; known: data\.alpha, .*data\.num_clients, ",
        ),
        (
            plugins.make_model,
            [{"name": "mlp", "width": 3}, SPEC],
            r"unknown setting of the model 'mlp' 'model\.width'; known: model\.hidden$",
        ),
        (
            plugins.make_model,
            [{"name": "logistic", "width": 3}, SPEC],
            r"unknown setting of the model 'logistic' 'model\.width'; known: none$",
        ),
    ],
)
def test_unknown_names_list_the_known_ones(function, arguments, said):
    with pytest.raises(UnknownNameError, match=f"^{said}"):
        function(*arguments)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"num_clients": "ten"}, "data.num_clients must be a valid integer, got 'ten'"),
        ({"num_clients": 3.0}, "data.num_clients must be a valid integer, got 3.0"),
        ({"num_clients": True}, "data.num_clients must be a valid integer, got True"),
        ({"partition": 3}, "data.partition must be a valid string, got 3"),
        ({"alpha": "small"}, "data.alpha must be a valid number, got 'small'"),
    ],
)
def test_an_option_of_another_type(table, said):
    assert error_of(plugins.load_dataset, {"name": "digits", **table}) == said


def test_an_installed_plug_in_that_can_not_be_imported(monkeypatch):
    entry = EntryPoint("broken", "no_such_package.module:load", "fedtune.models")
    monkeypatch.setattr(plugins, "known", lambda kind: {"broken": entry})
    said = "the plug-in 'broken' can't be loaded: ModuleNotFoundError: No module named 'no_such_package'"
    assert error_of(plugins.make_model, {"name": "broken"}, SPEC) == said


# Plug-ins in a file.


def test_a_data_set_in_a_file(write):
    name = f"{write(DATASET)}:make"
    dataset = plugins.load_dataset({"name": name, "folder": "a", "num_clients": 5})
    assert list(dataset.client_ids) == ["a0", "a1", "a2", "a3", "a4"]
    assert plugins.load_dataset({"name": name, "folder": "b", "noise": 1}).num_clients == 3
    assert plugins.prepare_dataset(name) is None


def test_a_model_in_a_file(write):
    name = f"{write(MODEL)}:make"
    assert plugins.make_model({"name": name}, SPEC)[1].out_features == 4
    assert plugins.make_model({"name": name, "width": 6}, SPEC)[2].in_features == 6


def test_a_client_program_in_a_file(write):
    path = write(
        """
        from fedtune.tuning.space import Hyperparameter
        HYPERPARAMETERS = {"rate": Hyperparameter(0.5)}
        def train(model, weights, examples, config, rng):
            return weights
        """
    )
    program = plugins.load_client_program(path)
    assert program.HYPERPARAMETERS["rate"] == Hyperparameter(0.5)
    assert program.train(None, 3, None, {}, None) == 3
    assert plugins.load_client_program(path) is program  # read once


def test_a_relative_path_is_looked_up_where_one_is(write, tmp_path, monkeypatch):
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "net.py").write_text(f"from torch import nn\ndef make(spec):\n    return nn.Linear(1, {number})\n")
        monkeypatch.chdir(folder)
        assert plugins.make_model({"name": "net.py:make"}, SPEC).out_features == number


def test_a_file_may_be_called_like_a_module_that_others_import(write):
    assert "this" not in sys.modules  # a module of Python's that nobody needs
    plugins.make_model({"name": f"{write(MODEL, 'this.py')}:make"}, SPEC)
    assert "this" not in sys.modules


def test_a_file_may_define_dataclasses_and_postpone_its_annotations(write):
    path = write(
        """
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import TYPE_CHECKING
        from torch import nn
        if TYPE_CHECKING:
            from somewhere import Spec

        @dataclass
        class Options:
            width: int = 3

        def make(spec, width: int = Options().width):
            return nn.Linear(1, width)

        def guarded(spec: Spec, width: int = 3):
            return nn.Linear(1, width)
        """
    )
    assert plugins.make_model({"name": f"{path}:make"}, SPEC).out_features == 3
    assert error_of(plugins.make_model, {"name": f"{path}:make", "width": "a"}, SPEC) == (
        "model.width must be a valid integer, got 'a'"
    )
    assert plugins.make_model({"name": f"{path}:guarded", "width": 5}, SPEC).out_features == 5


def test_a_function_may_take_any_option_and_types_that_can_not_be_checked(write):
    path = write(
        """
        from dataclasses import dataclass
        from torch import nn

        @dataclass
        class Options:
            width: int

        def make(spec, options: Options | None = None, size: Options = None, **others):
            return nn.Linear(1, others["width"])
        """
    )
    assert plugins.make_model({"name": f"{path}:make", "width": 7, "size": 1}, SPEC).out_features == 7


@pytest.mark.parametrize(
    ("suffix", "said"),
    [
        ("", "a plug-in in a file must be written file.py:function, got '{path}'"),
        (":nothing", "{path} must define the function 'nothing'"),
        (":number", "{path} must define the function 'number'"),
        (":wrong", "{path}:wrong must return a FederatedDataset, got dict"),
        (":make", "the setting data.folder is missing, the data set '{path}:make' needs it"),
    ],
)
def test_a_file_that_does_not_hold_what_its_name_says(write, suffix, said):
    path = write(DATASET)
    assert error_of(plugins.load_dataset, {"name": path + suffix}) == said.format(path=path)


@pytest.mark.parametrize("suffix", [":make", ":make:x"])
def test_a_file_that_does_not_exist(suffix):
    path = f"no/such/file.py{suffix}".rpartition(":")[0]
    said = f"the plug-in file {path!r} does not exist"
    assert error_of(plugins.load_dataset, {"name": f"no/such/file.py{suffix}"}) == said
    assert error_of(plugins.load_client_program, path) == said


def test_options_of_a_file_are_checked_too(write):
    path = write(DATASET)
    table = {"name": f"{path}:make", "folder": "a"}
    assert error_of(plugins.load_dataset, {**table, "noise": "loud"}) == "data.noise must be a valid number, got 'loud'"
    assert error_of(plugins.load_dataset, {**table, "clients": 3}) == (
        f"unknown setting of the data set '{path}:make' 'data.clients'; "
        "known: data.folder, data.noise, data.num_clients; did you mean data.num_clients?"
    )


def test_a_model_function_that_is_none(write):
    path = write(MODEL)
    assert error_of(plugins.make_model, {"name": f"{path}:wrong"}, SPEC) == (
        f"{path}:wrong must return a torch.nn.Module, got NoneType"
    )
    said = error_of(plugins.make_model, {"name": f"{path}:none"}, SPEC)
    assert said == f"the model '{path}:none' must be a function that takes (DatasetSpec), got one that does not"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def train(): pass", "the client program '{path}' must define HYPERPARAMETERS"),
        ("HYPERPARAMETERS = {}", "the client program '{path}' must define train"),
        (
            "HYPERPARAMETERS = {'rate': 0.1}\ndef train(): pass",
            "HYPERPARAMETERS of '{path}' must map names to Hyperparameter, got 0.1",
        ),
    ],
)
def test_a_client_program_that_is_none(write, text, said):
    path = write(text)
    assert error_of(plugins.load_client_program, path) == said.format(path=path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = x / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("x = 1\n\ndef make(spec:\n    pass\n", "line 3: SyntaxError: '(' was never closed"),
        ("def make(spec):\n    pass\n  x = 1\n", "line 3: IndentationError: unindent does not match any outer "),
        ("import no_such_package\n", "line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise RuntimeError('a\\n  b')\n", "line 1: RuntimeError: a b"),
        ("import sys\n\nsys.exit(3)\n", "line 3: SystemExit: 3"),
        ("import json\n\njson.loads('{')\n", "line 3: JSONDecodeError: Expecting property name"),
    ],
)
def test_a_file_that_can_not_be_read_in_is_one_line_with_its_own_line_number(write, text, said):
    path = write(text)
    with pytest.raises(InputError) as raised:
        plugins.make_model({"name": f"{path}:make"}, SPEC)
    assert str(raised.value).startswith(f"{path}, {said}")
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is not None  # the traceback, for whoever wants it


def test_a_file_with_an_error_is_read_again_once_it_is_mended(write):
    path = write("x = 1 / 0\n")
    assert "ZeroDivisionError" in error_of(plugins.make_model, {"name": f"{path}:make"}, SPEC)
    write(MODEL)
    assert isinstance(plugins.make_model({"name": f"{path}:make"}, SPEC), nn.Module)


def test_an_exception_in_a_files_function_is_one_line_with_its_own_line_number(write):
    path = write(
        """
        import json
        from fedtune.errors import InputError

        def deep():
            return json.loads("{")

        def make(path: str = ""):
            return deep()

        def refuse():
            raise InputError("the folder must exist, got 'x'")

        def leave():
            raise SystemExit(3)
        """
    )
    said = error_of(plugins.load_dataset, {"name": f"{path}:make"})
    line = Path(path).read_text().splitlines().index('    return json.loads("{")') + 1
    assert said.startswith(f"{path}, line {line}: JSONDecodeError: Expecting property name")
    assert error_of(plugins.load_dataset, {"name": f"{path}:refuse"}) == "the folder must exist, got 'x'"
    line = Path(path).read_text().splitlines().index("    raise SystemExit(3)") + 1
    assert error_of(plugins.load_dataset, {"name": f"{path}:leave"}) == f"{path}, line {line}: SystemExit: 3"
