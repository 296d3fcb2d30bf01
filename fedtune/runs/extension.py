"""The extension of a finished run: each study resumes where it ended, with more configurations or a larger budget.

Thesis, section 3.5.4: a bracket that is finished can be asked for more configurations.
"""

from pathlib import Path

from fedtune.errors import InputError
from fedtune.files import replacing
from fedtune.operating_system import sync
from fedtune.runs.replay import Replay
from fedtune.runs.result_files import FILES
from fedtune.runs.run_folder import locked, settings_path
from fedtune.settings import ExtensionSettings, Settings, resolve
from fedtune.settings_text import read_settings, write_settings
from fedtune.study_tuners import tuner_settings


def extend_run(folder: Path, num_configs: int | None, total_rounds: int | None) -> None:
    """Writes an extension into the settings of a run, so that `fedtune.resume` runs it.

    If `total_rounds` is None, the budget is num_configs × max_rounds, but at least the present budget. The results so
    far are removed; the journals hold them. Raises InputError, and changes nothing, unless every study has ended and
    its tuner can be extended.
    """
    path = settings_path(folder)
    with locked(folder):
        settings = resolve([read_settings(path)])
        longer = _extended(settings, num_configs, total_rounds)
        for name, seed in settings.studies:
            _check(name, seed, settings, longer.extensions[-1], folder)
        with replacing(path) as longer_path:
            longer_path.write_text(write_settings(longer), encoding="utf-8", newline="\n")
            for name in reversed(FILES):  # results.csv first: without it the run counts as unfinished
                (folder / name).unlink(missing_ok=True)
            sync(folder)  # after a power cut the longer run must not seem to be finished


def _extended(settings: Settings, num_configs: int | None, total_rounds: int | None) -> Settings:
    """The settings with one more extension."""
    if num_configs is None and total_rounds is None:
        raise InputError("extend needs --num-configs, --total-rounds or both, got neither")
    before = settings.last_total_rounds
    if total_rounds is None:
        assert num_configs is not None
        total_rounds = max(before, num_configs * settings.max_rounds)
    elif total_rounds < before or (num_configs is None and total_rounds == before):
        raise InputError(f"total_rounds must be more than the present budget, {before}, got {total_rounds}")
    extension = {"total_rounds": total_rounds}
    if num_configs is not None:
        extension["num_configs"] = num_configs
    tables = settings.model_dump(exclude_none=True)
    tables["extensions"].append(extension)
    return resolve([tables])


def _check(name: str, seed: int, settings: Settings, extension: ExtensionSettings, folder: Path) -> None:
    """Raises InputError unless the study has ended and its tuner, rebuilt from the journal, can be extended."""
    tuner = tuner_settings(name, settings)
    if not tuner.kind.extendable:
        raise InputError(f"only random, asha and async_hyperband, with or without +fedex, can be extended, got {name}")
    study = Replay(tuner, seed, settings, folder)
    if not study.run().finished:
        raise InputError(f"run must be finished (`fedtune resume {folder}`), got the unfinished study {study}")
    study.ledger.extend(study.tuner, extension)
