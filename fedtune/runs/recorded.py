"""What a run folder itself says about its run: no code that the settings name is needed, so none is imported."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.errors import InputError
from fedtune.hyperparameters import Hyperparameters, fixed_client_values, with_client_values
from fedtune.runs.journal import Journal, JournalEnds, in_torch
from fedtune.settings import Settings
from fedtune.tuning.space import Config, Number, checked_number
from fedtune.tuning.tuners import tuner_kind


def check_places(settings: Settings, folder: Path) -> None:
    """Raises InputError if what a resumed run writes or removes could lie outside its folder.

    A stranger's run folder may have links to somewhere else, or a tuner whose name leads there.
    """
    for name in settings.tuners:
        tuner_kind(name)  # raises UnknownNameError
    studies = [folder / f"{name}-seed{seed}" for name, seed in settings.studies]
    inside = [path for study in studies for path in (study, study / "journal.jsonl", study / "checkpoints")]
    for path in (folder / "figures", *inside):
        if path.is_symlink():
            raise InputError(f"{path} must not be a link, got a link to {path.readlink()}")


def check_begun_with(settings: Settings, folder: Path) -> None:
    """Raises InputError unless every journal in the run folder was begun with these settings.

    It reads the first line of each journal only.
    """
    for (name, seed), journal in zip(settings.studies, _beginnings(settings, folder), strict=True):
        with contextlib.suppress(JournalEnds):  # the study was not begun
            journal.begin(name, seed, settings)


def check_kernel(settings: Settings, folder: Path, kernel: str | None) -> None:
    """Raises InputError unless every study in the run folder was begun with this kernel, or has not begun.

    `kernel` is the digest of the kernel in which clients train now, None if they train in torch.
    """
    for journal in _beginnings(settings, folder, kernel):
        if journal.kernel != kernel:
            raise InputError(
                f"the run must be resumed with the kernel with which it was begun, got kernel {kernel}; "
                f"{journal.path} has kernel {journal.kernel}: {other_kernel_advice(folder)}"
            )


def other_kernel_advice(folder: Path) -> str:
    """The end of a message: what to do if the run in the folder needs a kernel that is not here."""
    return f"install the version of the client program that it was begun with, or, {in_torch(folder / 'settings.toml')}"


def run_format(settings: Settings, folder: Path) -> int:
    """The format of the run's journals. A study that has not begun gets it too, so one rule holds for all studies."""
    return min(journal.format for journal in _beginnings(settings, folder))


def _beginnings(settings: Settings, folder: Path, new_kernel: str | None = None) -> Iterator[Journal]:
    """The journal of each study of the run, of which only the first line was read."""
    for name, seed in settings.studies:
        path = folder / f"{name}-seed{seed}" / "journal.jsonl"
        yield Journal(path, read_only=True, num_lines=1, new_kernel=new_kernel)


def recorded_hyperparameters(settings: Settings, journal: Journal) -> Hyperparameters:
    """The hyperparameters of a study, without the client program that declares them. Call it before the first decision.

    The program's defaults are in the journal: the first trial has a value of every hyperparameter, and only the values
    that are searched differ between trials. A value in the settings goes before the journal's.
    """
    recorded = _first_centre(journal)
    fixed = {
        name: _number(f"client.{name}", value, like=recorded.get(name, value))
        for name, value in fixed_client_values(settings).items()
    }
    client = {**recorded, **fixed}
    hyperparameters = with_client_values(settings, client)
    # If the journal lacks a value that is searched, any value does: the comparison with the journal finds it.
    searched = hyperparameters.space.client
    missing = {name: domain.from_unit(0.5) for name, domain in searched.items() if name not in client}
    return replace(hyperparameters, client=client | missing)


def _first_centre(journal: Journal) -> Config:
    """The centre of the first trial's pool, in the journal's order; empty if no trial was asked for."""
    first = journal.first("ask")
    if first is None:
        return {}
    number, line = first
    centre = {name: value for factor in line["pool"] for name, value in (factor[0] if factor else {}).items()}
    where = f"{journal.path}, line {number}"
    return {name: _number(f"{where}: {name}", value, like=value) for name, value in centre.items()}


def _number(name: str, value: Any, like: Any) -> Number:
    """The value as an int if both values are ints, else as a float. Raises InputError if it is no number."""
    return checked_number(name, value, integer=isinstance(value, int) and isinstance(like, int))
