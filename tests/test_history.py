import math

import numpy as np
import pytest

from fedtune.runs.history import TrialHistory
from fedtune.simulation.records import Evaluation, RoundRecord
from fedtune.tuning.trial import Trial

COUNTS = dict.fromkeys(
    (
        "asked",
        "stragglers",
        "dropouts",
        "unavailable",
        "cohort",
        "failed",
        "rejected",
        "clipped",
        "client_updates",
        "bytes",
    ),
    0,
)


def error_of(trial, server_round):
    """The validation error: twice the test error, ten times the standard error, and different in every round."""
    return trial + server_round / 100


def record(trial, server_round):
    error = error_of(trial, server_round)
    evaluation = Evaluation(error, 1.0, error / 2, 1.0, error / 10)
    return RoundRecord(server_round, **COUNTS, error=0.5, loss=1.0, entropy=math.nan, evaluation=evaluation)


def history(number, first, last, parent=None, every=1):
    """A trial that inherited the rounds before `first`, and has rounds of its own up to `last`."""
    found = TrialHistory(Trial(number, {}, (({},),)), first - 1, parent)
    found.records = [record(number, i) for i in range(first, last + 1) if i % every == 0]
    return found


FIELDS = {"validation_error": 1.0, "test_error": 0.5, "validation_error_se": 0.1}


@pytest.mark.parametrize("field", FIELDS)
def test_the_tail_of_a_copy_begins_in_its_parent(field):
    """Of 9 rounds those after 6.75 count: two of the parent, which was copied at round 8, and one of the copy."""
    parent = history(0, 1, 10)  # it was trained on since
    copy = history(1, 9, 12, parent)
    expected = [error_of(0, 7), error_of(0, 8), error_of(1, 9)]
    assert copy.tail(field, 9) == pytest.approx(FIELDS[field] * np.mean(expected))
    assert copy.tail(field) == pytest.approx(FIELDS[field] * np.mean([error_of(1, r) for r in (10, 11, 12)]))
    assert parent.tail(field) == pytest.approx(FIELDS[field] * np.mean([error_of(0, r) for r in (8, 9, 10)]))


def test_the_tail_of_a_copys_copy_goes_back_as_far_as_it_must():
    """Of 20 rounds those after 15: 16 of the first, 17 and 18 of its copy, the others of the copy's copy."""
    first = history(0, 1, 20)
    second = history(1, 17, 20, first)
    third = history(2, 19, 20, second)
    numbers = {16: 0, 17: 1, 18: 1, 19: 2, 20: 2}
    assert third.tail("validation_error") == pytest.approx(np.mean([error_of(n, r) for r, n in numbers.items()]))
    assert third.tail("validation_error", 16) == pytest.approx(np.mean([error_of(0, r) for r in (13, 14, 15, 16)]))


def test_rounds_without_an_evaluation_do_not_count():
    parent = history(0, 1, 8, every=2)
    assert history(1, 9, 10, parent, every=2).tail("validation_error") == pytest.approx(
        np.mean([error_of(0, 8), error_of(1, 10)])
    )


def test_a_copy_that_leaves_out_its_parents_rounds_is_judged_by_its_own():
    """As in runs of journal format 3."""
    assert history(1, 9, 9).tail("validation_error") == error_of(1, 9)


def test_copies_of_copies_may_be_many():
    copy = history(0, 1, 1)
    for number in range(1, 3000):
        copy = history(number, number + 1, number + 1, copy)
    assert copy.tail("validation_error") == pytest.approx(np.mean([error_of(r - 1, r) for r in range(2251, 3001)]))
