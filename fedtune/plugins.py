"""Data sets, models and client programs, found by name: an installed entry point, or `file.py:function`.

A data set may also be named by the path of a table or a folder.
"""

import functools
import importlib.util
import inspect
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from fedtune.client.program import ClientProgram
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.formats.folders import from_folder
from fedtune.data.formats.leaf import from_leaf, is_leaf_folder
from fedtune.data.formats.tables import SUFFIXES, from_table
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError, UnknownNameError
from fedtune.settings import DEFAULT_CLIENT
from fedtune.tuning.space import Hyperparameter

if TYPE_CHECKING:
    from torch import nn


def known(kind: str) -> dict[str, EntryPoint]:
    """The installed plug-ins of a kind: datasets, models or clients."""
    return {entry.name: entry for entry in entry_points(group=f"fedtune.{kind}")}


def dataset_settings(name: str) -> dict[str, Any]:
    """The settings that a data set ships for runs on it; empty for one in a file."""
    settings = {} if _is_own(name) else getattr(_load("datasets", name), "SETTINGS", {})
    return {**settings, "data": {**settings.get("data", {}), "name": name}}


def prepare_dataset(name: str) -> Path | None:
    """Where the data set's files lie, downloaded and verified; None where it needs none."""
    prepare = None if _is_own(name) else getattr(_load("datasets", name), "prepare", None)
    return prepare() if prepare else None


def load_dataset(table: Mapping[str, Any]) -> FederatedDataset:
    """The data set that a `[data]` table describes."""
    name, options = _name_and_options(table)
    load = _own_loader(name) if _is_own(name) else _load("datasets", name).load
    dataset = _call(load, options, f"data set {name!r}", "data")
    if not isinstance(dataset, FederatedDataset):
        raise InputError(f"{name} must return a FederatedDataset, got {type(dataset).__name__}")
    return dataset


def make_model(table: Mapping[str, Any], spec: DatasetSpec) -> "nn.Module":
    """The torch module that a `[model]` table describes, for examples of `spec`."""
    from torch import nn

    name, options = _name_and_options(table)
    make = _load_from_file(name) if _is_file(name) else _load("models", name)
    model = _call(make, options, f"model {name!r}", "model", spec)
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def client_program(name: str) -> ClientProgram:
    """The client program of that name."""
    program = _load_file(name) if _is_file(name) else _load("clients", name)
    for attribute in ("HYPERPARAMETERS", "train"):
        if not hasattr(program, attribute):
            raise InputError(f"the client program {name!r} must define {attribute}")
    for hyperparameter in program.HYPERPARAMETERS.values():
        if not isinstance(hyperparameter, Hyperparameter):
            raise InputError(f"HYPERPARAMETERS of {name!r} must map names to Hyperparameter, got {hyperparameter!r}")
    return cast(ClientProgram, program)


def default_space(client: str | None) -> dict[str, Any]:
    """The `[space]` of a client program (None: local_sgd), for data sets that ship none."""
    space = getattr(client_program(client or DEFAULT_CLIENT), "SPACE", {})
    return {"client": space} if space else {}


def _is_own(name: str) -> bool:
    """Whether a data set is the user's own: a function in a file, a table or a folder."""
    return _is_file(name) or name.endswith(SUFFIXES) or "/" in name


def _own_loader(name: str) -> Callable[..., Any]:
    if _is_file(name):
        return _load_from_file(name)
    if not Path(name).exists():
        raise InputError(f"the {'table' if name.endswith(SUFFIXES) else 'folder'} {name} does not exist")
    load = from_table if name.endswith(SUFFIXES) else from_leaf if is_leaf_folder(name) else from_folder
    return functools.partial(load, name)


def _is_file(name: str) -> bool:
    return ".py" in name


def _name_and_options(table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return table["name"], {key: value for key, value in table.items() if key != "name"}


def _load(kind: str, name: str) -> Any:
    plugins = known(kind)
    if name not in plugins:
        if kind == "datasets" and Path(name).is_dir():
            raise InputError(f"data set {name!r} must be an installed one; for the folder write {name + '/'!r}")
        what = {"datasets": "data set", "models": "model", "clients": "client program"}[kind]
        raise UnknownNameError(what, name, plugins)
    try:
        return plugins[name].load()
    except Exception as error:
        raise InputError(f"the plug-in {name!r} can't be loaded: {_in_one_line(error)}") from error


def _load_from_file(name: str) -> Callable[..., Any]:
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
    # Not under its stem: a file called wave.py would then be what everybody imports as wave.
    name = f"fedtune_plugin_{zlib.crc32(bytes(file)):08x}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    with _errors_of(file):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    """Makes an InputError of what a user's file raises: one line that says where; the cause keeps the traceback."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        if isinstance(error, SyntaxError) and error.filename == str(file):
            lines = [error.lineno]
        where = f"{file}, line {lines[-1]}" if lines else str(file)
        raise InputError(f"{where}: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"


def _call(function: Callable[..., Any], options: dict[str, Any], what: str, table: str, *arguments: Any) -> Any:
    """What the function returns for the arguments and the options of its table, which are checked first."""
    parameters = _parameters(functools.partial(function, *arguments), what)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in options.items():
        if key not in parameters and not takes_any:
            known = [f"{table}.{name}" for name in parameters] or ["none"]
            raise UnknownNameError(f"setting of the {what}", f"{table}.{key}", known)
        if key in parameters:
            _check_type(parameters[key].annotation, value, f"{table}.{key}")
    for name, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not variadic and name not in options:
            raise InputError(f"the setting {table}.{name} is missing, the {what} needs it")
    return function(*arguments, **options)


def _parameters(function: Callable[..., Any], what: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function, eval_str=True).parameters
    except NameError:  # an annotation that is imported for type checkers only
        return inspect.signature(function).parameters
    except ValueError as error:
        raise InputError(f"the {what} must be a function that can be called: {error}") from None


def _check_type(annotation: Any, value: Any, name: str) -> None:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_python(value, strict=True)
    except PydanticUserError:  # an annotation that pydantic can't check
        return
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Input should be ").replace("an instance of Sequence", "a list")
        message = message.replace("'str' instances are not allowed as a Sequence value", "a list")
        raise InputError(f"{name} must be {message}, got {value!r}") from None
