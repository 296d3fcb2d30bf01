"""A federated-learning simulator with hyperparameter tuning built in: FedEx beside ASHA, on Flower.

The functions here do what the commands of the same names do:

    run = fedtune.compare("mnist", tuners=["manual", "asha", "fedex"], max_rounds=27, total_rounds=135, seeds=3)
    run.results  # a pandas DataFrame, a row for each tuner and seed

All that users need is in `__all__`. Torch, Flower and pandas are imported when they are first needed.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import InputError, RunStopped
from fedtune.events import Listener
from fedtune.layers import compare_settings, resolve_settings, tune_settings

if TYPE_CHECKING:
    from fedtune.data.federated_dataset import FederatedDataset
    from fedtune.report.frames import Run
    from fedtune.runs.comparison import Comparison
    from fedtune.runs.replay import ReplayedStudy
    from fedtune.search_space import SpaceRow
    from fedtune.settings import Settings

__all__ = [
    "FederatedDataset",
    "InputError",
    "ReplayedStudy",
    "Run",
    "RunStopped",
    "Settings",
    "SpaceRow",
    "__version__",
    "compare",
    "compare_settings",
    "extend",
    "load",
    "new_folder",
    "read_run",
    "replay",
    "resolve_settings",
    "resume",
    "run",
    "space",
    "train",
    "tune",
    "tune_settings",
]

__version__: str

TYPES = {
    "FederatedDataset": "fedtune.data.federated_dataset",
    "ReplayedStudy": "fedtune.runs.replay",
    "Run": "fedtune.report.frames",
    "Settings": "fedtune.settings",
    "SpaceRow": "fedtune.search_space",
}


def __getattr__(name: str) -> Any:
    """The version or one of TYPES, found when it is first asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("fedtune")
    if name in TYPES:
        from importlib import import_module

        return getattr(import_module(TYPES[name]), name)
    raise AttributeError(f"module 'fedtune' has no attribute {name!r}")


def load(name: str, **options: Any) -> "FederatedDataset":
    """The data set of that name, or the one that `file.py:function` makes.

    `options` are the other keys of its settings table `[data]`:

        fedtune.load("digits", num_clients=10)
    """
    from fedtune.plugins import load_dataset

    return load_dataset({"name": name, **options})


def train(
    what: str | Path,
    rounds: int | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    listener: Listener = lambda event: None,
    optuna: str | None = None,
    **settings: Any,
) -> "Run":
    """The run of one federation under the fixed `[client]` and `[server]` values, for `rounds` rounds.

    The other keywords are as in `compare`:

        fedtune.train("digits", rounds=5, client={"learning_rate": 0.1}, out="runs/first")
    """
    budget = {} if rounds is None else {"max_rounds": rounds, "total_rounds": rounds}
    resolved = resolve_settings(what, {**budget, **settings, "tuners": ["manual"]})
    return run(resolved, out=out, force=force, listener=listener, optuna=optuna)


def tune(
    what: str | Path,
    tuner: str = "asha",
    num_configs: int | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    listener: Listener = lambda event: None,
    optuna: str | None = None,
    **settings: Any,
) -> "Run":
    """The run of one tuner, which draws `num_configs` configurations.

    `tune_settings` says which budget that implies. The other keywords are as in `compare`:

        fedtune.tune("digits", "asha", num_configs=9, max_rounds=9)
    """
    resolved = tune_settings(what, tuner, num_configs, settings)
    return run(resolved, out=out, force=force, listener=listener, optuna=optuna)


def compare(
    what: str | Path,
    *,
    out: str | Path | None = None,
    force: bool = False,
    listener: Listener = lambda event: None,
    optuna: str | None = None,
    **settings: Any,
) -> "Run":
    """The run of several tuners at an equal budget.

    `what` names a data set or a settings file, whose settings `settings` override. `out` is the run folder; None makes
    a new one under runs/. `force` overwrites an older run in `out`. `listener` is called with every event. `optuna` is
    the URL of an Optuna storage that also shows the trials. Every search tries the fixed values too
    (`compare_settings`):

        fedtune.compare("digits", tuners=["manual", "asha"], max_rounds=9, total_rounds=27, out="runs/compared")
    """
    resolved = compare_settings(what, settings)
    return run(resolved, out=out, force=force, listener=listener, optuna=optuna)


def run(
    settings: "Settings",
    *,
    out: str | Path | None,
    force: bool,
    listener: Listener,
    optuna: str | None = None,
) -> "Run":
    """The run that resolved settings describe, with its figures drawn; the keywords are as in `compare`."""
    _start_workers_early(settings)
    from fedtune.runs.prepare import prepare
    from fedtune.runs.run_folder import claim_folder

    comparison = prepare(settings)
    folder = Path(out) if out is not None else new_folder(settings)
    with _mirrored(listener, optuna, comparison, folder) as listener:
        claim_folder(folder, comparison.settings, force=force)
        comparison.run(folder, listener)
    return _draw(folder)


def resume(
    folder: str | Path,
    *,
    workers: int | None = None,
    executor: str | None = None,
    repair: bool = False,
    lose_clients: Sequence[str] = (),
    listener: Listener = lambda event: None,
    optuna: str | None = None,
) -> "Run":
    """The run in a folder, resumed and brought to its end: bit for bit as if it had not been stopped.

    `workers` and `executor` override the settings of the run. `repair` cuts journals that a power cut damaged at their
    last good line; a warning says what was cut. From here on the run goes on without the clients whose ids are in
    `lose_clients`: they fail in every round after a trial's latest checkpoint, which changes the results. The other
    keywords are as in `compare`:

        fedtune.resume("runs/compared")
    """
    from fedtune.runs.recorded import check_begun_with, check_places

    folder = Path(folder)
    # The run folder's settings are complete. Nothing that they name is imported before the journals confirm them.
    settings = _settings_of(folder, workers, executor)
    check_places(settings, folder)
    if repair:
        from fedtune.runs.repair import repair_run

        for cut in repair_run(folder, settings):
            listener({"event": "warning", "message": cut})
    check_begun_with(settings, folder)
    if new := [client for client in dict.fromkeys(lose_clients) if client not in settings.lost_clients]:
        settings = settings.model_copy(update={"lost_clients": [*settings.lost_clients, *new]})
    _start_workers_early(settings)
    from fedtune.runs.prepare import prepare_again

    comparison = prepare_again(settings, folder)
    with _mirrored(listener, optuna, comparison, folder) as listener:
        comparison.run(folder, listener)
    return _draw(folder)


def extend(
    folder: str | Path,
    *,
    num_configs: int | None = None,
    total_rounds: int | None = None,
    workers: int | None = None,
    executor: str | None = None,
    **keywords: Any,
) -> "Run":
    """The finished run in a folder, extended: each study draws up to `num_configs` configurations in all.

    `total_rounds` is each study's new budget; None means the most that so many configurations can use. The other
    keywords are as in `resume`:

        fedtune.extend("runs/search", num_configs=40)
    """
    from fedtune.runs.extension import extend_run

    folder = Path(folder)
    settings = _settings_of(folder, workers, executor)  # raises InputError before anything is changed
    if settings.engine == "compiled":
        _check_kernel(settings, folder)
    extend_run(folder, num_configs, total_rounds)
    return resume(folder, workers=workers, executor=executor, **keywords)


def replay(folder: str | Path) -> "list[ReplayedStudy]":
    """The studies of a run folder, rebuilt from their journals and checked; nothing is trained or written.

    No code that the settings name is imported. Raises InputError if a journal does not agree with its tuner or with the
    files of results:

        [study.incumbent for study in fedtune.replay("runs/compared")]
    """
    from fedtune.runs.replay import replay

    return list(replay(Path(folder)))


def read_run(folder: str | Path) -> "Run":
    """The settings, results, trials and rounds of a finished run:

    fedtune.read_run("runs/compared").results["test_error"]
    """
    from fedtune.report.frames import read_run

    return read_run(folder)


def space(what: str | Path, **settings: Any) -> "list[SpaceRow]":
    """What a run would search, what is fixed, and where each came from; the arguments are as in `compare`.

    [row.name for row in fedtune.space("digits", client={"momentum": 0.9}) if row.domain]
    """
    from fedtune.layers import layers_of
    from fedtune.search_space import space_rows

    return space_rows(layers_of(what, [settings]))


def new_folder(settings: "Settings") -> Path:
    """The folder of a run for which the user names no folder: under runs/, by data set and time."""
    from datetime import datetime

    name = Path(settings.data["name"].partition(":")[0]).stem
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _settings_of(folder: Path, workers: int | None, executor: str | None) -> "Settings":
    """The settings of the run in a folder; `workers` and `executor` override them unless they are None."""
    from fedtune.runs.run_folder import settings_path
    from fedtune.settings import resolve
    from fedtune.settings_text import read_settings

    where = {name: value for name, value in (("workers", workers), ("executor", executor)) if value is not None}
    return resolve([read_settings(settings_path(folder)), where])


def _check_kernel(settings: "Settings", folder: Path) -> None:
    """Raises InputError unless the run in a folder can go on in the kernel in which its clients trained."""
    from fedtune.runs.recorded import check_begun_with, check_kernel, check_places

    check_places(settings, folder)
    check_begun_with(settings, folder)
    from fedtune.runs.prepare import prepare_again

    check_kernel(settings, folder, prepare_again(settings, folder).engine.kernel)


def _start_workers_early(settings: "Settings") -> None:
    from fedtune.operating_system import has_workers

    if settings.executor != "serial" and has_workers():
        from fedtune.executors.processes import start_forkserver

        start_forkserver()  # it imports torch while this process imports torch


def _mirrored(
    listener: Listener, storage: str | None, comparison: "Comparison", folder: Path
) -> AbstractContextManager[Listener]:
    """The listener, which also writes the trials into an Optuna storage if one is given."""
    if storage is None:
        return nullcontext(listener)
    from fedtune.report.optuna_mirror import OptunaMirror
    from fedtune.settings import digest

    settings = comparison.settings
    decided_by = f"{digest(settings)}, {settings.total_rounds} rounds"
    return OptunaMirror(storage, folder.resolve().name, decided_by, comparison.hyperparameters.space, listener)


def _draw(folder: Path) -> "Run":
    """The finished run, with its figures drawn into its folder."""
    from fedtune.report.plots import plot_entropy, plot_incumbents

    finished = read_run(folder)
    plot_incumbents(finished, folder / "figures" / "incumbents.png")
    plot_entropy(finished, folder / "figures" / "entropy.png")
    return finished
