"""Data sets, models and client programs, found by name: an installed entry point, or `file.py:function`."""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from fedtune.data.federated_dataset import DatasetSpec, FederatedDataset
from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.space import Hyperparameter

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from fedtune.flat_model import Examples, FlatModel


@runtime_checkable
class ClientProgram(Protocol):
    """What a module in the group `fedtune.clients` offers: local training and the hyperparameters it heeds."""

    HYPERPARAMETERS: Mapping[str, Hyperparameter]

    def train(
        self,
        model: "FlatModel",
        weights: "Tensor",
        examples: "Examples",
        config: Mapping[str, float],
        rng: "np.random.Generator",
    ) -> "Tensor":
        """The flat weights after local training on `examples` from `weights`."""


def known(kind: str) -> dict[str, EntryPoint]:
    """The installed plug-ins of a kind: datasets, models or clients."""
    return {entry.name: entry for entry in entry_points(group=f"fedtune.{kind}")}


def dataset_settings(name: str) -> dict[str, Any]:
    """The settings that a data set ships for runs on it; empty for one in a file."""
    settings = {} if _is_file(name) else getattr(_load("datasets", name), "SETTINGS", {})
    return {**settings, "data": {**settings.get("data", {}), "name": name}}


def prepare_dataset(name: str) -> Path | None:
    """Where the data set's files lie, downloaded and verified; None where it needs none."""
    prepare = None if _is_file(name) else getattr(_load("datasets", name), "prepare", None)
    return prepare() if prepare else None


def load_dataset(table: Mapping[str, Any]) -> FederatedDataset:
    """The data set that a `[data]` table describes."""
    name, options = _name_and_options(table)
    load = _load_from_file(name) if _is_file(name) else _load("datasets", name).load
    dataset = _call(load, options, f"data set {name!r}", "data")
    if not isinstance(dataset, FederatedDataset):
        raise InputError(f"{name} must return a FederatedDataset, got {type(dataset).__name__}")
    return dataset


def make_model(table: Mapping[str, Any], spec: DatasetSpec) -> "nn.Module":
    """The torch module that a `[model]` table describes, for examples of `spec`."""
    from torch import nn

    name, options = _name_and_options(table)
    make = _load_from_file(name) if _is_file(name) else _load("models", name)
    model = _call(functools.partial(make, spec), options, f"model {name!r}", "model")
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def client_program(name: str) -> ClientProgram:
    """The client program of that name."""
    program = _load_file(name) if _is_file(name) else _load("clients", name)
    return cast(ClientProgram, program)


def _is_file(name: str) -> bool:
    return ".py" in name


def _name_and_options(table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return table["name"], {key: value for key, value in table.items() if key != "name"}


def _load(kind: str, name: str) -> Any:
    plugins = known(kind)
    if name not in plugins:
        what = {"datasets": "data set", "models": "model", "clients": "client program"}[kind]
        raise UnknownNameError(what, name, plugins)
    return plugins[name].load()


def _load_from_file(name: str) -> Callable[..., Any]:
    path, colon, attribute = name.rpartition(":")
    if not colon:
        raise InputError(f"a plug-in in a file must be written file.py:function, got {name!r}")
    function = getattr(_load_file(path), attribute, None)
    if not callable(function):
        raise InputError(f"{path} must define the function {attribute!r}")
    return cast(Callable[..., Any], function)


@functools.cache
def _load_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"the plug-in file {path!r} does not exist")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)
    spec.loader.exec_module(module)
    return module


def _call(function: Callable[..., Any], options: dict[str, Any], what: str, table: str) -> Any:
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in options.items():
        if key not in parameters and not takes_any:
            raise UnknownNameError(
                f"setting of the {what}", f"{table}.{key}", [f"{table}.{name}" for name in parameters]
            )
        _check_type(parameters.get(key), value, f"{table}.{key}")
    return function(**options)


def _check_type(parameter: inspect.Parameter | None, value: Any, name: str) -> None:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if parameter is None or parameter.annotation is parameter.empty:
        return
    try:
        TypeAdapter(parameter.annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(
            value, strict=True
        )
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise InputError(f"{name} must be {message}, got {value!r}") from None
