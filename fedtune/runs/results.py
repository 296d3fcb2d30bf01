"""The rows of a finished study in rounds.parquet, trials.parquet and results.csv."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.runs.history import Reading, TrialHistory
from fedtune.runs.journal_lines import trial_as_json
from fedtune.simulation.records import Evaluation, record_as_row, totals
from fedtune.tuning.trial import Score, rank_key


@dataclass(frozen=True)
class StudyResult:
    """A study's rows of the three files."""

    rounds: list[dict[str, Any]]
    trials: list[dict[str, Any]]
    result: dict[str, Any]


def round_rows(
    tuner: str,
    seed: int,
    trials: Mapping[int, TrialHistory],
    incumbents: Sequence[tuple[float, int]],
    *,
    searches: bool,
) -> list[dict[str, Any]]:
    """A row for each round of each trial, in virtual order. `incumbents` are (virtual time, trial) after each score.

    `spent` counts the rounds up to and including the row. `incumbent` is the best trial just after the row. It is -1
    before the first score, unless there is only one trial.
    """
    rows = sorted(
        (
            {**record_as_row(record), "trial": number, "virtual_time": time}
            | {"score": history.scores.get(record.round, math.nan)}
            for number, history in trials.items()
            for record, time in zip(history.records, history.times, strict=True)
        ),
        key=lambda row: (row["virtual_time"], row["trial"]),
    )
    tells = iter([*incumbents, (math.inf, -1)])
    time, trial = next(tells)
    current = -1 if searches else 0
    for spent, row in enumerate(rows, start=1):
        while time <= row["virtual_time"]:
            current = trial
            time, trial = next(tells)
        row |= {"tuner": tuner, "seed": seed, "spent": spent, "incumbent": current}
    return rows


def trial_rows(tuner: str, seed: int, trials: Mapping[int, TrialHistory]) -> list[dict[str, Any]]:
    """A row for each trial: its rounds, its last score ± standard error, its test error, its configuration as JSON."""
    return [
        {
            "tuner": tuner,
            "seed": seed,
            "trial": number,
            "rounds": history.reported_rounds,
            "score": history.scores.get(history.reported_rounds, math.nan),
            "score_se": history.tail("validation_error_se", history.reported_rounds) if history.scores else math.nan,
            "test_error": history.last_test_error(),
            "config": json.dumps(trial_as_json(history.trial)),
        }
        for number, history in sorted(trials.items())
    ]


def result_row(
    trials: Mapping[int, TrialHistory], best: Score, max_rounds: int, personalised: Mapping[Reading, Evaluation]
) -> dict[str, Any]:
    """What was spent over all trials, and the errors of the best trial at both readings of an equal budget.

    A trial may diverge after the round at which it was best; its errors are reported at the round of `best`.
    """
    history = trials[best.trial]
    records = [record for any_history in trials.values() for record in any_history.records]
    sampled = personalised["sampled", best.trial, best.rounds]
    argmax = personalised.get(("argmax", best.trial, best.rounds), sampled)
    # With an infinite horizon the best trial may have more than max_rounds. Then there is no evaluation at max_rounds.
    beyond = math.nan if best.rounds > max_rounds else sampled.test_error
    at_max_rounds = personalised.get(("at_max_rounds", best.trial, max_rounds))
    return {
        "rounds": len(records),
        "rounds_of_trial": best.rounds,
        **totals(records),
        "validation_error": history.tail("validation_error", best.rounds),
        "validation_error_se": history.tail("validation_error_se", best.rounds),
        **runner_up(trials, best),
        "test_error": history.tail("test_error", best.rounds),
        "test_error_last": history.last_test_error(best.rounds),
        "test_error_personalised": sampled.test_error,
        "test_error_personalised_argmax": argmax.test_error,
        "test_error_at_max_rounds": history.tail("test_error", max_rounds),
        "test_error_personalised_at_max_rounds": at_max_rounds.test_error if at_max_rounds else beyond,
    }


def runner_up(trials: Mapping[int, TrialHistory], best: Score) -> dict[str, Any]:
    """The second-best trial among the trials with a score at the best trial's last round, and how far it is behind.

    `runner_up` is its number, -1 if there is none. `lead` is its score minus the best score. `lead_se` is the root of
    the sum of both scores' squared standard errors. A score is a mean over several evaluations of the same clients.
    Their errors go up and down together, so the mean of their standard errors is taken: an upper bound. `lead_se` is
    an upper bound too if examples that are hard for one model are hard for the other.
    """
    rounds = best.rounds
    others = [number for number, history in trials.items() if number != best.trial and rounds in history.scores]
    if not others:
        return {"runner_up": -1, "lead": math.nan, "lead_se": math.nan}
    second = min(others, key=lambda number: rank_key(trials[number].scores[rounds], number))
    standard_errors = [trials[number].tail("validation_error_se", rounds) for number in (best.trial, second)]
    lead = trials[second].scores[rounds] - best.error
    return {"runner_up": second, "lead": lead, "lead_se": math.hypot(*standard_errors)}
