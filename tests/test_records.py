import math

import pytest

from fedtune.simulation.records import (
    FAULTS,
    KEY_TYPES,
    RECORD_COLUMNS,
    Evaluation,
    RoundRecord,
    record_as_json,
    record_as_row,
    record_from_json,
    totals,
)


def record(server_round, first=0, evaluation=None):
    """A record whose counts are all different: first + 1, first + 2, ..."""
    names = ["asked", "stragglers", "dropouts", "unavailable", "cohort", "failed", "rejected", "clipped"]
    counts = {name: first + place for place, name in enumerate([*names, "client_updates", "bytes"], start=1)}
    return RoundRecord(server_round, **counts, error=0.5, loss=1.5, entropy=0.25, evaluation=evaluation)


def test_the_journal_and_the_columns_keep_their_spelling():
    counts = ["asked", "late", "left", "unavailable", "cohort", "lost", "dropped", "clipped", "client_updates", "bytes"]
    errors = ["validation_error", "validation_error_se", "validation_loss", "test_error", "test_loss"]
    assert list(KEY_TYPES) == ["round", *counts, "error", "loss", "entropy", "evaluation"]
    expected = [*counts, "error", "loss", "entropy", *errors]
    assert expected == RECORD_COLUMNS
    assert FAULTS == ("dropped", "clipped", "lost", "late", "left")


@pytest.mark.parametrize("evaluation", [None, Evaluation(0.1, 0.2, 0.3, 0.4, 0.5)])
def test_a_record_is_read_back_from_the_journal(evaluation):
    written = record_as_json(record(3, evaluation=evaluation))
    assert list(written) == list(KEY_TYPES)
    assert (written["late"], written["left"], written["lost"], written["dropped"]) == (2, 3, 6, 7)
    assert written["evaluation"] == (evaluation and [0.1, 0.2, 0.3, 0.4, 0.5])
    assert record_from_json(written) == record(3, evaluation=evaluation)


def test_a_row_has_every_column():
    row = record_as_row(record(3, evaluation=Evaluation(0.1, 0.2, 0.3, 0.4, 0.5)))
    assert set(row) == {"round", *RECORD_COLUMNS}
    assert (row["dropped"], row["test_error"], row["validation_error_se"]) == (7, 0.3, 0.5)
    assert math.isnan(record_as_row(record(3))["test_error"])


def test_totals_are_sums_in_the_order_of_results_csv():
    # Of the counts above, in the order client_updates (9th), bytes (10th), lost, dropped, clipped, late, left.
    places = {"client_updates": 9, "bytes": 10, "lost": 6, "dropped": 7, "clipped": 8, "late": 2, "left": 3}
    assert list(totals([record(1), record(2, first=100)]).items()) == [
        (name, 100 + 2 * n) for name, n in places.items()
    ]
    assert totals([]) == dict.fromkeys(places, 0)
