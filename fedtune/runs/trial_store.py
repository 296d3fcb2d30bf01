"""Keeps a study's trials on disk: records of rounds in the journal, the state of federations in checkpoints.

A trial's files are `trial-<number>-round-<round>.safetensors`. A checkpoint is written at the end of a job. Within a
job it is written after an evaluation, but at most once in SECONDS_BETWEEN seconds: to bring it to the disk can take
longer than a round of a small model.

The store keeps a trial's latest checkpoint. It also keeps the checkpoint at the end of the trial's last reported job,
if that checkpoint is older. Finished trials, and trials that the tuner gave up, keep no checkpoint, except the best
trial. So a live trial takes the disk space of two checkpoints at most, whatever the number of rounds.

A checkpoint is on the disk before its line is in the journal, and all lines are on the disk before a checkpoint is
removed. So after a power cut each checkpoint is there that the journal's lines still need.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedtune.errors import InputError
from fedtune.files import make_folder
from fedtune.runs import checkpoint
from fedtune.runs.history import PastRounds
from fedtune.runs.journal import Journal
from fedtune.simulation.records import RoundRecord, record_as_json

SECONDS_BETWEEN = 1.0  # between two checkpoints of a trial within a job


class TrialStore:
    """Writes rounds and checkpoints as they come, and reads what a study wrote before it was stopped.

    Files that a killed process left behind are removed: checkpoints that a later one has replaced, checkpoints that are
    not in the journal, and files that are half written.
    """

    def __init__(self, journal: Journal, folder: Path) -> None:
        make_folder(folder, exist_ok=True)
        self._journal = journal
        self._folder = folder
        self.past_rounds = PastRounds(journal)
        self._latest = {line["trial"]: int(line["round"]) for line in journal.notes("checkpoint")}
        self._noted = dict(self._latest)  # also of trials whose checkpoints were removed
        self._saved_at: dict[int, float] = {}  # the real time of each trial's latest checkpoint
        self._reported: dict[int, int] = {}  # the round at the end of each trial's last reported job
        reported = {line["trial"]: int(line["rounds"]) for line in journal.decisions("tell")}
        self._keep({*self._latest.items(), *reported.items()})

    def latest(self, trial: int) -> int:
        """The round of the trial's latest checkpoint; 0 if it has none."""
        return self._latest.get(trial, 0)

    def due(self, trial: int) -> bool:
        """Whether the trial's latest checkpoint is so old that another one is worth its time."""
        return time.monotonic() >= self._saved_at.get(trial, -math.inf) + SECONDS_BETWEEN

    def checkpoints(self) -> dict[int, int]:
        """The round of each trial's latest checkpoint, by trial, also of checkpoints that were removed since."""
        return dict(self._noted)

    def write(self, trial: int, record: RoundRecord, arrays: Mapping[str, np.ndarray] | None) -> None:
        """Notes a round; with the arrays of the federation's state, writes a checkpoint of that round."""
        self._journal.note("round", trial=trial, record=record_as_json(record))
        if arrays is not None:
            previous = self.latest(trial)
            self._save(trial, record.round, arrays)
            if previous not in (0, self._reported.get(trial)):
                self._journal.sync()
                self._path(trial, previous).unlink(missing_ok=True)

    def inherit(self, trial: int, server_round: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Gives a new trial the state that its parent had after a round."""
        self._save(trial, server_round, arrays)

    def report(self, trial: int, server_round: int) -> None:
        """Keeps the state at this round, the last one of a reported job, until the trial's next job is reported."""
        previous, self._reported[trial] = self._reported.get(trial, 0), server_round
        if previous not in (server_round, self.latest(trial)):
            self._path(trial, previous).unlink(missing_ok=True)

    def load(self, trial: int, server_round: int) -> dict[str, np.ndarray] | None:
        """The arrays of the trial's checkpoint of that round; None if there is none.

        Raises InputError if the checkpoint is damaged, or belongs to another round.
        """
        path = self._path(trial, server_round)
        if not path.is_file():
            return None
        arrays = checkpoint.load(path)
        if arrays["round"] != server_round:
            raise InputError(f"checkpoint {path} must be of round {server_round}, got {arrays['round']}")
        return arrays

    def replace(self, trial: int, server_round: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a lost checkpoint again, if the store still needs it."""
        if server_round in (self.latest(trial), self._reported.get(trial)):
            checkpoint.save(self._path(trial, server_round), arrays)

    def remove(self, trial: int) -> None:
        """Removes the checkpoints of a trial that will not be trained on; then the store needs none of them."""
        for server_round in (self._latest.pop(trial, 0), self._reported.pop(trial, 0)):
            self._path(trial, server_round).unlink(missing_ok=True)

    def keep_only(self, trial: int, server_round: int) -> None:
        """Removes all checkpoints but the trial's checkpoints of that round and of its latest round."""
        self._keep({(trial, self.latest(trial)), (trial, server_round)})

    def _keep(self, states: set[tuple[int, int]]) -> None:
        """Removes all files of checkpoints, whole or not, except the checkpoints of these trials and rounds."""
        kept = {self._path(trial, server_round) for trial, server_round in states}
        for path in self._folder.glob("trial-*-round-*.safetensors*"):
            if path not in kept:
                path.unlink()

    def _save(self, trial: int, server_round: int, arrays: Mapping[str, np.ndarray]) -> None:
        checkpoint.save(self._path(trial, server_round), arrays)
        self._journal.note("checkpoint", trial=trial, round=server_round)
        self._latest[trial] = self._noted[trial] = server_round
        self._saved_at[trial] = time.monotonic()

    def _path(self, trial: int, server_round: int) -> Path:
        return self._folder / f"trial-{trial}-round-{server_round}.safetensors"
