"""More of a finished run: its studies go on where they ended, with more configurations or a larger budget.

Thesis, section 3.5.4: a bracket that is finished can be asked for more configurations.
"""

from pathlib import Path

from fedtune.errors import InputError
from fedtune.hyperparameters import resolve_hyperparameters
from fedtune.runs.ledger import extend
from fedtune.runs.replay import Replay
from fedtune.runs.run_folder import locked, replacing, settings_path
from fedtune.settings import ExtensionSettings, Settings, read_settings, resolve, write_settings
from fedtune.tuning.tuners import tuner_kind


def extend_run(folder: Path, num_configs: int | None, total_rounds: int | None) -> None:
    """Writes an extension into a run's settings, so that `fedtune.resume` goes on.

    A `total_rounds` of None is what `num_configs` configurations can use at most. The results of before are removed,
    for the journals hold them. Raises InputError, and leaves all as it is, unless every study has ended and its tuner
    can be asked for more.
    """
    path = settings_path(folder)
    with locked(folder):
        settings = resolve([read_settings(path)])
        if num_configs is None and total_rounds is None:
            raise InputError("--extend needs --num-configs, --total-rounds or both, got neither")
        before = settings.last_total_rounds
        if total_rounds is None:
            assert num_configs is not None
            total_rounds = max(before, num_configs * settings.max_rounds)
        elif total_rounds < before or (num_configs is None and total_rounds == before):
            raise InputError(f"total_rounds must be more than the {before} that there were, got {total_rounds}")
        tables = settings.model_dump(exclude_none=True)
        tables["extensions"].append(
            {"total_rounds": total_rounds} | ({} if num_configs is None else {"num_configs": num_configs})
        )
        longer = resolve([tables])
        for seed in range(settings.seed, settings.seed + settings.seeds):
            for name in settings.tuners:
                _check(name, seed, settings, longer.extensions[-1], folder)
        with replacing(path) as longer_path:
            longer_path.write_text(write_settings(longer))
            for name in ("results.csv", "rounds.parquet", "trials.parquet", "timings.csv"):
                (folder / name).unlink(missing_ok=True)


def _check(name: str, seed: int, settings: Settings, extension: ExtensionSettings, folder: Path) -> None:
    """Raises InputError unless the study has ended and its tuner, rebuilt from the journal, can be extended."""
    study = Replay(name, seed, settings, resolve_hyperparameters(settings), folder)
    if not tuner_kind(name).extendable:
        raise InputError(f"only studies of random, asha, async_hyperband and their like can be extended, got {name}")
    if not study.run().finished:
        raise InputError(f"run must be finished (`fedtune resume {folder}`), got {study} that is not")
    extend(study.tuner, extension)
