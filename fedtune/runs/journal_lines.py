"""The lines that a journal may hold: the fields of each line, the form of a configuration, the order of the lines."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from fedtune.simulation.records import KEY_TYPES, Evaluation
from fedtune.tuning.trial import Pool, Trial

_Whole = Annotated[int, Field(ge=0, lt=2**63)]


def _fields(**kinds: Any) -> type[BaseModel]:
    """A pydantic model with exactly these fields of these types; a pair of a type and a default may be left out."""
    definitions: Any = {
        name: kind if isinstance(kind, tuple) else (_Whole if kind is int else kind, ...)
        for name, kind in kinds.items()
    }
    model: type[BaseModel] = create_model("Fields", __config__=ConfigDict(strict=True, extra="forbid"), **definitions)
    return model


LINES = {  # by event
    "study": _fields(
        event=str,
        format=int,
        tuner=str,
        seed=int,
        settings=str,
        deciding=(dict[str, Any] | None, None),
        kernel=(str | None, None),
    ),
    "ask": _fields(
        event=str,
        trial=int,
        rung=int,
        rounds=int,
        attempt=int,
        started=float,
        finishes=float,
        dropped=bool,
        server=dict[str, Any],
        pool=list[list[dict[str, Any]]],
    ),
    "tell": _fields(
        event=str,
        trial=int,
        rung=int,
        rounds=int,
        time=float,
        score=float,
    ),
    "drop": _fields(
        event=str,
        trial=int,
        rung=int,
        rounds=int,
        time=float,
        then=str,
    ),
    "extend": _fields(event=str, num_configs=_Whole | None, total_rounds=int),
    "end": _fields(event=str, incumbent=int, time=float),
    "round": _fields(event=str, trial=int, record=_fields(**KEY_TYPES)),
    "lost": _fields(event=str, trial=int, round=int, reasons=list[str]),
    "lose": _fields(event=str, client=str, trained=list[tuple[_Whole, _Whole]]),
    "checkpoint": _fields(event=str, trial=int, round=int),
    "personalised": _fields(
        event=str,
        reading=Literal["at_max_rounds", "sampled", "argmax"],
        trial=int,
        round=int,
        evaluation=Evaluation,
    ),
}
NOTES = ("round", "lost", "lose", "checkpoint", "personalised")  # what was computed; all other lines are decisions


def trial_as_json(trial: Trial) -> dict[str, Any]:
    """The trial's configurations as the journal holds them."""
    return {"server": dict(trial.server), "pool": pool_as_json(trial.pool)}


def pool_as_json(pool: Pool) -> list[list[dict[str, Any]]]:
    """The configurations of each factor as the journal holds them."""
    return [[dict(config) for config in factor] for factor in pool]


@dataclass
class _Trial:
    """A trial after the lines so far."""

    asked: int = 0  # its rounds at the end of its last job; a failed attempt does not count
    round: int = 0  # its last round
    evaluated: bool = True  # whether its last round was evaluated
    checkpoint: int = 0  # the round of its last checkpoint


class Order:
    """Checks the order of the lines, as far as it does not depend on the tuner.

    The rounds of a trial come one after another, up to the number that was asked for. A checkpoint comes after a round
    that was evaluated; a trial whose first note is a checkpoint inherited it from another trial. After a stop, rounds
    may come again from the trial's last checkpoint on.
    """

    def __init__(self) -> None:
        self._trials: dict[int, _Trial] = defaultdict(_Trial)

    def take(self, line: Mapping[str, Any]) -> str | None:
        """Takes the next line. Returns None if the line is allowed here, otherwise the reason why it is not."""
        if "trial" not in line:
            return None
        trial, about = self._trials[line["trial"]], f"of trial {line['trial']}"
        match line["event"]:
            case "ask" if not line["dropped"]:
                trial.asked = line["rounds"]
            case "round":
                record = line["record"]
                if record["round"] not in (trial.round + 1, trial.checkpoint + 1) or record["round"] > trial.asked:
                    return (
                        f"round {record['round']} {about} must be asked for and follow the one before, "
                        f"got {trial.asked} rounds asked for and {trial.round} as the last"
                    )
                trial.round, trial.evaluated = record["round"], record["evaluation"] is not None
            case "checkpoint":
                if not (trial.evaluated and line["round"] == (trial.round or line["round"]) <= trial.asked):
                    return (
                        f"the checkpoint {about} must be of its last round, {trial.round}, and that evaluated, "
                        f"got round {line['round']}"
                    )
                trial.round = trial.checkpoint = line["round"]
            case "lost" | "personalised" if line["round"] > trial.round:
                return f"round {line['round']} {about} must come before it, got {trial.round} as the last"
        return None
