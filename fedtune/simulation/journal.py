"""The journal of a study: every ask, round and tell, one JSON object a line, flushed before it is acted on."""

import json
from pathlib import Path
from typing import Any


class Journal:
    """Appends to `path`. JSON keeps every bit of a float; NaN and infinity are written as Python's json does."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """One line."""
        self._file.write(json.dumps({"event": event, **fields}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
