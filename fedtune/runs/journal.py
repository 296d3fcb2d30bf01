"""The journal of a study: every ask, round, checkpoint and tell, one JSON object a line, written before it is acted on.

A study that is resumed runs the same event loop from the start. What it decides again is compared with the journal, and
what it had computed is answered from it, so that it goes on where it stopped and ends with the numbers of a run that
never stopped.
"""

import json
import os
import zlib
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from fedtune.errors import InputError, UnknownNameError
from fedtune.settings import input_error
from fedtune.simulation.records import KEY_TYPES, Evaluation

FORMAT = 3  # of the lines; a journal of another format is refused


_Whole = Annotated[int, Field(ge=0, lt=2**63)]


def _fields(**kinds: Any) -> type[BaseModel]:
    """A model of what must be there, of these types, and nothing else."""
    definitions: Any = {name: (_Whole if kind is int else kind, ...) for name, kind in kinds.items()}
    model: type[BaseModel] = create_model("Fields", __config__=ConfigDict(strict=True, extra="forbid"), **definitions)
    return model


_JOB = {"event": str, "trial": int, "rung": int, "rounds": int}
LINES = {  # by event
    "study": _fields(event=str, format=int, tuner=str, seed=int, settings=str),
    "ask": _fields(
        **_JOB,
        **{"attempt": int, "started": float, "finishes": float, "dropped": bool},
        **{"server": dict[str, Any], "pool": list[list[dict[str, Any]]]},
    ),
    "tell": _fields(**_JOB, time=float, score=float),
    "drop": _fields(**_JOB, time=float, then=str),
    "extend": _fields(event=str, num_configs=_Whole | None, total_rounds=int),
    "end": _fields(event=str, incumbent=int, time=float),
    "round": _fields(event=str, trial=int, record=_fields(**KEY_TYPES)),
    "lost": _fields(event=str, trial=int, round=int, reasons=list[str]),
    "checkpoint": _fields(event=str, trial=int, round=int),
    "personalised": _fields(
        **{"event": str, "reading": Literal["at_max_rounds", "sampled", "argmax"]},
        **{"trial": int, "round": int, "evaluation": Evaluation},
    ),
}
NOTES = ("round", "lost", "checkpoint", "personalised")


class JournalEnds(Exception):
    """A journal that is only read holds no further decision."""


@dataclass
class _Trial:
    """A trial as the lines so far have it."""

    asked: int = 0  # its rounds at the end of its last job, other than dropped ones
    round: int = 0  # its last one
    evaluated: bool = True  # whether that was
    checkpoint: int = 0  # the round of its last checkpoint


class Order:
    """What may follow the lines so far, whatever the tuner decides.

    A trial's rounds come one after another, up to what was asked for, and its checkpoints after rounds that were
    evaluated; a trial whose first note is a checkpoint has it from another one. From a trial's last checkpoint on its
    rounds may come again, as after a stop.
    """

    def __init__(self) -> None:
        self._trials: dict[int, _Trial] = defaultdict(_Trial)

    def take(self, line: Mapping[str, Any]) -> str | None:
        """What must be where the line can't stand here; None where it can."""
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


class Journal:
    """The journal at `path`, with what it already holds. Raises InputError where that is damaged or was edited.

    Each line carries a checksum of itself and all lines before it. A torn last line, as a killed process leaves it, is
    dropped. Decisions (`decide`) come in an order that does not depend on the machine; rounds and checkpoints (`note`)
    come as they are computed, by several federations at once. With `read_only` nothing is written: decisions are
    compared with the past, and JournalEnds is raised after its last one.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._checksum = 0
        self._order = Order()
        self._decisions: deque[tuple[int, dict[str, Any]]] = deque()  # line number and line: not decided again yet
        self._notes: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by event
        if path.exists():
            torn_at = self._read()
            if torn_at is not None and not read_only:
                os.truncate(path, torn_at)
        self._file = None if read_only else path.open("ab", buffering=0)

    def decide(self, event: str, **fields: Any) -> None:
        """Writes a decision, or finds that it is the one that was taken here before."""
        line = {"event": event, **fields}
        if not self._decisions:
            if self._file is None:
                raise JournalEnds
            self._write(line)
            return
        number, expected = self._decisions.popleft()
        if json.dumps(line) != json.dumps(expected):
            raise InputError(
                f"{self.path}, line {number}, does not fit this run: it says {json.dumps(expected)} "
                f"where {json.dumps(line)} follows"
            )

    def note(self, event: str, **fields: Any) -> None:
        """Writes what was computed."""
        self._write({"event": event, **fields})

    def notes(self, event: str) -> list[dict[str, Any]]:
        """What the past noted under this event, in the order of writing."""
        return self._notes[event]

    @property
    def replaying(self) -> bool:
        """Whether decisions of the past are still to come."""
        return bool(self._decisions)

    def coming(self) -> tuple[int, dict[str, Any]]:
        """The decision of the past that comes next, after its line's number. Raises JournalEnds after the last one."""
        if not self._decisions:
            raise JournalEnds
        return self._decisions[0]

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        text = json.dumps(line)
        self._checksum = zlib.crc32(text.encode(), self._checksum)
        unwritten = f'{text[:-1]}, "check": "{self._checksum:08x}"}}\n'.encode()
        try:
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}") from error

    def _read(self) -> int | None:
        """Takes in all whole lines; the place in the file at which a torn one begins, if there is one."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, text in enumerate(data[:whole].decode(errors="replace").split("\n")[:-1], start=1):
            line = self._parse(text, number)
            event = line["event"]
            if event in NOTES:
                self._notes[event].append(line)
            else:
                self._decisions.append((number, line))
        return whole if whole < len(data) else None

    def _parse(self, text: str, number: int) -> dict[str, Any]:
        body, separator, check = text.rpartition(', "check": ')
        body += "}"
        self._checksum = zlib.crc32(body.encode(), self._checksum)
        if not separator or check != f'"{self._checksum:08x}"}}':
            raise self._damaged(number, "its checksum does not fit")
        try:
            line: dict[str, Any] = json.loads(body)
        except ValueError as error:
            raise self._damaged(number, f"it is not JSON: {error}") from None
        event = line.get("event")
        if event == "study" and line.get("format") != FORMAT:
            raise InputError(
                f"{self.path}, line {number}, must have format {FORMAT}, got {line.get('format')}: "
                "another version of fedtune wrote it"
            )
        if event not in list(LINES):
            raise self._damaged(number, str(UnknownNameError("event", str(event), LINES)))
        try:
            LINES[event].model_validate_json(body)
        except ValidationError as error:
            raise self._damaged(number, str(input_error(error, LINES[event], "field"))) from None
        if misplaced := self._order.take(line):
            raise self._damaged(number, misplaced)
        return line

    def _damaged(self, number: int, why: str) -> InputError:
        return InputError(f"{self.path}, line {number}, is damaged or was edited: {why}")
