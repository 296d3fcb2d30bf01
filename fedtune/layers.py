"""How settings are laid over each other: defaults, those of the data set, a file, the command line."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.settings import Settings


def resolve_settings(what: str | Path, *layers: Mapping[str, Any]) -> "Settings":
    """The settings for a data set by name, or of a TOML file over those its data set ships, under further layers."""
    from fedtune import plugins, settings

    base: list[Mapping[str, Any]]
    if str(what).endswith(".toml"):
        table = settings.read_settings(Path(what))
        name = table.get("data", {}).get("name")
        base = [plugins.dataset_settings(name), table] if isinstance(name, str) else [table]
    else:
        base = [plugins.dataset_settings(str(what))]
    tables = [*base, *layers]
    if not any("space" in table for table in tables):  # as with data of one's own
        client = next((t["client"]["name"] for t in reversed(tables) if "name" in t.get("client", {})), None)
        tables.insert(0, {"space": plugins.default_space(client)})
    return settings.resolve(tables)


def tune_settings(what: str | Path, tuner: str, num_configs: int | None, *layers: Mapping[str, Any]) -> "Settings":
    """The settings of a search with one tuner; see `resolve_settings`.

    Where it ends after so many configurations, n, and neither the file nor a layer sets `total_rounds`, that is n times
    `max_rounds`, more than which they can't use: n and R are all that has to be given (thesis, section 3.5.1).
    """
    from fedtune.settings import read_settings
    from fedtune.tuning.tuners import TUNERS

    own: dict[str, Any] = {"tuners": [tuner]}
    if num_configs is not None:
        own["tuner"] = {tuner: {"num_configs": num_configs}}
    given = [*([read_settings(Path(what))] if str(what).endswith(".toml") else []), *layers]
    ends_after_num_configs = tuner in TUNERS and TUNERS[tuner].extendable
    if ends_after_num_configs and not any("total_rounds" in table for table in given):
        any_budget = resolve_settings(what, *layers, own, {"total_rounds": sys.maxsize})
        n = any_budget.tuner.get(tuner, {}).get("num_configs")
        if isinstance(n, int):
            own["total_rounds"] = max(n, 1) * any_budget.max_rounds
    return resolve_settings(what, *layers, own)
