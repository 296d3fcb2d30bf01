"""The rows of results.csv and trials.parquet that say how close the second-best trial came."""

import math

import pytest

from fedtune.runs.history import TrialHistory
from fedtune.runs.results import result_row, round_rows, runner_up, trial_rows
from fedtune.simulation.records import Evaluation, RoundRecord
from fedtune.tuning.trial import Score, Trial, incumbent


def history(number: int, *evaluations: tuple[int, float, float]) -> TrialHistory:
    """A trial told after each of the (round, validation error, its standard error), the score being the tail mean."""
    found = TrialHistory(Trial(number, {}, (({},),)))
    for server_round, error, standard_error in evaluations:
        evaluation = Evaluation(error, 1.0, 0.9, 1.0, standard_error)
        counts = dict.fromkeys(("asked", "cohort", "client_updates"), 1) | dict.fromkeys(
            ("stragglers", "dropouts", "unavailable", "failed", "rejected", "clipped", "bytes"), 0
        )
        record = RoundRecord(server_round, **counts, error=0.5, loss=1.0, entropy=math.nan, evaluation=evaluation)
        found.records.append(record)
        found.scores[server_round] = found.tail("validation_error")
    return found


def test_the_runner_up_is_the_second_best_at_the_best_ones_resource() -> None:
    trials = {
        **{0: history(0, (3, 0.3, 0.01), (9, 0.20, 0.03)), 1: history(1, (3, 0.1, 0.01))},  # 1 was never promoted
        **{2: history(2, (3, 0.4, 0.01), (9, 0.24, 0.04)), 3: history(3, (3, 0.4, 0.01), (9, 0.5, 0.01))},
    }
    found = runner_up(trials, Score(0, 9, 0.2))
    assert found["runner_up"] == 2
    assert found["lead"] == pytest.approx(0.24 - 0.20)
    assert found["lead_se"] == pytest.approx(math.sqrt(0.03**2 + 0.04**2))


def test_the_runner_up_may_have_any_number() -> None:
    trials = {0: history(0, (9, 0.5, 0.1)), 1: history(1, (9, 0.2, 0.1)), 2: history(2, (9, 0.3, 0.1))}
    assert runner_up(trials, Score(1, 9, 0.2))["runner_up"] == 2
    diverged = {**trials, 0: history(0, (9, math.nan, 0.1))}
    assert runner_up(diverged, Score(1, 9, 0.2))["runner_up"] == 2


def test_the_rounds_of_all_trials_in_virtual_order_with_the_incumbent_after_each() -> None:
    """Trial 1 is reported at the time of its second round, and trial 0, which is better, at that of its own second."""
    trials = {0: history(0, (1, 0.4, 0.1), (2, 0.1, 0.1)), 1: history(1, (1, 0.4, 0.1), (2, 0.3, 0.1))}
    trials[0].times, trials[1].times = [2.0, 4.0], [1.0, 3.0]
    rows = round_rows("asha", 7, trials, [(3.0, 1), (4.0, 0)], searches=True)
    shown = [(row["virtual_time"], row["trial"], row["round"], row["spent"], row["incumbent"]) for row in rows]
    assert shown == [(1.0, 1, 1, 1, -1), (2.0, 0, 1, 2, -1), (3.0, 1, 2, 3, 1), (4.0, 0, 2, 4, 0)]
    assert {(row["tuner"], row["seed"]) for row in rows} == {("asha", 7)}
    within_one = round_rows("manual", 7, {0: trials[0]}, [(4.0, 0)], searches=False)
    assert [row["incumbent"] for row in within_one] == [0, 0]


def test_rounds_at_one_moment_are_sorted_by_trial() -> None:
    trials = {0: history(0, (1, 0.4, 0.1)), 1: history(1, (1, 0.3, 0.1))}
    trials[0].times, trials[1].times = [1.0], [1.0]
    rows = round_rows("asha", 0, dict(reversed(trials.items())), [(1.0, 1)], searches=True)
    assert [row["trial"] for row in rows] == [0, 1]


def test_the_standard_error_of_a_score_is_the_mean_over_its_evaluations() -> None:
    trials = {0: history(0, (4, 0.9, 0.5), (7, 0.2, 0.02), (8, 0.2, 0.04)), 1: history(1, (8, 0.3, 0.0))}
    assert trial_rows("asha", 0, trials)[0]["score_se"] == pytest.approx((0.02 + 0.04) / 2)
    assert runner_up(trials, Score(0, 8, 0.2))["lead_se"] == pytest.approx((0.02 + 0.04) / 2)


def test_a_lone_trial_has_no_runner_up_and_a_trial_never_told_no_score() -> None:
    alone = {0: history(0, (9, 0.2, 0.03)), 1: history(1)}
    found = runner_up(alone, Score(0, 9, 0.2))
    assert found["runner_up"] == -1
    assert math.isnan(found["lead"])
    assert math.isnan(trial_rows("asha", 0, alone)[1]["score_se"])


def test_a_trial_that_diverged_after_it_was_the_best_is_read_where_it_was() -> None:
    trials = {0: history(0, (3, 0.2, 0.01), (9, math.nan, 0.1)), 1: history(1, (3, 0.3, 0.01))}
    scores = [Score(n, rounds, score) for n, each in trials.items() for rounds, score in each.scores.items()]
    best = incumbent(scores)
    assert best == (0, 3, 0.2)
    row = result_row(trials, best, 9, {("sampled", 0, 3): Evaluation(0.1, 1.0, 0.4, 1.0, 0.0)})
    assert (row["rounds_of_trial"], row["validation_error"], row["test_error_personalised"]) == (3, 0.2, 0.4)
    assert (row["runner_up"], row["lead"]) == (1, pytest.approx(0.3 - 0.2))
