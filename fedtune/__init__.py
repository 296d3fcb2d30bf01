"""A federated-learning simulator with hyperparameter tuning built in: FedEx beside ASHA, on Flower.

The functions here do what the commands of the same names do:

    run = fedtune.compare("mnist", tuners=["manual", "asha", "fedex"], max_rounds=27, total_rounds=135, seeds=3)
    run.results  # a pandas DataFrame, a row a tuner and seed
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.layers import resolve_settings
from fedtune.layers import tune_settings as tune_settings

if TYPE_CHECKING:
    from fedtune.data.federated_dataset import FederatedDataset
    from fedtune.report.frames import Run
    from fedtune.runs.comparison import Comparison
    from fedtune.runs.replay import ReplayedStudy
    from fedtune.settings import Settings

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
    from fedtune.runs.prepare import prepare
    from fedtune.runs.run_folder import claim_folder

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
    from fedtune.runs.run_folder import settings_path

    folder = Path(folder)
    where = {name: value for name, value in (("workers", workers), ("executor", executor)) if value is not None}
    settings = resolve_settings(settings_path(folder), where)
    _start_workers_early(settings)
    from fedtune.runs.prepare import prepare

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
    from fedtune.runs.extension import extend_run

    extend_run(Path(folder), num_configs, total_rounds)
    return resume(folder, **keywords)


def replay(folder: str | Path) -> "list[ReplayedStudy]":
    """The studies of a run folder, rebuilt from their journals and checked; nothing is trained or written.

    Raises InputError where a journal and its tuner, or the files of results, disagree.
    """
    from fedtune.runs.replay import replay

    return list(replay(Path(folder)))


def read_run(folder: str | Path) -> "Run":
    """What a finished run folder holds."""
    from fedtune.report.frames import read_run

    return read_run(folder)


def _start_workers_early(settings: "Settings") -> None:
    from fedtune.executors.processes import start_forkserver

    if settings.executor != "serial":
        start_forkserver()  # imports torch over there while we import it here


def _mirrored(
    listener: Callable[[dict[str, Any]], None], storage: str | None, comparison: "Comparison", folder: Path
) -> AbstractContextManager[Callable[[dict[str, Any]], None]]:
    if storage is None:
        return nullcontext(listener)
    from fedtune.report.optuna_mirror import OptunaMirror
    from fedtune.settings import digest

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
