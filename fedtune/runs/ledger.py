"""The ledger of a study: its jobs and the rounds that it spent, the failed attempts, the scores, and the best trial.

A study that is trained and a study that is rebuilt from its journal keep the same ledger, so each rule is here once:
- A job is charged to the budget when it is first attempted, and never again.
- A copy of a trial starts at the last round of its parent that was reported. Its scores include its parent's rounds.
- A job that needs more rounds than the budget has left is shortened to these rounds, so that every tuner that has a
  further job spends the whole budget. After an extension, the same job is charged for the rounds that it still lacks.
- The trial of a shortened job is the incumbent only if it has no higher error than the incumbent of the whole jobs
  (`longer_incumbent`).
- An extension raises the budget and the number of configurations.
"""

from dataclasses import replace
from typing import Any

from fedtune.errors import InputError
from fedtune.runs.history import Reading, TrialHistory
from fedtune.runs.results import result_row
from fedtune.settings import ExtensionSettings, Settings
from fedtune.simulation.records import Evaluation
from fedtune.tuning.trial import Extendable, Job, Score, Trial, Tuner, incumbent, longer_incumbent

MOST_ATTEMPTS = 1000  # at one job


class AttemptsFailed(InputError):
    """So many attempts failed that the study can't go on: all attempts at one job, or one at every job."""


class Ledger:
    """The events of a study so far. `personalised` holds the evaluations after local training that were made.

    With `format_3`, the rules of journals of format 3 hold: the score of a copy leaves out its parent's rounds; a job
    that needs more rounds than the budget has left is refused, and the rest of the budget is not spent.
    """

    def __init__(self, settings: Settings, *, format_3: bool = False) -> None:
        self.trials: dict[int, TrialHistory] = {}
        self.personalised: dict[Reading, Evaluation] = {}
        self.incumbents: list[tuple[float, int]] = []  # (virtual time, trial) after each score
        self.started_attempts = 0
        self.failed_attempts = 0
        self.wasted_rounds = 0  # that failed attempts had done
        self._settings = settings
        self._total_rounds = settings.total_rounds
        self._format_3 = format_3
        self._spent = 0  # rounds of all jobs that were attempted
        self._best_of_whole_jobs: Score | None = None
        self._shortened: Score | None = None  # of the last shortened job

    @property
    def best(self) -> Score | None:
        """The score of the incumbent; None before the first score."""
        if self._best_of_whole_jobs is None or self._shortened is None:
            return self._best_of_whole_jobs or self._shortened
        return longer_incumbent(self._best_of_whole_jobs, self._shortened)

    def charge(self, job: Job, attempt: int) -> tuple[Job, TrialHistory] | None:
        """The job, shortened if need be, and the history of its trial; None if the budget has no rounds left for it.

        `attempt` counts the failed attempts at this job before this one. Raises AttemptsFailed after MOST_ATTEMPTS.
        """
        history = self.trials.get(job.trial.number) or self._new_history(job.trial)
        num_rounds = job.rounds - history.reported_rounds
        if attempt == 0:
            left = self._total_rounds - self._spent
            if num_rounds > left:
                if left == 0 or self._format_3:
                    return None
                num_rounds = left
                job = replace(job, rounds=history.reported_rounds + left, shortened=True)
            self._spent += num_rounds
        elif attempt == MOST_ATTEMPTS:
            raise AttemptsFailed(
                f"devices.drop_probability must let every job end, got {self._settings.devices.drop_probability}: "
                f"{attempt:,} attempts at a job of {num_rounds} rounds failed"
            )
        self.trials[job.trial.number] = history
        return job, history

    def score(self, job: Job, time: float) -> float:
        """The score of the job's trial after its last round, a tail mean; it may make the trial the incumbent."""
        history = self.trials[job.trial.number]
        score = history.scores[job.rounds] = history.tail("validation_error")
        scored = Score(job.trial.number, job.rounds, score)
        if job.shortened:
            self._shortened = scored
        else:
            before = self._best_of_whole_jobs
            self._best_of_whole_jobs = scored if before is None else incumbent([scored, before])
        assert self.best is not None
        self.incumbents.append((time, self.best.trial))
        return score

    def extend(self, tuner: Tuner, extension: ExtensionSettings) -> None:
        """Raises the budget and, if the extension says so, the number of configurations that the tuner draws.

        Raises InputError if the tuner can't draw as many.
        """
        self._total_rounds = extension.total_rounds
        if extension.num_configs is not None:
            assert isinstance(tuner, Extendable)
            tuner.raise_num_configs(extension.num_configs)

    def result(self, time: float) -> dict[str, Any]:
        """The row of results.csv without the incumbent's state; `time` is the end of the study in virtual time."""
        assert self.best is not None
        spending = {"total_rounds": self._total_rounds, "charged_rounds": self._spent}
        return {
            "trials": len(self.trials),
            "trial": self.best.trial,
            "max_rounds": self._settings.max_rounds,
            **({} if self._format_3 else spending),  # older runs lack these columns
            "virtual_time": time,
            "dropped_jobs": self.failed_attempts,
            "wasted_rounds": self.wasted_rounds,
            **result_row(self.trials, self.best, self._settings.max_rounds, self.personalised),
        }

    def _new_history(self, trial: Trial) -> TrialHistory:
        if trial.parent is None:
            return TrialHistory(trial)
        parent = self.trials[trial.parent]
        return TrialHistory(trial, parent.reported_rounds, None if self._format_3 else parent)
