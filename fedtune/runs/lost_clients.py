"""The clients that a run goes on without, because the user said so or because a client took too long.

The settings of the run name them (`lost_clients`). Before a study trains anything without a client, it writes a line
into its journal: the client, and the round of each trial's latest checkpoint. In every later round of a trial, and in
every later evaluation after local training, the client fails. The line alone decides this, so a study that is stopped
again and resumed gives the same results.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from fedtune.errors import InputError
from fedtune.files import replacing
from fedtune.runs.journal import Journal
from fedtune.runs.run_folder import settings_path
from fedtune.runs.trial_store import TrialStore
from fedtune.settings import resolve
from fedtune.settings_text import read_settings, write_settings


class LostClients:
    """The clients that a study goes on without. `client_ids` are the ids of all clients, `lost` those of the run."""

    def __init__(self, client_ids: Sequence[str], lost: Sequence[str], journal: Journal, store: TrialStore) -> None:
        self._client_ids = client_ids
        self._lost = lost
        self._journal = journal
        self._store = store

    def in_round(self, trial: int, server_round: int) -> set[int]:
        """The numbers of the clients that fail in this round of the trial."""
        return {client for client, trained in self._trained.items() if server_round > trained.get(trial, 0)}

    def now(self) -> set[int]:
        """The numbers of the clients that fail in what is computed after all rounds."""
        return set(self._trained)

    @functools.cached_property
    def _trained(self) -> dict[int, dict[int, int]]:
        """For each lost client, the last round of each trial that was trained with it; 0 if the trial is not there.

        The first use writes the lines that the journal lacks.
        """
        trained = {line["client"]: dict(line["trained"]) for line in self._journal.notes("lose")}
        if unnamed := [client for client in trained if client not in self._lost]:
            raise InputError(
                f"lost_clients in the settings must name client {unnamed[0]!r}, as {self._journal.path} does, "
                f"got {list(self._lost)}"
            )
        for client in self._lost:
            if client not in trained:
                trained[client] = self._store.checkpoints()
                self._journal.note("lose", client=client, trained=sorted(trained[client].items()))
        return {self._client_ids.index(client): rounds for client, rounds in trained.items()}


def keep_lost_clients(folder: Path, lost: Sequence[str]) -> None:
    """Writes into the settings of a run that it goes on without these clients. Raises InputError if it is finished."""
    path = settings_path(folder)
    settings = resolve([read_settings(path)])
    if new := [client for client in lost if client not in settings.lost_clients]:
        if (folder / "results.csv").is_file():
            raise InputError(f"a client can be lost only in a run that is not finished, got {folder}")
        longer = settings.model_copy(update={"lost_clients": [*settings.lost_clients, *new]})
        with replacing(path) as temporary:
            temporary.write_text(write_settings(longer), encoding="utf-8", newline="\n")
