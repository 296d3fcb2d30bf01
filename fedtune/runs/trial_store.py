"""What a study keeps of its trials: the rounds' records in the journal, the state in checkpoints.

A trial's files are `trial-<number>-round-<round>.safetensors`: its latest checkpoint, and the one at the end of its
last told job where that is an older one; none once it will not go on, unless it is the best. So disk use is at most
two checkpoints a live trial, whatever the number of rounds.
"""

from pathlib import Path

from fedtune.errors import InputError
from fedtune.runs import checkpoint
from fedtune.runs.history import past_records
from fedtune.runs.journal import Journal
from fedtune.simulation.federation import Federation
from fedtune.simulation.records import RoundRecord, record_as_json


class TrialStore:
    """Writes rounds and checkpoints as they come, and finds again what a study that was stopped had written."""

    def __init__(self, journal: Journal, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._journal = journal
        self._folder = folder
        self._past_records = past_records(journal)
        self._latest = {line["trial"]: int(line["round"]) for line in journal.notes("checkpoint")}
        self._told: dict[int, int] = {}  # the round at the end of each trial's last told job

    def latest(self, trial: int) -> int:
        """The round of the trial's latest checkpoint; 0 where it has none."""
        return self._latest.get(trial, 0)

    def past_records(self, trial: int, after: int, up_to: int) -> list[RoundRecord]:
        """The trial's records of rounds after + 1 to up_to, written before this study was stopped."""
        known = self._past_records.get(trial, {})
        if missing := [number for number in range(after + 1, up_to + 1) if number not in known]:
            raise InputError(f"{self._journal.path} must have a line of round {missing[0]} of trial {trial}, got none")
        return [known[number] for number in range(after + 1, up_to + 1)]

    def write(self, federation: Federation, record: RoundRecord) -> None:
        """Notes a round, and after an evaluation the federation's state."""
        number = federation.trial.number
        self._journal.note("round", trial=number, record=record_as_json(record))
        if record.evaluation is not None:
            previous = self.latest(number)
            checkpoint.save(self._path(number, record.round), federation.arrays())
            self._journal.note("checkpoint", trial=number, round=record.round)
            self._latest[number] = record.round
            if previous != self._told.get(number):
                self._path(number, previous).unlink(missing_ok=True)

    def inherit(self, parent: Federation, trial: int) -> None:
        """Gives a new trial its parent's state."""
        checkpoint.save(self._path(trial, parent.round), parent.inherited_state())
        self._journal.note("checkpoint", trial=trial, round=parent.round)
        self._latest[trial] = parent.round

    def told(self, trial: int, server_round: int) -> None:
        """The job that ended with this round was told: its state is kept until the next one is."""
        previous, self._told[trial] = self._told.get(trial, 0), server_round
        if previous not in (server_round, self.latest(trial)):
            self._path(trial, previous).unlink(missing_ok=True)

    def restore(self, federation: Federation, server_round: int) -> bool:
        """Puts the federation into the state of its trial's checkpoint of that round; False where there is none.

        Those of all but the incumbent go at a study's end. Raises InputError where it is damaged or another's.
        """
        path = self._path(federation.trial.number, server_round)
        if not path.is_file():
            return False
        arrays = checkpoint.load(path)
        if arrays["round"] != server_round:
            raise InputError(f"checkpoint {path} must be of round {server_round}, got {arrays['round']}")
        federation.restore(arrays)
        return True

    def replace(self, federation: Federation) -> None:
        """Writes a checkpoint anew that was gone, if it is one that is kept."""
        number = federation.trial.number
        if federation.round in (self.latest(number), self._told.get(number)):
            checkpoint.save(self._path(number, federation.round), federation.arrays())

    def remove(self, trial: int) -> None:
        """Removes the checkpoints of a trial that will not go on."""
        for server_round in (self.latest(trial), self._told.get(trial, 0)):
            self._path(trial, server_round).unlink(missing_ok=True)

    def keep_only(self, trial: int) -> None:
        """Removes all other trials' checkpoints, and what a killed process left half written."""
        for path in self._folder.iterdir():
            if not path.match(f"trial-{trial}-round-*.safetensors"):
                path.unlink()

    def _path(self, trial: int, server_round: int) -> Path:
        return self._folder / f"trial-{trial}-round-{server_round}.safetensors"
