"""The hyperparameters of a run: which value each one is fixed at, and which ones are searched."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedtune import plugins
from fedtune.errors import UnknownNameError
from fedtune.overlay import FIXED
from fedtune.server import optimizers
from fedtune.settings import Settings, client_program_name
from fedtune.tuning.domains import Domain, parse_domain
from fedtune.tuning.space import Config, SearchSpace, check_space


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters in the settings: a fixed value for each, and the search space.

    With `fixed_first`, trial 0 of a search has the fixed values, also if they lie outside the search space.
    """

    client: Config  # from `[client]`, completed by the client program's defaults; `train` and `manual` use it
    server: Config
    space: SearchSpace
    fixed_first: bool = False


def resolve_hyperparameters(settings: Settings) -> Hyperparameters:
    """The hyperparameters, checked against those that the client program and the server use. Raises InputError."""
    known = plugins.load_client_program(client_program_name(settings)).HYPERPARAMETERS
    fixed = fixed_client_values(settings)
    for name in fixed:
        if name not in known:
            raise UnknownNameError("client hyperparameter", f"client.{name}", [f"client.{other}" for other in known])
    client = {name: known[name].check(f"client.{name}", fixed.get(name, known[name].default)) for name in known}
    hyperparameters = with_client_values(settings, client)
    check_space(hyperparameters.space.client, known, "client hyperparameter")
    check_space(hyperparameters.space.server, optimizers.HYPERPARAMETERS, "server hyperparameter")
    _check_names(settings.space.client, known, "client hyperparameter")  # also of what is fixed there
    _check_names(settings.space.server, optimizers.HYPERPARAMETERS, "server hyperparameter")
    return hyperparameters


def fixed_client_values(settings: Settings) -> dict[str, Any]:
    """The values in `[client]`, as the settings have them."""
    return {name: value for name, value in settings.client.items() if name != "name"}


def with_client_values(settings: Settings, client: Config) -> Hyperparameters:
    """The hyperparameters in the settings, with these values of the client's. The search space is not checked."""
    server = {
        name: hyperparameter.check(f"server.{name}", getattr(settings.server, name))
        for name, hyperparameter in optimizers.HYPERPARAMETERS.items()
    }
    space = SearchSpace(_domains("client", settings.space.client), _domains("server", settings.space.server))
    return Hyperparameters(client, server, space, settings.fixed_first)


def not_searched(settings: Settings, hyperparameters: Hyperparameters) -> str:
    """The hyperparameters that have the word "fixed" in `[space]`, with their values: "client.momentum = 0.9"."""
    values = {"client": hyperparameters.client, "server": hyperparameters.server}
    tables = {"client": settings.space.client, "server": settings.space.server}
    names = [(part, name) for part, table in tables.items() for name, given in table.items() if given == FIXED]
    return ", ".join(f"{part}.{name} = {values[part][name]}" for part, name in names)


def _domains(part: str, table: Mapping[str, Any]) -> dict[str, Domain]:
    """The domains in `[space.client]` or `[space.server]`, without what is fixed there."""
    return {name: parse_domain(f"space.{part}.{name}", given) for name, given in table.items() if given != FIXED}


def _check_names(names: Iterable[str], known: Collection[str], kind: str) -> None:
    for name in names:
        if name not in known:
            raise UnknownNameError(kind, name, known)
