"""The ledger of a study: its jobs and the rounds that it spent, the failed attempts, the scores, and the best trial.

A study that is trained and a study that is rebuilt from its journal keep the same ledger, so each rule is here once:
- A job is charged to the budget when it is first attempted, and never again.
- A copy of a trial starts at the last round of its parent that was reported. Its scores include its parent's rounds.
- An extension raises the budget and the number of configurations.
"""

from typing import Any

from fedtune.errors import InputError
from fedtune.runs.history import Reading, TrialHistory
from fedtune.runs.results import result_row
from fedtune.settings import ExtensionSettings, Settings
from fedtune.simulation.records import Evaluation
from fedtune.tuning.trial import Extendable, Job, Score, Trial, Tuner, incumbent

MOST_ATTEMPTS = 1000  # at one job


class AttemptsFailed(InputError):
    """So many attempts failed that the study can't go on: all attempts at one job, or one at every job."""


class Ledger:
    """The events of a study so far. `personalised` holds the evaluations after local training that were made.

    Without `scores_copies_by_parents`, the score of a copy leaves out its parent's rounds. That was the rule of older
    journals.
    """

    def __init__(self, settings: Settings, *, scores_copies_by_parents: bool = True) -> None:
        self.trials: dict[int, TrialHistory] = {}
        self.personalised: dict[Reading, Evaluation] = {}
        self.best: Score | None = None  # of the incumbent; None before the first score
        self.incumbents: list[tuple[float, int]] = []  # (virtual time, trial) after each score
        self.started_attempts = 0
        self.failed_attempts = 0
        self.wasted_rounds = 0  # that failed attempts had done
        self._settings = settings
        self._scores_copies_by_parents = scores_copies_by_parents
        self._total_rounds = settings.total_rounds
        self._spent = 0  # rounds of all jobs that were attempted

    def charge(self, job: Job, attempt: int) -> TrialHistory | None:
        """The history of the job's trial, with the job charged; None if the budget has too few rounds left for it.

        `attempt` counts the failed attempts at this job before this one. Raises AttemptsFailed after MOST_ATTEMPTS.
        """
        history = self.trials.get(job.trial.number) or self._new_history(job.trial)
        num_rounds = job.rounds - history.reported_rounds
        if attempt == 0:
            if self._spent + num_rounds > self._total_rounds:
                return None
            self._spent += num_rounds
        elif attempt == MOST_ATTEMPTS:
            raise AttemptsFailed(
                f"devices.drop_probability must let every job end, got {self._settings.devices.drop_probability}: "
                f"{attempt:,} attempts at a job of {num_rounds} rounds failed"
            )
        self.trials[job.trial.number] = history
        return history

    def score(self, job: Job, time: float) -> float:
        """The score of the job's trial after its last round, a tail mean; it may make the trial the incumbent."""
        history = self.trials[job.trial.number]
        score = history.scores[job.rounds] = history.tail("validation_error")
        candidates = [Score(job.trial.number, job.rounds, score)]
        if self.best is not None:
            candidates.append(self.best)
        self.best = incumbent(candidates)
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
        return {
            "trials": len(self.trials),
            "trial": self.best.trial,
            "max_rounds": self._settings.max_rounds,
            "virtual_time": time,
            "dropped_jobs": self.failed_attempts,
            "wasted_rounds": self.wasted_rounds,
            **result_row(self.trials, self.best, self._settings.max_rounds, self.personalised),
        }

    def _new_history(self, trial: Trial) -> TrialHistory:
        if trial.parent is None:
            return TrialHistory(trial)
        parent = self.trials[trial.parent]
        return TrialHistory(trial, parent.reported_rounds, parent if self._scores_copies_by_parents else None)
