"""The files of LEAF's JSON form (Caldas et al. 2018, arXiv 1812.01097), read user by user.

A file is `{"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}}}`. It may also hold
`hierarchies`, a list that says for each user what the user belongs to, such as a play. A folder, or its folder `data/`,
has the files in `train/` and `test/`, or all files in `all_data/`. `fedtune data export` also writes `validation/`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fedtune.data.parts import PARTS
from fedtune.data.problems import Problem
from fedtune.data.reading import reading
from fedtune.errors import InputError

WHOLE = "all_data"
KEYS = ("users", "num_samples", "user_data")
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")


class LeafUser(NamedTuple):
    """The examples of one user in one file."""

    file: Path
    name: str
    x: list[Any]
    y: list[Any]

    @property
    def place(self) -> str:
        """The file and the user, for an error message."""
        return f"{self.file}, user {self.name!r}"


class FileNotes(NamedTuple):
    """What files say in addition to the examples. It is complete when all users have been read."""

    tolerated: list[Problem]  # a warning for each harmless fault
    hierarchies: dict[str, Any]  # what each user belongs to, by the user's name


def find_part_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each part, in order of their names; empty if the folder does not have LEAF's layout."""
    for root in (folder, folder / "data"):
        files = {part: sorted((root / part).glob("*.json")) for part in (*PARTS, WHOLE)}
        if files["train"] and files["test"]:
            return {part: files[part] for part in PARTS if files[part]}
        if files[WHOLE]:
            return {WHOLE: files[WHOLE]}
    return {}


def part_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each part, as in `find_part_files`. Raises InputError if the folder does not have LEAF's layout."""
    if files := find_part_files(folder):
        return files
    raise InputError(f"{folder} must hold train/*.json and test/*.json, or all_data/*.json, got no such files")


def read_users(files: list[Path], notes: FileNotes) -> Iterator[LeafUser]:
    """The users in the files of one part, each one checked. What else the files say is added to `notes`.

    Memory holds the text of one file and the numbers of one user at a time.
    """
    seen: dict[str, Path] = {}
    for file in files:
        for user in _users_of(file, notes):
            if user.name in seen:
                raise InputError(f"{user.place} must be unique, got it also in {seen[user.name]}")
            seen[user.name] = file
            yield user


def _users_of(file: Path, notes: FileNotes) -> Iterator[LeafUser]:
    found: dict[str, Any] = {}
    counts: dict[str, int] = {}
    with reading(file, f"{file} must be JSON in LEAF's form"):
        content = _Json(file.read_text(encoding="utf-8"))
        for key in content.members():
            if key != "user_data":
                found[key] = content.value()
                continue
            found[key] = True
            for name in content.members():
                user = _user(file, name, content.value())
                if name in counts:
                    raise InputError(f"{user.place} must be unique, got it twice")
                counts[name] = len(user.y)
                yield user
        content.end()
    _check_lists(file, found, counts)
    notes.tolerated.extend(_wrong_counts(file, found, counts))
    if "hierarchies" in found:
        _add_hierarchies(file, found["users"], found["hierarchies"], notes)


def _user(file: Path, name: str, data: Any) -> LeafUser:
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in ("x", "y")):
        raise InputError(f"{file}, user {name!r} must have lists x and y")
    if len(data["x"]) != len(data["y"]):
        raise InputError(
            f"{file}, user {name!r}: x and y must be of one length, got {len(data['x'])} and {len(data['y'])}"
        )
    if not data["y"]:
        raise InputError(f"{file}, user {name!r} must have at least 1 example, got none")
    return LeafUser(file, name, data["x"], data["y"])


def _check_lists(file: Path, found: dict[str, Any], counts: dict[str, int]) -> None:
    for key in KEYS:
        if key not in found:
            raise InputError(f"{file} must have the keys {', '.join(KEYS)}, got no {key}")
    users, num_samples = found["users"], found["num_samples"]
    for key in ("users", "num_samples"):
        if not isinstance(found[key], list):
            raise InputError(f"{file}: {key} must be a list, got {found[key]!r:.40}")
    if strange := [user for user in users if not isinstance(user, str)]:
        raise InputError(f"{file}: users must be strings, got {strange[0]!r:.40}")
    if len(users) != len(num_samples):
        raise InputError(f"{file}: users and num_samples must be of one length, got {len(users)}, {len(num_samples)}")
    for where, there, wanted in (("user_data", counts, users), ("users", set(users), counts)):
        if missing := [user for user in wanted if user not in there]:
            raise InputError(f"{file}, user {missing[0]!r} must be in {where}, got no such user")


def _wrong_counts(file: Path, found: dict[str, Any], counts: dict[str, int]) -> list[Problem]:
    """A warning for each user whose num_samples is wrong. LEAF's own number is wrong if LEAF drops windows at a cut."""
    return [
        Problem(
            f"client {user!r}: num_samples must be {counts[user]}, the number of its examples in {file}, got {said}",
            "wrong num_samples",
            user,
            "warning",
        )
        for user, said in zip(found["users"], found["num_samples"], strict=True)
        if said != counts[user]
    ]


def _add_hierarchies(file: Path, users: list[str], hierarchies: Any, notes: FileNotes) -> None:
    """Adds the hierarchies to the notes if there is one for each user, else a warning.

    LEAF's split drops users but keeps their hierarchies, so that nobody knows which user has which.
    """
    if isinstance(hierarchies, list) and len(hierarchies) == len(users):
        notes.hierarchies.update(zip(users, hierarchies, strict=True))
    else:
        got = len(hierarchies) if isinstance(hierarchies, list) else f"{hierarchies!r:.40}"
        message = f"{file}: hierarchies must be a list of one for each of {len(users)} users, got {got}: left out"
        notes.tolerated.append(Problem(message, "hierarchies left out", None, "warning"))


class _Json:
    """A JSON text that is read piece by piece."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def value(self) -> Any:
        """The next value."""
        self._skip()
        value, self.at = DECODER.raw_decode(self.text, self.at)
        return value

    def members(self) -> Iterator[str]:
        """The keys of the next object. The caller reads the value of a key before it asks for another key."""
        self._take("{")
        while not self._next_is("}"):
            key = self.value()
            if not isinstance(key, str):
                raise json.JSONDecodeError("a key must be a string", self.text, self.at)
            self._take(":")
            yield key
            if not self._next_is("}"):
                self._take(",")
        self._take("}")

    def end(self) -> None:
        """Raises an error if the text goes on."""
        self._skip()
        if self.at < len(self.text):
            raise json.JSONDecodeError("Extra data", self.text, self.at)

    def _skip(self) -> None:
        match = SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def _next_is(self, character: str) -> bool:
        self._skip()
        return self.text.startswith(character, self.at)

    def _take(self, character: str) -> None:
        if not self._next_is(character):
            raise json.JSONDecodeError(f"Expecting {character!r}", self.text, self.at)
        self.at += 1
