"""The settings of a run, made of layers: defaults, what the data set ships, a file, the command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fedtune.settings import Settings

Tables = Sequence[Mapping[str, Any]]


class Layer(NamedTuple):
    """A table of settings, and where it is from: a data set, a client program, a file, the command line."""

    origin: str
    table: Mapping[str, Any]


class Layers(NamedTuple):
    """The layers of a run, the lowest first: what is shipped, and then what the user gives."""

    shipped: list[Layer]
    given: list[Layer]
    left_out: Sequence[tuple[str, str]] = ()  # (name, origin) of what is shipped and the client program does not have
    of_a_run: bool = False  # whether a file that the user gives is the settings.toml of a run

    def resolve(self) -> "Settings":
        """The settings. Raises InputError, one line."""
        from fedtune.settings import resolve

        return resolve([layer.table for layer in self.given], [layer.table for layer in self.shipped])

    def origin(self, key: str) -> str | None:
        """Where the highest layer is from that sets the dotted key; None if no layer sets it."""
        layers: list[Layer] = [*self.shipped, *self.given]
        return next((layer.origin for layer in reversed(layers) if _sets(layer.table, key)), None)


def resolve_settings(what: str | Path, *layers: Mapping[str, Any]) -> "Settings":
    """The settings of a run on a data set, or of a run that a TOML file describes.

    `what` is the data set's name or the file's path. The file overrides what its data set ships, and `layers` override
    both:

        fedtune.resolve_settings("digits", {"max_rounds": 27}, {"client": {"learning_rate": 0.1}})
    """
    return layers_of(what, layers).resolve()


def compare_settings(what: str | Path, *layers: Mapping[str, Any]) -> "Settings":
    """The settings of a comparison; `what` and `layers` are as in `resolve_settings`.

    Unless the user sets `fixed_first`, it is true: every search then also tries the fixed values, from which `fedex`
    starts. In the settings.toml of an older run it stays false, so that this file still describes the same run.
    """
    found = layers_of(what, layers)
    if not found.of_a_run:
        found.shipped.insert(0, Layer("compare", {"fixed_first": True}))
    return found.resolve()


def tune_settings(what: str | Path, tuner: str, num_configs: int | None, *layers: Mapping[str, Any]) -> "Settings":
    """The settings of a search with one tuner; `what` and `layers` are as in `resolve_settings`.

    If the tuner ends after n configurations and the user sets no `total_rounds`, the budget is n times `max_rounds`,
    the most that n configurations can use. So n and `max_rounds` are all that a user must give (thesis, section 3.5.1).
    """
    from fedtune.overlay import merge
    from fedtune.tuning.tuners import TUNERS

    own: dict[str, Any] = {"tuners": [tuner]}
    if num_configs is not None:
        own["tuner"] = {tuner: {"num_configs": num_configs}}
    found = layers_of(what, [*layers, own])
    ends_after_num_configs = tuner in TUNERS and TUNERS[tuner].extendable
    if ends_after_num_configs and not any("total_rounds" in layer.table for layer in found.given):
        merged = merge(layer.table for layer in [*found.shipped, *found.given])
        found.given.append(Layer("budget of all configurations", _budget_of_all_configs(merged, tuner)))
    return found.resolve()


def data_table(file: Path, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """The table `[data]` of the run that a TOML file describes, as in `resolve_settings`, with only its name checked.

    An installed data set is imported for what it ships; no code in a file is, and no model and client program.
    """
    from fedtune import plugins
    from fedtune.errors import InputError
    from fedtune.overlay import merge
    from fedtune.settings_text import read_settings

    given = [read_settings(file), *layers]
    name = _name_in(merge(given), "data")
    if not isinstance(name, str):
        raise InputError(f"{file} must have the name of a data set in [data], got {name!r}")
    table: dict[str, Any] = merge([plugins.dataset_settings(name), *given])["data"]
    return table


def layers_of(what: str | Path, given: Tables, origin: str = "arguments") -> Layers:
    """The layers of a run; `what` is as in `resolve_settings`, and `origin` says where the tables in `given` are from.

    The settings of a run stand alone: they hold all that was shipped.
    """
    from fedtune import plugins, settings_text

    name: Any = str(what)
    layers = [Layer(origin, table) for table in given]
    if name.endswith(".toml"):
        file = settings_text.read_settings(Path(what))
        layers.insert(0, Layer(name, file))
        if settings_text.are_of_a_run(file):
            return Layers([], layers, of_a_run=True)
        name = _name_in(file, "data")
    else:
        _check_same_name(name, given)
    # A file without a data set's name, or with something else in its place, is an error that `resolve` names.
    if not isinstance(name, str):
        return Layers([], layers)
    dataset = Layer(f"data set {name}", plugins.dataset_settings(name))
    shipped = _shipped(dataset, _client_name([dataset, *layers]))
    left_out = [(f"client.{name}", dataset.origin) for name in _client_names(dataset) - _client_names(shipped[0])]
    return Layers(shipped, layers, sorted(left_out))


def _shipped(dataset: Layer, client: str) -> list[Layer]:
    """What a data set ships for a client program, and then the search space of the program, if it counts.

    The program's space counts if the data set ships none. If the data set's settings are for another program, this
    program's hyperparameters replace those that it does not have.
    """
    from fedtune import plugins

    made_for = _client_name([dataset])
    if client == made_for and "space" in dataset.table:
        return [dataset]
    own, origin = plugins.default_space(client), f"client program {client}"
    if client == made_for:
        return [dataset, Layer(origin, {"space": {"client": own}})]
    # Leave out what the program does not have.
    known = plugins.load_client_program(client).HYPERPARAMETERS
    values, space = dataset.table.get("client", {}), dataset.table.get("space", {})
    values = {name: value for name, value in values.items() if name in known}
    domains = {name: domain for name, domain in space.get("client", {}).items() if name in known}
    fitted = {**dataset.table, "client": values, "space": {**space, "client": domains}}
    # A hyperparameter with a value and no domain in a data set that ships a space is not to be searched.
    spoken_for = {**values, **domains} if space else {}
    added = {name: domain for name, domain in own.items() if name not in spoken_for}
    return [Layer(dataset.origin, fitted), Layer(origin, {"space": {"client": added}})]


def _sets(table: Any, key: str) -> bool:
    first, dot, rest = key.partition(".")
    return isinstance(table, Mapping) and first in table and (not dot or _sets(table[first], rest))


def _client_names(dataset: Layer) -> set[str]:
    """The client hyperparameters for which a data set ships a value or a domain."""
    values, space = dataset.table.get("client", {}), dataset.table.get("space", {})
    return {*values, *space.get("client", {})} - {"name"}


def _client_name(layers: Sequence[Layer]) -> str:
    """The client program that the last layer with a name names."""
    from fedtune.settings import DEFAULT_CLIENT

    name = DEFAULT_CLIENT
    for layer in layers:
        given = _name_in(layer.table, "client")
        name = given if isinstance(given, str) else name
    return name


def _check_same_name(name: str, given: Tables) -> None:
    """Raises InputError if the user also gives another name in `[data]`: its settings would be those of `name`."""
    from fedtune.errors import InputError

    for other in (_name_in(table, "data") for table in given):
        if other not in (None, name):
            raise InputError(f"data.name must be {name!r}, the data set that is asked for, got {other!r}")


def _name_in(settings: Mapping[str, Any], table: str) -> Any:
    """The name in one of the tables; None if there is none, or if the settings hold something else there."""
    held = settings.get(table)
    return held.get("name") if isinstance(held, Mapping) else None


def _budget_of_all_configs(merged: Mapping[str, Any], tuner: str) -> dict[str, Any]:
    """The layer that sets `total_rounds` to what all of the tuner's configurations can use; empty if n is not set."""
    from fedtune.settings import Settings

    try:
        num_configs = merged["tuner"][tuner]["num_configs"]
    except (KeyError, TypeError):  # not set, or something that is no table, which `resolve` names
        return {}
    max_rounds = merged.get("max_rounds", Settings.model_fields["max_rounds"].default)
    if not isinstance(num_configs, int) or not isinstance(max_rounds, int):
        return {}
    return {"total_rounds": max(num_configs, 1) * max_rounds}
