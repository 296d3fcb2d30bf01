"""What is recorded of a round: one class, from which every list of columns derives."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedtune.simulation.evaluation import Evaluation


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round; the evaluation is None in rounds that were not evaluated."""

    round: int
    asked: int  # clients that the server asked
    late: int  # clients that would have answered after the round's end
    left: int  # clients that dropped out
    unavailable: int  # clients that were drawn and could not be asked
    cohort: int  # clients in time: all asked but the late and those that left
    lost: int  # clients whose program raised
    dropped: int  # updates that were not finite
    clipped: int  # updates that were scaled down
    client_updates: int  # clients that answered
    bytes: int  # weights moved, to the clients and back
    error: float  # the cohort's mean validation error after local training
    loss: float
    entropy: float  # of theta, in nats; NaN where the pool has one configuration
    evaluation: Evaluation | None


def record_as_json(record: RoundRecord) -> dict[str, Any]:
    """The record as the journal holds it."""
    return {**asdict(record), "evaluation": record.evaluation and list(record.evaluation)}


def record_from_json(fields: Mapping[str, Any]) -> RoundRecord:
    """The record that `record_as_json` wrote."""
    evaluation = fields["evaluation"]
    return RoundRecord(**{**fields, "evaluation": evaluation and Evaluation(*evaluation)})


def record_as_row(record: RoundRecord) -> dict[str, Any]:
    """The record as columns of rounds.parquet, its evaluation's numbers NaN where there is none."""
    row = asdict(record)
    evaluation = row.pop("evaluation")
    return row | (evaluation._asdict() if evaluation else dict.fromkeys(Evaluation._fields, float("nan")))
