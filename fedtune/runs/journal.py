"""The journal of a study: every ask, round, checkpoint and tell, one JSON object a line.

A decision is written before the study acts on it. Rounds and checkpoints are written as they are computed. A line
outlives the process as soon as it is written. It outlives a power cut once it is on the disk: `sync` brings it there.
The decisions after which checkpoints are always removed do so themselves (SYNCED).

A study that is resumed runs the same event loop from the start. Each decision that it takes again is compared with the
journal, and the rounds that were computed before are read from the journal. So the study continues at the point at
which it stopped, and ends with the same numbers as a study that was never stopped.
"""

import itertools
import json
import shlex
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtune.errors import InputError, UnknownNameError
from fedtune.runs.appended_file import AppendedFile
from fedtune.runs.journal_lines import LINES, NOTES, Order
from fedtune.settings import LATER, Settings, deciding, digest, input_error

FORMAT = 4  # of the lines that are written
# The formats that can be read and resumed. A study of format 3 has other rules (see Ledger), and its first line has no
# `deciding`.
FORMATS = (3, 4)
SYNCED = ("tell", "end")  # the decisions after which checkpoints are always removed


class JournalEnds(Exception):
    """A journal that is only read holds no further decision."""


class DamagedJournalError(InputError):
    """A line of a journal is damaged. The lines before it are good; they take `good_bytes` bytes."""

    def __init__(self, path: Path, line_number: int, good_bytes: int, why: str) -> None:
        super().__init__(
            f"{path}, line {line_number}, is damaged or was edited: {why}; to go on from the line before it: "
            f"fedtune resume {path.parent.parent} --repair"
        )
        self.line_number = line_number
        self.good_bytes = good_bytes


class Journal:
    """The journal at `path`, with the lines that it holds already. Raises DamagedJournalError if it was damaged.

    Each line carries a checksum of itself and all lines before it. A torn last line, as a killed process leaves it, is
    dropped. Decisions (`decide`) come in an order that does not depend on the machine; rounds and checkpoints (`note`)
    come as they are computed, by several federations at once. With `read_only` nothing is written: decisions are
    compared with the past, and JournalEnds is raised after its last one. `num_lines` is how many lines are read; None
    means all. A study that has not begun gets the format `new_format`, and `new_kernel`: the digest of the kernel in
    which its clients train, None if they train in torch.
    """

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool = False,
        num_lines: int | None = None,
        new_format: int = FORMAT,
        new_kernel: str | None = None,
    ) -> None:
        self.path = path
        self.format = new_format  # of the study: of its first line, if it has begun
        self.kernel = new_kernel  # the same
        self._checksum = 0
        self._good_bytes = 0  # that all lines so far take
        self._order = Order()
        self._decisions: deque[tuple[int, dict[str, Any]]] = deque()  # line number and line: not taken again yet
        self._notes: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by event
        if path.exists():
            self._read(num_lines)
        self._file = None if read_only else AppendedFile(path, self._good_bytes)

    def begin(self, tuner: str, seed: int, settings: Settings) -> None:
        """Writes the first decision: the tuner and the seed of the study, and the settings that decide its numbers.

        Raises InputError if the study was begun with other settings.
        """
        first = {"format": self.format, "tuner": tuner, "seed": seed, "settings": digest(settings)}
        if self.format > 3:
            first["deciding"] = deciding(settings)
        if self.kernel is not None:
            first["kernel"] = self.kernel
        if self._decisions:
            _, line = self._decisions[0]
            if (line.get("tuner"), line.get("seed")) == (tuner, seed) and line.get("settings") != first["settings"]:
                raise self._other_settings(line, first)
        self.decide("study", **first)

    def decide(self, event: str, **fields: Any) -> None:
        """Writes a decision. If the journal holds one here already, raises InputError unless the two are the same."""
        line = {"event": event, **fields}
        if not self._decisions:
            if self._file is None:
                raise JournalEnds
            self._write(line)
            if event in SYNCED:
                self._file.sync()
            return
        number, found = self._decisions[0]
        if not same(line, found):
            raise self.misfit(number, *_difference(line, found))
        self._decisions.popleft()

    def note(self, event: str, **fields: Any) -> None:
        """Writes what was computed."""
        self._write({"event": event, **fields})

    def sync(self) -> None:
        """Brings all lines to the disk."""
        assert self._file is not None
        self._file.sync()

    def decisions(self, event: str) -> list[dict[str, Any]]:
        """The past decisions of this event that were not taken again yet, in their order."""
        return [line for _, line in self._decisions if line["event"] == event]

    def notes(self, event: str) -> list[dict[str, Any]]:
        """The lines of this event that the journal held when it was opened, in the order of writing."""
        return self._notes[event]

    def first(self, event: str) -> tuple[int, dict[str, Any]] | None:
        """(line number, decision) of the next past decision of this event; None if there is none."""
        return next((decision for decision in self._decisions if decision[1]["event"] == event), None)

    def coming(self) -> tuple[int, dict[str, Any]]:
        """(line number, decision) of the next past decision. Raises JournalEnds if there is none."""
        if not self._decisions:
            raise JournalEnds
        return self._decisions[0]

    def expect(self, event: str, **fields: Any) -> None:
        """Raises InputError unless the next decision of the past is of this event and has these fields."""
        number, found = self.coming()
        wanted = {"event": event, **fields}
        shown = {name: found.get(name) for name in wanted}
        if not same(wanted, shown):
            raise self.misfit(number, *_difference(wanted, shown))

    def check_that_it_ends_here(self) -> None:
        """Raises InputError if decisions of the past are still to come."""
        if self._decisions:
            number, line = self._decisions[0]
            raise self.misfit(number, "no more lines", _words(line, "time"))

    def misfit(self, line_number: int, expected: str, found: str) -> InputError:
        """The error to raise if a line of the past differs from the tuner's decision."""
        return InputError(f"{self.path}, line {line_number}, does not fit the tuner: expected {expected}, got {found}")

    def _other_settings(self, begun: dict[str, Any], now: dict[str, Any]) -> InputError:
        """The error to raise if the settings are not those with which the study was begun."""
        file = self.path.parent.parent / "settings.toml"
        before, after = LATER | dict(_leaves(begun.get("deciding", {}))), LATER | dict(_leaves(now.get("deciding", {})))
        for name in {**before, **after}:
            if name != "batched" and not same(before.get(name), after.get(name)):
                advice = f"; {in_torch(file)}" if name == "engine" else ""
                return InputError(
                    f"{file} must have the settings with which the run was begun, got {name} = {after.get(name)!r}; "
                    f"{self.path} has {name} = {before.get(name)!r}{advice}"
                )
        return InputError(
            f"{file} must hold the settings of {self.path} (digest {begun.get('settings')}), got other ones (digest "
            f"{now['settings']}): one of the two was edited, or the executor now batches clients and did not before, "
            "or the other way round"
        )

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        text = json.dumps(line)
        self._checksum = zlib.crc32(text.encode(), self._checksum)
        self._file.append(f'{text[:-1]}, "check": "{self._checksum:08x}"}}\n'.encode())

    def _read(self, num_lines: int | None) -> None:
        """Takes in the whole lines."""
        with self.path.open("rb") as file:
            for number, text in enumerate(itertools.islice(file, num_lines), start=1):
                if not text.endswith(b"\n"):
                    return  # a torn last line
                line = self._parse(text[:-1].decode(errors="replace"), number)
                event = line["event"]
                if event in NOTES:
                    self._notes[event].append(line)
                else:
                    self._decisions.append((number, line))
                self._good_bytes += len(text)

    def _parse(self, text: str, number: int) -> dict[str, Any]:
        """The line, after every check that needs no tuner."""
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
        if event == "study":
            if line.get("format") not in FORMATS:
                raise InputError(
                    f"{self.path}, line {number}, must have format {' or '.join(map(str, FORMATS))}, "
                    f"got {line.get('format')}: another version of fedtune wrote it"
                )
            self.format, self.kernel = line["format"], line.get("kernel")
        if event not in list(LINES):
            raise self._damaged(number, str(UnknownNameError("event", str(event), LINES)))
        try:
            LINES[event].model_validate_json(body)
        except ValidationError as error:
            raise self._damaged(number, str(input_error(error, LINES[event], "field"))) from None
        if misplaced := self._order.take(line):
            raise self._damaged(number, misplaced)
        return line

    def _damaged(self, number: int, why: str) -> DamagedJournalError:
        return DamagedJournalError(self.path, number, self._good_bytes, why)


def in_torch(settings: Path) -> str:
    """The end of a message about the engine of the run with this settings.toml: how to repeat the run in torch."""
    return f"to repeat the run in torch: fedtune compare {shlex.quote(str(settings))} --set engine=torch --out NEW"


def same(one: object, other: object) -> bool:
    """Whether two values have the same JSON text: NaN is the same as NaN, and 1 is not the same as 1.0.

    The order of keys does not matter.
    """
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _difference(wanted: dict[str, Any], found: dict[str, Any]) -> tuple[str, str]:
    """Two different decisions in words, with the first field in which they differ."""
    wanted_leaves, found_leaves = dict(_leaves(wanted)), dict(_leaves(found))
    for name in {**wanted_leaves, **found_leaves}:
        if not same(wanted_leaves.get(name), found_leaves.get(name)):
            return _words(wanted_leaves, name), _words(found_leaves, name)
    return json.dumps(wanted), json.dumps(found)  # they differ in an empty list or table, which has no fields


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text and None within a value from JSON, with its dotted name."""
    if isinstance(value, dict | list):
        for key, member in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(member, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _words(line: Mapping[str, Any], name: str) -> str:
    """A decision in words, with the field of that name: "ask, trial 3, rung 1, rounds 3, started 2.0"."""
    names = dict.fromkeys(("trial", "rung", "rounds", name))
    shown = [f"{field} {line[field]}" for field in names if field != "event" and line.get(field) is not None]
    return ", ".join([str(line["event"]), *shown])
