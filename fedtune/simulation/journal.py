"""The journal of a study: every ask, round, checkpoint and tell, one JSON object a line, flushed before it is acted on.

A study that is resumed runs the same event loop from the start. What it decides again is compared with the journal, and
what it had computed is answered from it, so that it goes on where it stopped and ends with the numbers of a run that
never stopped.
"""

import json
import os
import zlib
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from fedtune.errors import InputError

FORMAT = 1  # of the lines; a journal of another format is refused


class Journal:
    """The journal at `path`, with what it already holds. Raises InputError where that is damaged or was edited.

    Each line carries a checksum of itself and all lines before it. A torn last line, as a killed process leaves it, is
    dropped. Decisions (`decide`) come in an order that does not depend on the machine; rounds and checkpoints (`note`)
    come as they are computed, by several federations at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checksum = 0
        self._decisions: deque[dict[str, Any]] = deque()  # those of the past that were not decided again yet
        self._notes: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by event
        if path.exists():
            self._read()
        self._file = path.open("a", encoding="utf-8")

    def decide(self, event: str, **fields: Any) -> None:
        """Writes a decision, or finds that it is the one that was taken here before."""
        line = {"event": event, **fields}
        if not self._decisions:
            self._write(line)
        elif json.dumps(line) != json.dumps(expected := self._decisions.popleft()):
            raise InputError(
                f"{self._path} does not fit this run: it says {json.dumps(expected)} where {json.dumps(line)} follows"
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

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        self._checksum = zlib.crc32(text.encode(), self._checksum)
        self._file.write(f'{text[:-1]}, "check": "{self._checksum:08x}"}}\n')
        self._file.flush()

    def _read(self) -> None:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, text in enumerate(data[:whole].decode(errors="replace").split("\n")[:-1], start=1):
            line = self._parse(text, number)
            event = line["event"]
            if event in NOTES:
                self._notes[event].append(line)
            else:
                self._decisions.append(line)
        if whole < len(data):
            os.truncate(self._path, whole)

    def _parse(self, text: str, number: int) -> dict[str, Any]:
        body, separator, check = text.rpartition(', "check": ')
        body += "}"
        self._checksum = zlib.crc32(body.encode(), self._checksum)
        if not separator or check != f'"{self._checksum:08x}"}}':
            raise InputError(f"{self._path}, line {number}, is damaged or was edited: its checksum does not fit")
        line: dict[str, Any] = json.loads(body)
        return line


NOTES = ("round", "lost", "checkpoint", "personalised")
