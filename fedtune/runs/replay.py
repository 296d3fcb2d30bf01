"""Studies rebuilt from their journals alone (thesis, section 3.5.4): nothing is trained, and nothing is written.

No code that the settings name is imported, so the run folder of a stranger can be replayed.

The same study runs again, but its jobs are read from the journal (`JournalledJobs`). Each decision of its tuner must be
the next decision in the journal. Finish times come from the journal's asks; scores are computed again from its rounds.
The rebuilt rows must equal the rows of results.csv, rounds.parquet and trials.parquet, if these files exist. If
results.csv exists, every study must have ended.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.data.formats.tables import read_columns
from fedtune.errors import InputError
from fedtune.hyperparameters import with_client_values
from fedtune.runs.history import PastRounds, TrialHistory, past_personalised
from fedtune.runs.journal import Journal, JournalEnds, same
from fedtune.runs.ledger import AttemptsFailed, Ledger
from fedtune.runs.recorded import recorded_hyperparameters
from fedtune.runs.results import trial_rows
from fedtune.runs.run_folder import settings_path
from fedtune.runs.study import JobAttempt, Study
from fedtune.settings import Settings, resolve
from fedtune.settings_text import read_settings
from fedtune.simulation.records import record_as_row
from fedtune.study_tuners import resolve_tuners, study_tuner
from fedtune.tuning.trial import Job, Score, Trial
from fedtune.tuning.tuner_kind import TunerSettings


@dataclass(frozen=True)
class ReplayedStudy:
    """A study whose journal and rebuilt tuner agree."""

    tuner: str
    seed: int
    jobs: int  # jobs that ended
    trials: int  # trials of the jobs that ended
    rounds: int  # rounds of these trials
    incumbent: Score | None  # None if no job ended
    under_way: int  # jobs that had not ended at the end of the journal
    finished: bool

    def __str__(self) -> str:
        best = self.incumbent
        return (
            f"{self.tuner}-seed{self.seed}: {self.jobs} jobs, {self.trials} trials, {self.rounds} rounds, "
            + (f"incumbent {best.trial} at {best.error:.4f}" if best else "no incumbent")
            + ": as journalled"
            + ("" if self.finished else f"; not finished, {self.under_way} jobs under way")
        )


def replay(folder: Path) -> Iterator[ReplayedStudy]:
    """Each study of a run folder, once it is rebuilt. Raises InputError, one line, at the first difference."""
    settings = resolve([read_settings(settings_path(folder))])
    tuners = resolve_tuners(settings, with_client_values(settings, {}).space)
    results = _rows(folder / "results.csv")
    if results is not None:  # it is written last, when all studies have ended
        for name in ("rounds.parquet", "trials.parquet"):
            if not (folder / name).is_file():
                raise InputError(f"{folder} must have {name} beside its results.csv, got none")
    trials = _rows(folder / "trials.parquet")
    rounds = _rows(folder / "rounds.parquet", sort_by=["trial", "round"])
    for name, seed in settings.studies:
        study = Replay(tuners[name], seed, settings, folder)
        replayed = study.run()
        if results is not None and not replayed.finished:
            raise InputError(
                f"{study.journal.path} must hold the study to its end, as {folder / 'results.csv'} does, "
                f"got {'one that stops before' if study.journal.path.exists() else 'none'}"
            )
        if replayed.finished:
            _compare(folder / "results.csv", study, [study.result_row()], results)
            _compare(folder / "rounds.parquet", study, study.round_rows(), rounds)
            _compare(folder / "trials.parquet", study, trial_rows(name, seed, study.ledger.trials), trials)
        yield replayed


class JournalledJobs:
    """Reads the outcome of each job of a study from its journal. See `fedtune.runs.study.Jobs`."""

    def __init__(self, journal: Journal, ledger: Ledger) -> None:
        self._journal = journal
        self._ledger = ledger
        self._past_rounds = PastRounds(journal)

    def attempt(self, job: Job, number: int, history: TrialHistory, now: float) -> JobAttempt:
        """The attempt in the next line. If that line is no `ask`, `Journal.decide` raises InputError next."""
        line_number, line = self._journal.coming()
        finish_time, failed = line.get("finishes", now), line.get("dropped", False)
        if line["event"] == "ask" and not finish_time >= now:
            raise self._journal.misfit(line_number, f"finishes >= {now}", f"finishes {finish_time}")
        return JobAttempt(job, number, finish_time, failed, history, round_times=[], wasted_rounds=0)

    def start(self, attempt: JobAttempt) -> None:
        """Does nothing: the journal holds what was computed."""

    def ready(self, attempt: JobAttempt) -> bool:
        """True: the journal holds what was computed."""
        return True

    def finish(self, attempt: JobAttempt) -> None:
        """Takes the rounds of the job from the journal. Raises InputError if it lacks one."""
        job, history, trial = attempt.job, attempt.history, attempt.job.trial.number
        self._journal.expect("tell", trial=trial, rung=job.rung, rounds=job.rounds)
        history.records += self._past_rounds.of(trial, history.reported_rounds, job.rounds)

    def reported(self, job: Job, best: Score) -> None:
        """Does nothing: a replay has no checkpoints."""

    def personalise(self, reading: str, trial: Trial, rounds: int) -> Generator[None, None, None]:
        """Checks that the journal holds the evaluation. Raises InputError if the journal continues without it."""
        yield from ()
        if (reading, trial.number, rounds) not in self._ledger.personalised:
            self._journal.coming()  # JournalEnds if the study was stopped here
            raise InputError(
                f"{self._journal.path} must have a line of the personalised errors of trial {trial.number}, got none"
            )


class Replay:
    """One study of a run folder, rebuilt."""

    def __init__(self, tuner: TunerSettings, seed: int, settings: Settings, run: Path) -> None:
        self.name = tuner.name
        self.seed = seed
        self.journal = Journal(run / str(self) / "journal.jsonl", read_only=True)
        self.ledger = Ledger(settings, format_3=self.journal.format == 3)
        self.ledger.personalised = past_personalised(self.journal)
        self.tuner = study_tuner(tuner, seed, recorded_hyperparameters(settings, self.journal))
        self._study = Study(
            tuner,
            seed,
            self.tuner,
            settings,
            self.ledger,
            self.journal,
            JournalledJobs(self.journal, self.ledger),
            lambda event, **fields: None,
        )

    def __str__(self) -> str:
        return f"{self.name}-seed{self.seed}"

    def run(self) -> ReplayedStudy:
        """The study as far as the journal goes. Raises InputError if the journal and the tuner disagree."""
        finished = True
        try:
            for _ in self._study.steps():
                raise AssertionError("a replay waits for nothing")
        except (JournalEnds, AttemptsFailed):
            finished = False
        histories = [history for history in self.ledger.trials.values() if history.scores]
        ended = len(self.ledger.incumbents)
        return ReplayedStudy(
            self.name,
            self.seed,
            jobs=ended,
            trials=len(histories),
            rounds=sum(len(history.records) for history in histories),
            incumbent=self.ledger.best,
            under_way=self.ledger.started_attempts - ended - self.ledger.failed_attempts,
            finished=finished,
        )

    def result_row(self) -> dict[str, Any]:
        """What results.csv must hold for the study. The rounds that failed attempts wasted are not in the journal."""
        row = self.ledger.result(self._study.time)
        del row["wasted_rounds"]
        return row

    def round_rows(self) -> list[dict[str, Any]]:
        """What rounds.parquet must hold for the rounds of every trial, by trial and round."""
        return [
            {"trial": number, **record_as_row(record)}
            for number, history in sorted(self.ledger.trials.items())
            for record in history.records
        ]


def _rows(path: Path, sort_by: Sequence[str] = ()) -> list[dict[Any, Any]] | None:
    """The rows of a file of a finished run, sorted by these columns of numbers; None if there is no such file."""
    if not path.is_file():
        return None
    frame = read_columns(path, numbers=["seed", "trial", *sort_by], texts=["tuner"])
    return (frame.sort_values([*sort_by]) if sort_by else frame).to_dict("records")


def _compare(
    path: Path, study: Replay, expected: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]] | None
) -> None:
    """Raises InputError unless the study's rows of a file hold the expected values."""
    if found is None:
        return
    rows = [row for row in found if (row.get("tuner"), row.get("seed")) == (study.name, study.seed)]
    if len(rows) != len(expected):
        raise InputError(f"{path} must have {len(expected)} rows of {study}, as its journal has it, got {len(rows)}")
    for wanted, row in zip(expected, rows, strict=True):
        for name, value in wanted.items():
            if not same(row.get(name), value):
                raise InputError(
                    f"{path} must have {name} {value} for {study}, trial {wanted['trial']}, as its journal has it, "
                    f"got {row.get(name)}"
                )
