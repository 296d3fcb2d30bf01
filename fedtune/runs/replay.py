"""Studies rebuilt from their journals alone (thesis, section 3.5.4): nothing is trained, and nothing is written.

The event loop of a study runs the same tuner again, over jobs that a journal holds. Every ask of the tuner must be the
journal's next decision; when its job ends, the journal says; what the tuner is told, the rounds that it holds say. What
has been rebuilt by the end must be what results.csv, rounds.parquet and trials.parquet hold, where those exist; beside
results.csv every study must have ended.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedtune.errors import InputError
from fedtune.hyperparameters import (
    Hyperparameters,
    resolve_hyperparameters,
    resolve_tuners,
    study_tuner,
    tuner_settings,
)
from fedtune.runs.history import TrialHistory, past_personalised, past_records
from fedtune.runs.journal import FORMAT, Journal, JournalEnds
from fedtune.runs.ledger import extend
from fedtune.runs.results import plan, result_row, trial_rows
from fedtune.runs.run_folder import settings_path
from fedtune.settings import Settings, digest, read_settings, resolve
from fedtune.simulation.event_loop import Attempt, EventLoop, OnDrop
from fedtune.simulation.records import record_as_row
from fedtune.tuning.trial import Job, Score, Trial, incumbent


@dataclass(frozen=True)
class ReplayedStudy:
    """A study of which the journal and the rebuilt tuner tell the same."""

    tuner: str
    seed: int
    jobs: int  # those that ended
    trials: int  # of these jobs
    rounds: int  # of these jobs
    incumbent: Score | None  # None where no job ended
    under_way: int  # jobs that had not ended where the journal stops
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
    """Each study of a run folder, once it is rebuilt. Raises InputError, one line, at the first thing that differs."""
    settings = resolve([read_settings(settings_path(folder))])
    hyperparameters = resolve_hyperparameters(settings)
    resolve_tuners(settings, hyperparameters.space)
    results = _rows(folder / "results.csv", lambda path: pd.read_csv(path, engine="python"))
    if results is not None:  # it is written last, of studies that ended
        for name in ("rounds.parquet", "trials.parquet"):
            if not (folder / name).is_file():
                raise InputError(f"{folder} must have {name} beside its results.csv, got none")
    trials = _rows(folder / "trials.parquet", pd.read_parquet)
    by_round = ["trial", "round"]
    rounds = _rows(folder / "rounds.parquet", lambda path: pd.read_parquet(path).sort_values(by_round))
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for name in settings.tuners:
            study = Replay(name, seed, settings, hyperparameters, folder)
            replayed = study.run()
            if results is not None and not replayed.finished:
                raise InputError(
                    f"{study.journal_path} must hold the study to its end, as {folder / 'results.csv'} does, "
                    f"got {'one that stops before' if study.journal_path.exists() else 'none'}"
                )
            if replayed.finished:
                _compare(folder / "results.csv", study, [study.result_row()], results)
                _compare(folder / "rounds.parquet", study, study.round_rows(), rounds)
                _compare(folder / "trials.parquet", study, trial_rows(name, seed, study.trials), trials)
            yield replayed


class Replay:
    """The workload of jobs that a journal holds."""

    def __init__(self, name: str, seed: int, settings: Settings, hyperparameters: Hyperparameters, run: Path) -> None:
        self.name = name
        self.seed = seed
        self.trials: dict[int, TrialHistory] = {}
        self._settings = settings
        self._run = run
        self._journal = Journal(run / str(self) / "journal.jsonl", read_only=True)
        self._records = past_records(self._journal)
        tuner = tuner_settings(name, settings)
        self.tuner = study_tuner(tuner, seed, hyperparameters)
        on_drop: OnDrop = settings.devices.on_drop if tuner.kind.searches else "retry"
        self._loop = EventLoop(
            self.tuner, self, settings.parallel_trials, on_drop, forgets_jobs=tuner.kind.forgets_jobs
        )
        self._scores: list[Score] = []
        self._started = 0  # jobs
        self._dropped = 0  # attempts
        self._total_rounds = settings.total_rounds
        self._spent = 0  # rounds of all jobs that were started

    def __str__(self) -> str:
        return f"{self.name}-seed{self.seed}"

    @property
    def journal_path(self) -> Path:
        """Where its journal is, or would be."""
        return self._journal.path

    def run(self) -> ReplayedStudy:
        """The study as far as the journal goes. Raises InputError where the journal and the tuner disagree."""
        try:
            _, line = self._next("study", format=FORMAT, tuner=self.name, seed=self.seed)
            self._check_settings(line["settings"])
            self._run_to_end()
            for extension in self._settings.extensions:
                self._next("extend", **extension.model_dump())
                self._total_rounds = extension.total_rounds
                extend(self.tuner, extension)
                self._run_to_end()
        except JournalEnds:
            return self._replayed(finished=False)
        if self._journal.replaying:
            number, line = self._journal.coming()
            raise self._misfit(number, "no more lines", _words(line, "time"))
        return self._replayed(finished=True)

    def _run_to_end(self) -> None:
        for _ in self._loop.run():
            raise AssertionError("what a journal holds is not waited for")
        best = incumbent(self._scores)
        if best is None:  # all jobs were dropped, and the study ended there
            raise JournalEnds
        self._next("end", incumbent=best.trial, time=self._loop.time)

    def start(self, job: Job, number: int, now: float) -> Attempt | None:
        """The job as the journal has it; None where the budget has too few rounds left for it."""
        history = self.trials.get(job.trial.number) or self._new_history(job.trial)
        if number == 0:
            num_rounds = job.rounds - history.told
            if self._spent + num_rounds > self._total_rounds:
                return None
            self._spent += num_rounds
        self.trials[job.trial.number] = history
        line_number, line = self._next(
            "ask",
            **{"trial": job.trial.number, "rung": job.rung, "rounds": job.rounds},
            **{"attempt": number, "started": now},
            **plan(job.trial),
        )
        self._started += 1
        if not line["finishes"] >= now:
            raise self._misfit(line_number, f"finishes >= {now}", f"finishes {line['finishes']}")
        return Attempt(job, number, line["finishes"], line["dropped"])

    def ready(self, attempt: Attempt) -> bool:
        """Always."""
        return True

    def deliver(self, attempt: Attempt) -> float:
        """The score of the job's trial, from its rounds in the journal."""
        job, trial = attempt.job, attempt.job.trial.number
        line_number, line = self._next("tell", trial=trial, rung=job.rung, rounds=job.rounds, time=self._loop.time)
        history, known = self.trials[trial], self._records.get(trial, {})
        for server_round in range(history.told + 1, job.rounds + 1):
            if server_round not in known:
                raise self._misfit(line_number, f"a line of round {server_round} of trial {trial} before it", "none")
            history.records.append(known[server_round])
        score = history.scores[job.rounds] = history.tail("validation_error")
        if json.dumps(line["score"]) != json.dumps(score):
            raise self._misfit(line_number, f"score {score}, as the trial's rounds have it,", f"score {line['score']}")
        self._scores.append(Score(trial, job.rounds, score))
        return score

    def drop(self, attempt: Attempt, then: OnDrop) -> None:
        """Finds that the journal has it so."""
        job = attempt.job
        self._dropped += 1
        self._next("drop", trial=job.trial.number, rung=job.rung, rounds=job.rounds, time=self._loop.time, then=then)

    def result_row(self) -> dict[str, Any]:
        """What results.csv must say of the tuner."""
        best = incumbent(self._scores)
        assert best is not None
        personalised = past_personalised(self._journal)
        if ("sampled", best.trial, best.rounds) not in personalised:
            raise InputError(
                f"{self._journal.path} must have a line of the personalised errors of trial {best.trial}, got none"
            )
        return {
            **{"trials": len(self.trials), "trial": best.trial, "max_rounds": self._settings.max_rounds},
            **{"virtual_time": self._loop.time, "dropped_jobs": self._dropped},
            **result_row(self.trials, best, self._settings.max_rounds, personalised),
        }

    def round_rows(self) -> list[dict[str, Any]]:
        """What rounds.parquet must say of every trial's rounds, by trial and round."""
        return [
            {"trial": number, **record_as_row(record)}
            for number, history in sorted(self.trials.items())
            for record in history.records
        ]

    def _new_history(self, trial: Trial) -> TrialHistory:
        return TrialHistory(trial, start=0 if trial.parent is None else self.trials[trial.parent].told)

    def _next(self, event: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        """The journal's next decision after its line's number; it must be of this event and have these fields."""
        number, line = self._journal.coming()
        expected = {"event": event, **fields}
        found = dict(_leaves({name: line.get(name) for name in expected}))
        wanted = dict(_leaves(expected))
        for name in {**wanted, **found}:
            if json.dumps(wanted.get(name)) != json.dumps(found.get(name)):
                raise self._misfit(number, _words(wanted, name), _words(found, name))
        self._journal.decide(**line)
        return number, line

    def _misfit(self, line_number: int, expected: str, found: str) -> InputError:
        path = self._journal.path
        return InputError(f"{path}, line {line_number}, does not fit the tuner: expected {expected}, got {found}")

    def _check_settings(self, journalled: str) -> None:
        if digest(self._settings) != journalled:
            raise InputError(
                f"{self._run / 'settings.toml'} must hold the settings of {self._journal.path} (digest {journalled}), "
                f"got other ones (digest {digest(self._settings)}): one of the two was edited"
            )

    def _replayed(self, *, finished: bool) -> ReplayedStudy:
        told = [history for history in self.trials.values() if history.scores]
        return ReplayedStudy(
            self.name,
            self.seed,
            jobs=len(self._scores),
            trials=len(told),
            rounds=sum(len(history.records) for history in told),
            incumbent=incumbent(self._scores),
            under_way=self._started - len(self._scores) - self._dropped,
            finished=finished,
        )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All that a value from JSON holds, by dotted name."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _words(line: Mapping[str, Any], name: str) -> str:
    """What decision this is, with the field of that name: "ask, trial 3, rung 1, rounds 3, started 2.0"."""
    shown = [each for each in dict.fromkeys(("trial", "rung", "rounds", name)) if each != "event" and each in line]
    return ", ".join([str(line["event"]), *(f"{each} {line[each]}" for each in shown if line[each] is not None)])


def _rows(path: Path, read: Callable[[Path], pd.DataFrame]) -> list[dict[Any, Any]] | None:
    """The rows of a file of a finished run; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return read(path).to_dict("records")
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _compare(
    path: Path, study: Replay, expected: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]] | None
) -> None:
    """Raises InputError unless a file's rows of the study hold what is expected of them."""
    if found is None:
        return
    rows = [row for row in found if (row.get("tuner"), row.get("seed")) == (study.name, study.seed)]
    if len(rows) != len(expected):
        raise InputError(f"{path} must have {len(expected)} rows of {study}, as its journal has it, got {len(rows)}")
    for wanted, row in zip(expected, rows, strict=True):
        for name, value in wanted.items():
            if json.dumps(row.get(name)) != json.dumps(value):
                raise InputError(
                    f"{path} must have {name} {value} for {study}, trial {wanted['trial']}, as its journal has it, "
                    f"got {row.get(name)}"
                )
