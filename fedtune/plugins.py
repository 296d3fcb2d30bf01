"""Data sets, models and client programs, found by name and loaded.

A name stands for an installed plug-in or for a function in a file; the name of a data set may also be the path of a
table or of a folder.
"""

import functools
import importlib.util
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

from fedtune.client.program import ClientProgram
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.formats.folders import from_folder
from fedtune.data.formats.leaf import from_leaf, is_leaf_folder
from fedtune.data.formats.tables import SUFFIXES, from_table
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError, UnknownNameError
from fedtune.options import call
from fedtune.tuning.space import Hyperparameter

if TYPE_CHECKING:
    from torch import nn

NameKind = Literal["installed", "file", "table", "LEAF folder", "folder"]
OWN_DATA: dict[NameKind, Callable[..., FederatedDataset]] = {
    "table": from_table,
    "LEAF folder": from_leaf,
    "folder": from_folder,
}
KIND_WORDS = {"datasets": "data set", "models": "model", "clients": "client program"}


def name_kind(name: str) -> NameKind:
    """What the name of a plug-in stands for.

    `mnist` is installed, `mine.py:make` and `mine.py` are files, `users.csv` is a table, `images/` and `data/images`
    are folders. A folder is a LEAF folder if it holds LEAF's JSON files.
    """
    if name.endswith(".py") or ".py:" in name:
        return "file"
    if name.endswith(SUFFIXES):
        return "table"
    if "/" not in name:
        return "installed"
    return "LEAF folder" if is_leaf_folder(name) else "folder"


def known(kind: str) -> dict[str, EntryPoint]:
    """The installed plug-ins of a kind: datasets, models or clients."""
    return {entry.name: entry for entry in entry_points(group=f"fedtune.{kind}")}


def dataset_settings(name: str) -> dict[str, Any]:
    """The settings that a data set ships for runs on it; a data set of the user's own ships only its name."""
    settings = getattr(_load_installed("datasets", name), "SETTINGS", {}) if name_kind(name) == "installed" else {}
    return {**settings, "data": {**settings.get("data", {}), "name": name}}


def prepare_dataset(name: str) -> Path | None:
    """The folder of the data set's files, downloaded and verified; None if the data set needs no download."""
    if name_kind(name) != "installed":
        return None
    prepare = getattr(_load_installed("datasets", name), "prepare", None)
    return prepare() if prepare else None


def load_dataset(table: Mapping[str, Any]) -> FederatedDataset:
    """The data set that a `[data]` table describes."""
    name, options = _name_and_options(table)
    try:
        dataset = call(_dataset_loader(name), options, f"data set {name!r}", "data")
    except InputError:
        raise
    except Exception as error:
        if name_kind(name) not in OWN_DATA:
            raise
        raise InputError(f"{name} can't become a data set: {_in_one_line(error)}") from error  # such as strange numbers
    if not isinstance(dataset, FederatedDataset):
        raise InputError(f"{name} must return a FederatedDataset, got {type(dataset).__name__}")
    return dataset


def make_model(table: Mapping[str, Any], spec: DatasetSpec) -> "nn.Module":
    """The torch module that a `[model]` table describes, for examples of `spec`."""
    from torch import nn

    name, options = _name_and_options(table)
    make = _function_in_file(name) if name_kind(name) == "file" else _load_installed("models", name)
    try:
        model = call(make, options, f"model {name!r}", "model", spec)
    except InputError:
        raise
    except Exception as error:  # such as sizes that no memory holds
        raise InputError(f"the model {name!r} can't be made with these settings: {_in_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def load_client_program(name: str) -> ClientProgram:
    """The client program of that name: a module with `HYPERPARAMETERS` and `train`."""
    program = _load_file(name) if name_kind(name) == "file" else _load_installed("clients", name)
    for attribute in ("HYPERPARAMETERS", "train"):
        if not hasattr(program, attribute):
            raise InputError(f"the client program {name!r} must define {attribute}")
    for hyperparameter in program.HYPERPARAMETERS.values():
        if not isinstance(hyperparameter, Hyperparameter):
            raise InputError(f"HYPERPARAMETERS of {name!r} must map names to Hyperparameter, got {hyperparameter!r}")
    return cast(ClientProgram, program)


def default_space(client: str) -> dict[str, Any]:
    """The `[space.client]` of a client program, for a data set that ships none; empty if the program has no `SPACE`."""
    return dict(getattr(load_client_program(client), "SPACE", {}))


def _dataset_loader(name: str) -> Callable[..., Any]:
    """The function that makes the data set from the other options of its table."""
    kind = name_kind(name)
    if kind == "installed":
        load: Callable[..., Any] = _load_installed("datasets", name).load
        return load
    if kind == "file":
        return _function_in_file(name)
    if not Path(name).exists():
        raise InputError(f"the {kind} {name} does not exist")
    return functools.partial(OWN_DATA[kind], name)


def _name_and_options(table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return table["name"], {key: value for key, value in table.items() if key != "name"}


def _load_installed(kind: str, name: str) -> Any:
    plugins = known(kind)
    if name == "":
        raise InputError(f"a {KIND_WORDS[kind]} must have a name, got ''")
    if name not in plugins:
        if kind == "datasets" and Path(name).is_dir():
            raise InputError(f"data set {name!r} must be an installed one; for the folder write {name + '/'!r}")
        raise UnknownNameError(KIND_WORDS[kind], name, plugins)
    try:
        return plugins[name].load()
    except (Exception, SystemExit) as error:
        raise InputError(f"the plug-in {name!r} can't be loaded: {_in_one_line(error)}") from error


def _function_in_file(name: str) -> Callable[..., Any]:
    path, colon, attribute = name.rpartition(":")
    if not colon:
        raise InputError(f"a plug-in in a file must be written file.py:function, got {name!r}")
    function = getattr(_load_file(path), attribute, None)
    if not callable(function):
        raise InputError(f"{path} must define the function {attribute!r}")
    guarded: Callable[..., Any] = _errors_of(Path(path).resolve())(function)
    return guarded


def _load_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"the plug-in file {path!r} does not exist")
    return _module(file)


@functools.cache
def _module(file: Path) -> ModuleType:
    # The module does not get the file's own name: otherwise a file wave.py would replace the module wave for everybody.
    name = f"fedtune_plugin_{zlib.crc32(bytes(file)):08x}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module there
    with _errors_of(file):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    """Turns an exception from a user's file, or its exit, into an InputError: one line with file and line number.

    The exception stays as the InputError's cause, with its traceback.
    """
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        if isinstance(error, SyntaxError) and error.filename == str(file):
            lines = [error.lineno]
        where = f"{file}, line {lines[-1]}" if lines else str(file)
        raise InputError(f"{where}: {_in_one_line(error)}") from error


def _in_one_line(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"
