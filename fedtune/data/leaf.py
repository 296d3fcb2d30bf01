"""Data sets in the JSON form of LEAF (Caldas et al. 2018, arXiv 1812.01097), read user by user.

A file is `{"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}}}`. A folder has files in
`train/` and `test/`, or all in `all_data/`, either in it or in its `data/`. LEAF has no validation part: it is cut
from train, a tenth of the client's whole, at random. Of strings, which are windows of a text, it is the end of train,
and before it as many windows are dropped as a window has characters, so that the parts share none. `fedtune data
export` writes two things more: `validation/`, and `fedtune.json`, which holds what the form cannot.
"""

import json
import logging
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from fedtune import rng
from fedtune.data.checks import Problem, first_of
from fedtune.data.federated_dataset import PARTS, DatasetSpec, FederatedDataset, part_sizes
from fedtune.data.text import UNKNOWN, encode_characters
from fedtune.errors import InputError

WHOLE = "all_data"
EXTRA = "fedtune.json"
KEYS = ("users", "num_samples", "user_data")
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")
Pair = tuple[np.ndarray, np.ndarray]


class LeafUser(NamedTuple):
    """What one file says of one user."""

    file: Path
    name: str
    x: list[Any]
    y: list[Any]

    @property
    def place(self) -> str:
        """Where an error is, for its message."""
        return f"{self.file}, user {self.name!r}"


@dataclass(frozen=True)
class Form:
    """What the examples become."""

    characters: bool
    shape: tuple[int, ...]
    x_dtype: np.dtype
    y_dtype: np.dtype


def is_leaf_folder(path: str | Path) -> bool:
    """Whether a folder has LEAF's layout."""
    return bool(find_part_files(Path(path)))


def load_leaf(
    path: str | Path,
    *,
    name: str | None = None,
    input_shape: list[int] | None = None,
    input_kind: Literal["real", "token"] | None = None,
    num_classes: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> FederatedDataset:
    """The data set in a folder of LEAF's layout; what was tolerated is logged in one line.

    `input_shape` is an example's, such as [28, 28], where it is not that of the lists. `input_kind` None means "token"
    for strings, else "real". `num_classes` None means the largest label + 1, or with strings LEAF's 80 characters and
    an unknown one. `seed` draws the validation part. A folder that fedtune wrote says all this but its name itself.
    """
    dataset, problems = read_leaf(
        path,
        name=name,
        input_shape=input_shape,
        input_kind=input_kind,
        num_classes=num_classes,
        scale=scale,
        seed=seed,
    )
    if problems:
        logging.getLogger(__name__).warning("%s: %s", path, first_of(problems))
    return dataset


def read_leaf(
    path: str | Path,
    *,
    name: str | None = None,
    input_shape: list[int] | None = None,
    input_kind: Literal["real", "token"] | None = None,
    num_classes: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> tuple[FederatedDataset, list[Problem]]:
    """The data set of `load_leaf`, and a warning for each thing that was tolerated."""
    folder = Path(path)
    extra = _read_extra(folder)
    form = _saved_form(extra) if extra else None
    problems: list[Problem] = []
    parts: dict[str, dict[str, Pair]] = {}
    for part, files in part_files(folder).items():
        examples = parts[part] = {}
        for user in read_users(files, problems):
            form = form or _form_of(user, input_shape, input_kind)
            examples[user.name] = pair(user, form)
    if form is None:
        raise InputError(f"{folder} must hold at least one user, got none")
    if extra:
        client_ids, spec = extra["client_ids"], _saved_spec(extra)
        if strangers := set().union(*parts.values()).difference(client_ids):
            raise InputError(f"{folder / EXTRA} must name every user in client_ids, got no {min(strangers)!r}")
        empty = (np.empty((0, *form.shape), form.x_dtype), np.empty((0, *_label_shape(parts)), form.y_dtype))
        clients = deque([parts.get(part, {}).pop(client, empty) for part in PARTS] for client in client_ids)
        x, y, ranges = _join(clients)
        return FederatedDataset(name or extra["name"], spec, x, y, client_ids, ranges), problems
    client_ids, pairs = _three_parts(parts, form, seed, problems)
    if not client_ids:
        raise InputError(
            f"{folder}: a user must have examples in train and in test, enough to cut validation from train; none of "
            f"the {len(set().union(*parts.values()))} users has (split by sample, not by user)"
        )
    x, y, ranges = _join(pairs)
    if num_classes is None:
        num_classes = UNKNOWN + 1 if form.characters else max(int(y.max()) + 1, 1)
    kind = input_kind or ("token" if form.characters else "real")
    spec = DatasetSpec(x.shape[1:], kind, num_classes, scale)
    return FederatedDataset(name or folder.resolve().name, spec, x, y, client_ids, ranges), problems


def read_users(files: list[Path], problems: list[Problem]) -> Iterator[LeafUser]:
    """The users of one part's files, each checked; a wrong num_samples is added to the problems.

    At a time, the text of one file is held, and the numbers of one user.
    """
    seen: dict[str, Path] = {}
    for file in files:
        counts: dict[str, int] = {}
        for user in _users_of(file, counts, problems):
            if user.name in seen:
                raise InputError(f"{user.place} must be unique, got it also in {seen[user.name]}")
            seen[user.name] = file
            yield user


def _users_of(file: Path, counts: dict[str, int], problems: list[Problem]) -> Iterator[LeafUser]:
    found: dict[str, Any] = {}
    try:
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
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file} must be JSON in LEAF's form: {error}") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    problems += _tolerated(file, found, counts)


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


def _tolerated(file: Path, found: dict[str, Any], counts: dict[str, int]) -> list[Problem]:
    """A warning for each user whose num_samples is wrong; LEAF's own is, where it drops windows at a cut."""
    for key in KEYS:
        if key not in found:
            raise InputError(f"{file} must have the keys {', '.join(KEYS)}, got no {key}")
    users, num_samples = found["users"], found["num_samples"]
    for key in ("users", "num_samples"):
        if not isinstance(found[key], list):
            raise InputError(f"{file}: {key} must be a list, got {found[key]!r:.40}")
    if len(users) != len(num_samples):
        raise InputError(f"{file}: users and num_samples must be of one length, got {len(users)}, {len(num_samples)}")
    for user in [user for user in users if user not in counts] or [user for user in counts if user not in set(users)]:
        where = "user_data" if user not in counts else "users"
        raise InputError(f"{file}, user {user!r} must be in {where}, got no such user")
    return [
        Problem(
            f"client {user!r}: num_samples must be {counts[user]}, the number of its examples in {file}, got {said}",
            "wrong num_samples",
            user,
            "warning",
        )
        for user, said in zip(users, num_samples, strict=True)
        if said != counts[user]
    ]


class _Json:
    """A JSON text read a piece at a time."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def value(self) -> Any:
        """The value that stands here."""
        self._skip()
        value, self.at = DECODER.raw_decode(self.text, self.at)
        return value

    def members(self) -> Iterator[str]:
        """The keys of the object that stands here; each one's value is read before the next key is asked for."""
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
        """Nothing more may stand here."""
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


def find_part_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each part, in order of their names; empty if the folder has not LEAF's layout."""
    for root in (folder, folder / "data"):
        files = {part: sorted((root / part).glob("*.json")) for part in (*PARTS, WHOLE)}
        if files["train"] and files["test"]:
            return {part: files[part] for part in PARTS if files[part]}
        if files[WHOLE]:
            return {WHOLE: files[WHOLE]}
    return {}


def part_files(folder: Path) -> dict[str, list[Path]]:
    if files := find_part_files(folder):
        return files
    raise InputError(f"{folder} must hold train/*.json and test/*.json, or all_data/*.json, got no such files")


def _form_of(user: LeafUser, input_shape: list[int] | None, input_kind: str | None) -> Form:
    characters = isinstance(user.x[0], str)
    if characters:
        shape: tuple[int, ...] = (len(user.x[0]),)
    elif input_shape is not None:
        shape = tuple(input_shape)
    else:
        try:
            shape = np.shape(user.x[0])
        except ValueError:
            shape = ()
    kind = np.dtype(np.uint8 if characters else np.int32 if input_kind == "token" else np.float32)
    return Form(characters, shape, kind, np.dtype(np.int64))


def pair(user: LeafUser, form: Form) -> Pair:
    return _inputs(user, form), _labels(user, form)


def _inputs(user: LeafUser, form: Form) -> np.ndarray:
    if form.characters:
        if not all(isinstance(text, str) and len(text) == form.shape[0] for text in user.x):
            raise InputError(f"{user.place}: x must hold strings of {form.shape[0]} characters, as the first user's do")
        return encode_characters("".join(user.x)).reshape(-1, *form.shape)
    try:
        given = np.asarray(user.x)
    except (ValueError, OverflowError):
        raise InputError(f"{user.place}: x must hold examples of one shape, got others") from None
    if given.dtype.kind not in ("iu" if form.x_dtype.kind in "iu" else "iuf"):
        wanted = "whole numbers" if form.x_dtype.kind in "iu" else "numbers, or strings of one length each"
        raise InputError(f"{user.place}: x must hold {wanted}, got {user.x[0]!r:.40}")
    if given[0].size != np.prod(form.shape, dtype=int):
        raise InputError(f"{user.place}: an example must have shape {form.shape}, got {given.shape[1:]}")
    return _exactly(given, form.x_dtype, user.place).reshape(-1, *form.shape)


def _labels(user: LeafUser, form: Form) -> np.ndarray:
    if form.characters:
        if not all(isinstance(text, str) and len(text) == 1 for text in user.y):
            raise InputError(f"{user.place}: y must hold strings of 1 character, got others")
        return encode_characters("".join(user.y)).astype(form.y_dtype)
    try:
        given = np.asarray(user.y)
    except (ValueError, OverflowError):
        raise InputError(f"{user.place}: y must hold labels of one shape, got others") from None
    if given.dtype.kind not in ("iu" if form.y_dtype.kind == "i" else "iuf"):
        raise InputError(f"{user.place}: labels must be whole numbers, got {user.y[0]!r:.40}")
    return _exactly(given, form.y_dtype, user.place)


def _exactly(given: np.ndarray, dtype: np.dtype, place: str) -> np.ndarray:
    """The numbers in a dtype, whole ones only if it holds them."""
    if dtype.kind in "iu" and given.size:
        limits = np.iinfo(dtype)
        if given.min() < limits.min or given.max() > limits.max:
            raise InputError(f"{place}: whole numbers must be in {limits.min}..{limits.max}, got others")
    return given.astype(dtype)


def _three_parts(
    parts: dict[str, dict[str, Pair]], form: Form, seed: int, problems: list[Problem]
) -> tuple[list[str], deque[list[Pair]]]:
    """The clients that have, or can be given, all three parts; the others are left out with a warning."""
    kept: list[str] = []
    clients: deque[list[Pair]] = deque()
    for user in dict.fromkeys(user for examples in parts.values() for user in examples):
        held = {part: examples.pop(user) for part, examples in parts.items() if user in examples}
        missing = [part for part in parts if part not in held]
        gap = form.shape[0] if form.characters else None
        pairs = None if missing else _split(held, gap, rng.stream(seed, "split", len(kept)))
        if pairs is None:
            why = f"none in {missing[0]}" if missing else f"{sum(len(y) for _, y in held.values())} in all, too few"
            message = f"client {user!r}: left out, it must have examples in all parts, got {why}"
            problems.append(Problem(message, "clients left out", user, "warning"))
        else:
            kept.append(user)
            clients.append(pairs)
    return kept, clients


def _split(held: dict[str, Pair], gap: int | None, generator: np.random.Generator) -> list[Pair] | None:
    """The client's three parts; None if it has too few examples. With a gap, the parts follow in time."""
    if "validation" in held:
        return [held[part] for part in PARTS]
    whole = sum(len(y) for _, y in held.values())
    x, y = held["train"] if "train" in held else held[WHOLE]
    skipped = (gap or 0) * (2 if WHOLE in held else 1)
    if WHOLE in held:
        train, validation, test = part_sizes(np.array([max(0, whole - skipped)]))[0].tolist()
    else:
        validation, test = max(1, round(whole / 10)), 0
        train = len(y) - skipped - validation
    if min(train, validation) < 1 or (WHOLE in held and test < 1):
        return None
    order = generator.permutation(len(y)) if gap is None else np.arange(len(y))
    starts = [0, train + (gap or 0), len(y) - test]
    sizes = [train, validation, test]
    chosen = [np.sort(order[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    cut = [(x[indices], y[indices]) for indices in chosen]
    return cut if WHOLE in held else [*cut[:2], held["test"]]


def _join(clients: deque[list[Pair]]) -> tuple[np.ndarray, np.ndarray, Int64[np.ndarray, "client 3 2"]]:
    """All examples in one row, and where the parts lie; the clients' own arrays are freed on the way."""
    sizes = np.array([[len(y) for _, y in pairs] for pairs in clients], np.int64)
    first_x, first_y = clients[0][0]
    x = np.empty((sizes.sum(), *first_x.shape[1:]), first_x.dtype)
    y = np.empty((sizes.sum(), *first_y.shape[1:]), first_y.dtype)
    ends = sizes.cumsum().reshape(sizes.shape)
    for places in ends - sizes:
        for start, (part_x, part_y) in zip(places, clients.popleft(), strict=True):
            x[start : start + len(part_y)], y[start : start + len(part_y)] = part_x, part_y
    return x, y, np.stack([ends - sizes, ends], axis=2)


def _label_shape(parts: dict[str, dict[str, Pair]]) -> tuple[int, ...]:
    """The shape of one label: (), but for a next token at each position."""
    return next(y.shape[1:] for examples in parts.values() for _, y in examples.values())


def _read_extra(folder: Path) -> dict[str, Any] | None:
    """What fedtune saved beside the files; None if the folder is another program's."""
    file = folder / EXTRA
    if not file.exists():
        return None
    try:
        extra = json.loads(file.read_text(encoding="utf-8"))
        _saved_spec(extra), _saved_form(extra), extra["name"], list[str](extra["client_ids"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} must be as `fedtune data export` wrote it, got {error!r}") from None
    return dict(extra)


def _saved_spec(extra: dict[str, Any]) -> DatasetSpec:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in extra["spec"].items()
    }
    return DatasetSpec(**fields)


def _saved_form(extra: dict[str, Any]) -> Form:
    shape = tuple(extra["spec"]["input_shape"])
    return Form(extra["characters"], shape, np.dtype(extra["x_dtype"]), np.dtype(extra["y_dtype"]))
