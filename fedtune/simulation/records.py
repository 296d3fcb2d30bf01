"""The record of a round.

The journal's keys, the columns of rounds.parquet and the sums in results.csv are derived from its fields.

This module imports nothing heavy: reports read it too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


class Evaluation(NamedTuple):
    """Errors in [0, 1] and losses: means over the examples of all evaluated clients.

    `validation_error_se` is the standard error of `validation_error`, see `fedtune.simulation.evaluation`.
    """

    validation_error: float
    validation_loss: float
    test_error: float
    test_loss: float
    validation_error_se: float


def _in_files(column: str | None = None, *, total: int | None = None, fault: int | None = None) -> dict[str, Any]:
    """How a field of the record appears in files, if not only as a column with the field's own name.

    `column` is its name in the journal and in rounds.parquet. `total` is its place among the sums in results.csv; None
    means that there is no sum. `fault` is its place among the faults in a report's table; None means that it is no
    fault.
    """
    return {"column": column, "total": total, "fault": fault}


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round; the evaluation is None in rounds that were not evaluated."""

    round: int
    asked: int  # clients that the server asked
    stragglers: int = field(metadata=_in_files("late", total=6, fault=4))  # that would have answered after the end
    dropouts: int = field(metadata=_in_files("left", total=7, fault=5))  # clients that dropped out
    unavailable: int  # clients that were drawn and could not be asked
    cohort: int  # clients in time: the clients asked, without stragglers and dropouts
    failed: int = field(metadata=_in_files("lost", total=3, fault=3))  # clients whose program raised
    rejected: int = field(metadata=_in_files("dropped", total=4, fault=1))  # updates that did not count
    clipped: int = field(metadata=_in_files(total=5, fault=2))  # updates that were scaled down
    client_updates: int = field(metadata=_in_files(total=1))  # clients that answered
    bytes: int = field(metadata=_in_files(total=2))  # weights moved, to the clients and back
    error: float  # the cohort's mean validation error after local training
    loss: float
    entropy: float  # of theta, in nats; NaN if the pool has one configuration
    evaluation: Evaluation | None


COLUMN_OF = {item.name: item.metadata.get("column") or item.name for item in fields(RoundRecord)}
KEY_TYPES = {COLUMN_OF[item.name]: item.type for item in fields(RoundRecord)}  # of a record in the journal


def _placed(kind: str) -> list[str]:
    """The names of the fields that have a place of this kind ("total" or "fault"), in the order of their places."""
    places = {item.metadata[kind]: item.name for item in fields(RoundRecord) if item.metadata.get(kind)}
    return [places[place] for place in sorted(places)]


FAULTS = tuple(COLUMN_OF[name] for name in _placed("fault"))  # columns

# The columns of rounds.parquet in their order, without the round: a standard error follows its error.
RECORD_COLUMNS = [
    *[column for column in COLUMN_OF.values() if column not in ("round", "evaluation")],
    *sorted(Evaluation._fields, key=lambda name: Evaluation._fields.index(name.removesuffix("_se"))),
]


def totals(records: Iterable[RoundRecord]) -> dict[str, int]:
    """The sums over the records that results.csv holds, by column."""
    records = list(records)
    return {COLUMN_OF[name]: sum(getattr(record, name) for record in records) for name in _placed("total")}


def record_as_json(record: RoundRecord) -> dict[str, Any]:
    """The record as the journal holds it."""
    return {**_by_column(record), "evaluation": record.evaluation and list(record.evaluation)}


def record_from_json(line: Mapping[str, Any]) -> RoundRecord:
    """The record that `record_as_json` wrote."""
    values = {name: line[column] for name, column in COLUMN_OF.items()}
    evaluation = values.pop("evaluation")
    return RoundRecord(**values, evaluation=evaluation and Evaluation(*evaluation))


def record_as_row(record: RoundRecord) -> dict[str, Any]:
    """The record as columns of rounds.parquet; the columns of its evaluation are NaN if it has none."""
    row = _by_column(record)
    evaluation = row.pop("evaluation")
    return row | (evaluation._asdict() if evaluation else dict.fromkeys(Evaluation._fields, float("nan")))


def _by_column(record: RoundRecord) -> dict[str, Any]:
    return {column: getattr(record, name) for name, column in COLUMN_OF.items()}
