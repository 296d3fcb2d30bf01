"""A trial so far: its rounds, their virtual times, and the scores that were reported to the tuner."""

import math
from dataclasses import dataclass, field

from fedtune.errors import InputError
from fedtune.runs.journal import Journal
from fedtune.simulation.evaluation import tail_mean
from fedtune.simulation.records import Evaluation, RoundRecord, record_from_json
from fedtune.tuning.trial import Trial

# A personalised evaluation: its kind (at_max_rounds, sampled or argmax), the trial's number, and the trial's round.
Reading = tuple[str, int, int]


@dataclass
class TrialHistory:
    """A trial so far: its rounds, the virtual times at which they ended, and by round the score that was reported."""

    trial: Trial
    start: int = 0  # the round at which it took over its parent's state
    parent: "TrialHistory | None" = None  # whose evaluations up to `start` count as evaluations of this trial
    records: list[RoundRecord] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def reported_rounds(self) -> int:
        """The round at the end of the trial's last job that was reported to the tuner."""
        return max(self.scores, default=self.start)

    def tail(self, error: str, up_to: int | None = None) -> float:
        """The tail mean of a field of the evaluations up to the round `up_to`; None means up to the last round.

        A copy of a trial is judged over as many rounds as every other trial: its parent's rounds belong to its tail.
        """
        evaluations = self._evaluations(up_to)
        return tail_mean(list(evaluations), [getattr(evaluation, error) for evaluation in evaluations.values()])

    def last_test_error(self, up_to: int | None = None) -> float:
        """The test error at the last evaluation up to the round `up_to`; NaN if there is no evaluation yet."""
        evaluations = list(self._evaluations(up_to).values())
        return evaluations[-1].test_error if evaluations else float("nan")

    def _evaluations(self, up_to: int | None) -> dict[int, Evaluation]:
        """By round, ascending; up to `start` the evaluations of the parent, and of the parent's parents before it."""
        evaluations: dict[int, Evaluation] = {}
        history: TrialHistory | None = self
        limit = math.inf if up_to is None else up_to
        while history is not None:
            evaluations |= {
                record.round: record.evaluation
                for record in history.records
                if record.evaluation is not None and record.round <= limit
            }
            limit = min(limit, history.start)
            history = history.parent
        return dict(sorted(evaluations.items()))


class PastRounds:
    """The rounds that a journal held when it was opened. If a round was trained twice, the later record counts."""

    def __init__(self, journal: Journal) -> None:
        self._path = journal.path
        self._records = {
            (line["trial"], line["record"]["round"]): record_from_json(line["record"])
            for line in journal.notes("round")
        }

    def of(self, trial: int, after: int, up_to: int) -> list[RoundRecord]:
        """The trial's records of rounds after + 1 to up_to. Raises InputError if one is missing."""
        numbers = range(after + 1, up_to + 1)
        for number in numbers:
            if (trial, number) not in self._records:
                raise InputError(f"{self._path} must have a line of round {number} of trial {trial}, got none")
        return [self._records[trial, number] for number in numbers]


def past_personalised(journal: Journal) -> dict[Reading, Evaluation]:
    """The personalised evaluations that a journal holds."""
    return {
        (line["reading"], line["trial"], line["round"]): Evaluation(*line["evaluation"])
        for line in journal.notes("personalised")
    }
