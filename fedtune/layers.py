"""The settings of a run, made of layers: defaults, what the data set ships, a file, the command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.settings import Settings

Tables = Sequence[Mapping[str, Any]]


def resolve_settings(what: str | Path, *layers: Mapping[str, Any]) -> "Settings":
    """The settings of a run on a data set, or of a run that a TOML file describes.

    `what` is the data set's name or the file's path. The file overrides what its data set ships, and `layers` override
    both:

        fedtune.resolve_settings("digits", {"max_rounds": 27}, {"client": {"learning_rate": 0.1}})
    """
    from fedtune.settings import resolve

    shipped, given = _shipped_and_given(what, layers)
    return resolve([*shipped, *given])


def compare_settings(what: str | Path, *layers: Mapping[str, Any]) -> "Settings":
    """The settings of a comparison; `what` and `layers` are as in `resolve_settings`.

    Unless the user sets `fixed_first`, it is true: every search then also tries the fixed values, from which `fedex`
    starts. In the settings.toml of an older run it stays false, so that this file still describes the same run.
    """
    from fedtune.settings import resolve

    shipped, given = _shipped_and_given(what, layers)
    # A run's settings.toml names every setting that there was; nobody sets `extensions` by hand.
    of_a_run = any("extensions" in table for table in given)
    return resolve([{"fixed_first": not of_a_run}, *shipped, *given])


def tune_settings(what: str | Path, tuner: str, num_configs: int | None, *layers: Mapping[str, Any]) -> "Settings":
    """The settings of a search with one tuner; `what` and `layers` are as in `resolve_settings`.

    If the tuner ends after n configurations and the user sets no `total_rounds`, the budget is n times `max_rounds`,
    the most that n configurations can use. So n and `max_rounds` are all that a user must give (thesis, section 3.5.1).
    """
    from fedtune.settings import merge, resolve
    from fedtune.tuning.tuners import TUNERS

    own: dict[str, Any] = {"tuners": [tuner]}
    if num_configs is not None:
        own["tuner"] = {tuner: {"num_configs": num_configs}}
    shipped, given = _shipped_and_given(what, layers)
    tables = [*shipped, *given, own]
    ends_after_num_configs = tuner in TUNERS and TUNERS[tuner].extendable
    if ends_after_num_configs and not any("total_rounds" in table for table in given):
        tables.append(_budget_of_all_configs(merge(tables), tuner))
    return resolve(tables)


def data_table(file: Path, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """The table `[data]` of the run that a TOML file describes, as in `resolve_settings`, with only its name checked.

    An installed data set is imported for what it ships; no code in a file is, and no model and client program.
    """
    from fedtune import plugins
    from fedtune.errors import InputError
    from fedtune.settings import merge, read_settings

    given = [read_settings(file), *layers]
    name = _name_in(merge(given), "data")
    if not isinstance(name, str):
        raise InputError(f"{file} must have the name of a data set in [data], got {name!r}")
    table: dict[str, Any] = merge([plugins.dataset_settings(name), *given])["data"]
    return table


def _shipped_and_given(what: str | Path, layers: Tables) -> tuple[Tables, Tables]:
    """What the data set and the client program bring, and what the user gives: a file, further layers."""
    from fedtune import plugins, settings

    name: Any = str(what)
    given = [*layers]
    if name.endswith(".toml"):
        file = settings.read_settings(Path(what))
        given = [file, *layers]
        name = _name_in(file, "data")
    # A file without a data set's name, or with something else in its place, is an error that `resolve` names.
    shipped = [plugins.dataset_settings(name)] if isinstance(name, str) else []
    tables = [*shipped, *given]
    # A data set of the user's own brings no search space: then the client program's space is searched.
    if not any("space" in table for table in tables):
        shipped = [{"space": plugins.default_space(_client_name(tables))}, *shipped]
    return shipped, given


def _client_name(tables: Tables) -> str | None:
    name = None
    for table in tables:
        given = _name_in(table, "client")
        name = given if isinstance(given, str) else name
    return name


def _name_in(layer: Mapping[str, Any], table: str) -> Any:
    """The name in one of the layer's tables; None if there is none, or if the layer holds something else there."""
    held = layer.get(table)
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
