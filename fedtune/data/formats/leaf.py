"""Data sets in the JSON form of LEAF, whose files `fedtune.data.formats.leaf_files` describes and reads.

LEAF has no validation part: it is cut from train, a tenth of the client's whole, at random. Of strings, which are
windows of a text, it is the end of train, and before it as many windows are dropped as a window has characters, so that
the parts share none. `fedtune data export` writes two things more: `validation/`, and `fedtune.json`, which holds what
the form cannot.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedtune import rng
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.formats.leaf_files import WHOLE, Beside, LeafUser, find_part_files, part_files, read_users
from fedtune.data.formats.text import UNKNOWN, encode_characters
from fedtune.data.parts import PARTS, part_sizes
from fedtune.data.problems import Problem
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError

EXTRA = "fedtune.json"
LARGE = 40 << 20  # bytes: an array that starts so large grows by moving its pages (glibc), without a second copy
Range = tuple[int, int]  # [start, stop) into the rows
Parts = dict[str, dict[str, Range]]  # by part and user


@dataclass(frozen=True)
class Form:
    """What the examples become."""

    characters: bool
    input_shape: tuple[int, ...]
    x_dtype: np.dtype
    target_shape: tuple[int, ...]
    y_dtype: np.dtype


def is_leaf_folder(path: str | Path) -> bool:
    """Whether a folder has LEAF's layout."""
    return bool(find_part_files(Path(path)))


def from_leaf(
    path: str | Path,
    *,
    name: str | None = None,
    input_shape: list[int] | None = None,
    input_kind: Literal["real", "token"] | None = None,
    num_classes: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> FederatedDataset:
    """The data set in a folder of LEAF's layout; what was wrong but tolerated stands in its `tolerated`.

    `input_shape` is an example's, such as [28, 28], where it is not that of the lists. `input_kind` None means "token"
    for strings, else "real". `num_classes` None means the largest label + 1, or with strings LEAF's 80 characters and
    an unknown one. `seed` draws the validation part. A folder that fedtune wrote says all this but its name itself.
    """
    folder = Path(path)
    extra = _read_extra(folder)
    form = _saved_form(extra) if extra else None
    rows: _Rows | None = None
    parts: Parts = {}
    beside = Beside([], {})
    for part, files in part_files(folder).items():
        found = parts[part] = {}
        for user in read_users(files, beside):
            form = form or _form_of(user, input_shape, input_kind)
            rows = rows or _Rows(form)
            found[user.name] = rows.add(*pair(user, form))
    if form is None or rows is None:
        raise InputError(f"{folder} must hold at least one user, got none")
    rows.trim()
    if extra:
        client_ids, spec = extra["client_ids"], _saved_spec(extra)
        if strangers := set().union(*parts.values()).difference(client_ids):
            raise InputError(f"{folder / EXTRA} must name every user in client_ids, got no {min(strangers)!r}")
        none = (rows.count, rows.count)
        ranges = [[parts.get(part, {}).get(client, none) for part in PARTS] for client in client_ids]
    else:
        client_ids, ranges = _three_parts(parts, rows, form, seed, beside.tolerated)
        if not client_ids:
            raise InputError(
                f"{folder}: a user must have examples in train and in test, enough to cut validation from train; none "
                f"of the {len(set().union(*parts.values()))} users has (split by sample, not by user)"
            )
        if num_classes is None:
            num_classes = UNKNOWN + 1 if form.characters else max(int(rows.y.max()) + 1, 1)
        kind = input_kind or ("token" if form.characters else "real")
        spec = DatasetSpec(form.input_shape, kind, num_classes, scale)
    return FederatedDataset(
        name or (extra["name"] if extra else folder.resolve().name),
        spec,
        rows.x,
        rows.y,
        client_ids,
        np.array(ranges, np.int64),
        characters=form.characters,
        hierarchies=[beside.hierarchies.get(client) for client in client_ids] if beside.hierarchies else None,
        tolerated=beside.tolerated,
    )


class _Rows:
    """All examples, in arrays that grow at their end; an eighth of them may be spare, so that they seldom move."""

    def __init__(self, form: Form) -> None:
        self.x = np.empty((0, *form.input_shape), form.x_dtype)
        self.y = np.empty((0, *form.target_shape), form.y_dtype)
        self.count = 0

    def add(self, x: np.ndarray, y: np.ndarray) -> Range:
        """Where the new examples stand."""
        start, self.count = self.count, self.count + len(y)
        if self.count > len(self.x):
            self._resize(max(self.count + self.count // 8, LARGE // (x[0].nbytes + y[0].nbytes)))
        self.x[start : self.count], self.y[start : self.count] = x, y
        return start, self.count

    def trim(self) -> None:
        """Gives back what is spare, when all examples are there."""
        self._resize(self.count)

    def _resize(self, count: int) -> None:
        for array in (self.x, self.y):
            array.resize((count, *array.shape[1:]), refcheck=False)  # in place: nobody holds a view


def pair(user: LeafUser, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """The user's (x, y), checked."""
    return _inputs(user, form), _labels(user, form)


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
    return Form(characters, shape, kind, (), np.dtype(np.int64))


def _inputs(user: LeafUser, form: Form) -> np.ndarray:
    if form.characters:
        if not all(isinstance(text, str) and len(text) == form.input_shape[0] for text in user.x):
            raise InputError(
                f"{user.place}: x must hold strings of {form.input_shape[0]} characters, as the first user's do"
            )
        return encode_characters("".join(user.x)).reshape(-1, *form.input_shape)
    try:
        given = np.asarray(user.x)
    except (ValueError, OverflowError):
        raise InputError(f"{user.place}: x must hold examples of one shape, got others") from None
    if given.dtype.kind not in ("iu" if form.x_dtype.kind in "iu" else "iuf"):
        wanted = "whole numbers" if form.x_dtype.kind in "iu" else "numbers, or strings of one length each"
        raise InputError(f"{user.place}: x must hold {wanted}, got {user.x[0]!r:.40}")
    if given[0].size != np.prod(form.input_shape, dtype=int):
        raise InputError(f"{user.place}: an example must have shape {form.input_shape}, got {given.shape[1:]}")
    return _exactly(given, form.x_dtype, user.place).reshape(-1, *form.input_shape)


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
    if given.shape[1:] != form.target_shape:
        wanted = f"shape {form.target_shape}"
        raise InputError(f"{user.place}: the labels of an example must have {wanted}, got {given.shape[1:]}")
    return _exactly(given, form.y_dtype, user.place)


def _exactly(given: np.ndarray, dtype: np.dtype, place: str) -> np.ndarray:
    """The numbers in a dtype, whole ones only if it holds them."""
    if dtype.kind in "iu" and given.size:
        limits = np.iinfo(dtype)
        if given.min() < limits.min or given.max() > limits.max:
            raise InputError(f"{place}: whole numbers must be in {limits.min}..{limits.max}, got others")
    return given.astype(dtype)


def _three_parts(
    parts: Parts, rows: _Rows, form: Form, seed: int, tolerated: list[Problem]
) -> tuple[list[str], list[list[Range]]]:
    """The clients that have, or can be given, all three parts; the others are left out with a warning."""
    kept: list[str] = []
    ranges: list[list[Range]] = []
    for user in dict.fromkeys(user for found in parts.values() for user in found):
        held = {part: found[user] for part, found in parts.items() if user in found}
        missing = [part for part in parts if part not in held]
        gap = form.input_shape[0] if form.characters else None
        cut = None if missing else _split(held, rows, gap, rng.stream(seed, "split", len(kept)))
        if cut is None:
            whole = sum(stop - start for start, stop in held.values())
            why = f"none in {missing[0]}" if missing else f"{whole} in all, too few"
            message = f"client {user!r}: left out, it must have examples in all parts, got {why}"
            tolerated.append(Problem(message, "clients left out", user, "warning"))
        else:
            kept.append(user)
            ranges.append(cut)
    return kept, ranges


def _split(held: dict[str, Range], rows: _Rows, gap: int | None, generator: np.random.Generator) -> list[Range] | None:
    """The client's three parts; None if it has too few examples. With a gap, the parts follow in time.

    Without one, what is split is sorted by part, where it stands.
    """
    if "validation" in held:
        return [held[part] for part in PARTS]
    start, stop = held["train"] if "train" in held else held[WHOLE]
    skipped = (gap or 0) * (2 if WHOLE in held else 1)
    if WHOLE in held:
        train, validation, test = part_sizes(np.array([max(0, stop - start - skipped)]))[0].tolist()
    else:
        whole = sum(last - first for first, last in held.values())
        validation, test = max(1, round(whole / 10)), 0
        train = stop - start - skipped - validation
    if min(train, validation) < 1 or (WHOLE in held and test < 1):
        return None
    if gap is None:
        pieces = np.split(start + generator.permutation(stop - start), [train, train + validation])
        order = np.concatenate([np.sort(piece) for piece in pieces])
        rows.x[start:stop], rows.y[start:stop] = rows.x[order], rows.y[order]
    first = start + train + (gap or 0)
    cut = [(start, start + train), (first, first + validation), (stop - test, stop)]
    return cut if WHOLE in held else [*cut[:2], held["test"]]


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
    input_shape, target_shape = (tuple(extra["spec"][name]) for name in ("input_shape", "target_shape"))
    x_dtype, y_dtype = np.dtype(extra["x_dtype"]), np.dtype(extra["y_dtype"])
    return Form(extra["characters"], input_shape, x_dtype, target_shape, y_dtype)
