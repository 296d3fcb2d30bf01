"""A federated-learning simulator with hyperparameter tuning built in: FedEx beside ASHA, on Flower.

The functions here do what the commands of the same names do:

    run = fedtune.compare("mnist", tuners=["manual", "asha", "fedex"], max_rounds=27, total_rounds=135, seeds=3)
    run.results  # a pandas DataFrame, a row a tuner and seed
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.data.federated_dataset import FederatedDataset
    from fedtune.report.frames import Run
    from fedtune.settings import Settings
    from fedtune.simulation.comparison import Comparison
    from fedtune.simulation.replay import ReplayedStudy

__all__ = ["compare", "extend", "load", "read_run", "replay", "resolve_settings", "resume", "run", "train", "tune"]


def load(name: str, **options: Any) -> "FederatedDataset":
    """The data set of that name, or that `file.py:function` makes; `options` are those of its `[data]` table."""
    from fedtune.plugins import load_dataset

    return load_dataset({"name": name, **options})


def train(what: str | Path, rounds: int | None = None, **keywords: Any) -> "Run":
    """The run of one federation under the fixed `[client]` and `[server]` values, for `rounds` rounds.

    The other keywords are those of `compare`.
    """
    budget = {} if rounds is None else {"max_rounds": rounds, "total_rounds": rounds}
    return compare(what, **{**budget, **keywords, "tuners": ["manual"]})


def tune(
    what: str | Path,
    tuner: str = "asha",
    num_configs: int | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    listener: Callable[[dict[str, Any]], None] = lambda event: None,
    optuna: str | None = None,
    **settings: Any,
) -> "Run":
    """The run of one tuner, which draws `num_configs` configurations; see `tune_settings` and `compare`."""
    resolved = tune_settings(what, tuner, num_configs, settings)
    return run(resolved, out=out, force=force, listener=listener, optuna=optuna)


def compare(
    what: str | Path,
    *,
    out: str | Path | None = None,
    force: bool = False,
    listener: Callable[[dict[str, Any]], None] = lambda event: None,
    optuna: str | None = None,
    **settings: Any,
) -> "Run":
    """The run of several tuners at an equal budget, on a data set by name or as a settings file says.

    `settings` are laid over those of the data set or file: `max_rounds=27`, `client={"learning_rate": 0.1}`. `out` is
    the run folder, made anew (`force` overwrites an older run); None makes one under runs/. `listener` hears every
    event. `optuna` is the URL of an Optuna storage in which the trials appear too, for its dashboard.
    """
    return run(resolve_settings(what, settings), out=out, force=force, listener=listener, optuna=optuna)


def run(
    settings: "Settings",
    *,
    out: str | Path | None,
    force: bool,
    listener: Callable[[dict[str, Any]], None],
    optuna: str | None = None,
) -> "Run":
    """The run that resolved settings describe, with its figures drawn; see `compare`."""
    _start_workers_early(settings)
    from fedtune.simulation.comparison import claim_folder, prepare

    comparison = prepare(settings)
    folder = Path(out) if out is not None else new_folder(settings)
    with _mirrored(listener, optuna, comparison, folder) as listener:
        claim_folder(folder, settings, force=force)
        comparison.run(folder, listener)
    return _draw(folder)


def resume(
    folder: str | Path,
    *,
    workers: int | None = None,
    executor: str | None = None,
    listener: Callable[[dict[str, Any]], None] = lambda event: None,
    optuna: str | None = None,
) -> "Run":
    """The run in a folder, brought to its end after it was stopped: to the bit as if it had never been."""
    from fedtune.simulation.run_folder import settings_path

    folder = Path(folder)
    where = {name: value for name, value in (("workers", workers), ("executor", executor)) if value is not None}
    settings = resolve_settings(settings_path(folder), where)
    _start_workers_early(settings)
    from fedtune.simulation.comparison import prepare

    comparison = prepare(settings)
    with _mirrored(listener, optuna, comparison, folder) as listener:
        comparison.run(folder, listener)
    return _draw(folder)


def extend(
    folder: str | Path,
    *,
    num_configs: int | None = None,
    total_rounds: int | None = None,
    **keywords: Any,
) -> "Run":
    """The finished run in a folder, gone on with: each study draws up to `num_configs` configurations in all.

    `total_rounds` is each study's new budget; None is what so many configurations can use at most. The other keywords
    are those of `resume`.
    """
    from fedtune.simulation.extension import extend_run

    extend_run(Path(folder), num_configs, total_rounds)
    return resume(folder, **keywords)


def replay(folder: str | Path) -> "list[ReplayedStudy]":
    """The studies of a run folder, rebuilt from their journals and checked; nothing is trained or written.

    Raises InputError where a journal and its tuner, or the files of results, disagree.
    """
    from fedtune.simulation.replay import replay

    return list(replay(Path(folder)))


def read_run(folder: str | Path) -> "Run":
    """What a finished run folder holds."""
    from fedtune.report.frames import read_run

    return read_run(folder)


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
    from fedtune.tuning.tuners import ends_after_num_configs

    own: dict[str, Any] = {"tuners": [tuner]}
    if num_configs is not None:
        own["tuner"] = {tuner: {"num_configs": num_configs}}
    given = [*([read_settings(Path(what))] if str(what).endswith(".toml") else []), *layers]
    if ends_after_num_configs(tuner) and not any("total_rounds" in table for table in given):
        any_budget = resolve_settings(what, *layers, own, {"total_rounds": sys.maxsize})
        n = any_budget.tuner.get(tuner, {}).get("num_configs")
        if isinstance(n, int):
            own["total_rounds"] = max(n, 1) * any_budget.max_rounds
    return resolve_settings(what, *layers, own)


def _start_workers_early(settings: "Settings") -> None:
    from fedtune.simulation.executors import start_forkserver

    if settings.executor != "serial":
        start_forkserver()  # imports torch over there while we import it here


def _mirrored(
    listener: Callable[[dict[str, Any]], None], storage: str | None, comparison: "Comparison", folder: Path
) -> AbstractContextManager[Callable[[dict[str, Any]], None]]:
    if storage is None:
        return nullcontext(listener)
    from fedtune.report.optuna_mirror import OptunaMirror
    from fedtune.simulation.study import digest

    settings = comparison.settings
    decided_by = f"{digest(settings)}, {settings.total_rounds} rounds"
    return OptunaMirror(storage, folder.resolve().name, decided_by, comparison.hyperparameters.space, listener)


def _draw(folder: Path) -> "Run":
    from fedtune.report.plots import plot_entropy, plot_incumbents

    finished = read_run(folder)
    plot_incumbents(finished, folder / "figures" / "incumbents.png")
    plot_entropy(finished, folder / "figures" / "entropy.png")
    return finished


def new_folder(settings: "Settings") -> Path:
    """Where a run is put that is given no folder: under runs/, by data set and time."""
    from datetime import datetime

    name = Path(settings.data["name"].partition(":")[0]).stem
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
