"""Data sets in the JSON form of LEAF. `fedtune.data.formats.leaf_files` describes and reads the files.

LEAF has no validation part. It is cut from train, and has a tenth of all the client's examples, drawn at random. If the
examples are strings, they are windows of a text: then validation is the end of train, and the windows before it are
dropped, as many as a window has characters, so that the two parts share no character. `fedtune data export` also writes
`validation/`, and `fedtune.json`, which holds what LEAF's form can't hold.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from fedtune import rng
from fedtune.data.federated_dataset import FederatedDataset, LeafNotes
from fedtune.data.formats.leaf_arrays import Form, arrays_of, form_of
from fedtune.data.formats.leaf_files import WHOLE, FileNotes, find_part_files, part_files, read_users
from fedtune.data.formats.text import CHARACTER_CLASSES
from fedtune.data.parts import PARTS, part_sizes
from fedtune.data.problems import Problem
from fedtune.data.reading import reading
from fedtune.data.spec import DatasetSpec, count_classes
from fedtune.errors import InputError

EXTRA = "fedtune.json"
LARGE = 40 << 20  # bytes: an array that starts so large grows by moving its pages (glibc), without a second copy
Range = tuple[int, int]  # [start, stop) into the rows
Parts = dict[str, dict[str, Range]]  # by part and user


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
    """The data set in a folder of LEAF's layout; its `tolerated` holds a warning for each harmless fault of the files.

    `input_shape` is the shape of one example, such as [28, 28]; None means the shape of the lists in the files.
    `input_kind` None means "token" for strings and "real" for numbers. `num_classes` None means LEAF's 80 characters
    and one class for all others if the examples are strings, else the largest label + 1. `seed` draws the validation
    part. A folder that fedtune wrote says all this itself; of such a folder only the `name` can be changed.
    """
    folder = Path(path)
    extra = _read_extra(folder)
    form = _saved_form(extra) if extra else None
    rows: _Rows | None = None
    parts: Parts = {}
    notes = FileNotes([], {})
    for part, files in part_files(folder).items():
        found = parts[part] = {}
        for user in read_users(files, notes):
            form = form or form_of(user, input_shape, input_kind)
            rows = rows or _Rows(form)
            found[user.name] = rows.add(*arrays_of(user, form))
    if form is None or rows is None:
        raise InputError(f"{folder} must hold at least one user, got none")
    rows.trim()
    if extra:
        spec = _saved_spec(extra)
        client_ids, ranges = _saved_parts(folder, extra, parts, rows.count)
    else:
        client_ids, ranges = _three_parts(folder, parts, rows, form, seed, notes.tolerated)
        kind = input_kind or ("token" if form.characters else "real")
        if num_classes is None and form.characters:
            num_classes = CHARACTER_CLASSES
        spec = DatasetSpec(form.input_shape, kind, count_classes(rows.y, num_classes), scale)
    known = notes.hierarchies
    hierarchies = [known.get(client) for client in client_ids] if known else None
    return FederatedDataset(
        name or (extra["name"] if extra else folder.resolve().name),
        spec,
        rows.x,
        rows.y,
        client_ids,
        np.array(ranges, np.int64),
        leaf=LeafNotes(form.characters, hierarchies),
        tolerated=notes.tolerated,
    )


class _Rows:
    """All examples, in arrays that grow at their end. An eighth of the rows may be spare, so that they seldom move."""

    def __init__(self, form: Form) -> None:
        self.x = np.empty((0, *form.input_shape), form.x_dtype)
        self.y = np.empty((0, *form.target_shape), form.y_dtype)
        self.count = 0

    def add(self, x: np.ndarray, y: np.ndarray) -> Range:
        """The rows of the new examples, after they were appended."""
        start, self.count = self.count, self.count + len(y)
        if self.count > len(self.x):
            self._resize(max(self.count + self.count // 8, LARGE // (x[0].nbytes + y[0].nbytes)))
        self.x[start : self.count], self.y[start : self.count] = x, y
        return start, self.count

    def trim(self) -> None:
        """Frees the spare rows; call it after the last `add`."""
        self._resize(self.count)

    def _resize(self, count: int) -> None:
        for array in (self.x, self.y):
            array.resize((count, *array.shape[1:]), refcheck=False)  # in place: nobody holds a view


def _three_parts(
    folder: Path, parts: Parts, rows: _Rows, form: Form, seed: int, tolerated: list[Problem]
) -> tuple[list[str], list[list[Range]]]:
    """The clients that can have three parts, and these parts; the other clients are left out with a warning."""
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
    if not kept:
        num_users = len(set().union(*parts.values()))
        raise InputError(
            f"{folder}: a user must have examples in train and in test, enough to cut validation from train; none of "
            f"the {num_users} users has (split by sample, not by user)"
        )
    return kept, ranges


def _split(held: dict[str, Range], rows: _Rows, gap: int | None, generator: np.random.Generator) -> list[Range] | None:
    """The client's three parts; None if it has too few examples.

    With a `gap` the parts follow each other in time, and `gap` examples are dropped at each new cut. Without a gap the
    parts are drawn at random, and the client's rows are put in the order of the parts.
    """
    if "validation" in held:
        return [held[part] for part in PARTS]
    # How many examples each part gets.
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
    # Which examples these are.
    if gap is None:
        pieces = np.split(start + generator.permutation(stop - start), [train, train + validation])
        order = np.concatenate([np.sort(piece) for piece in pieces])
        rows.x[start:stop], rows.y[start:stop] = rows.x[order], rows.y[order]
    first = start + train + (gap or 0)
    cut = [(start, start + train), (first, first + validation), (stop - test, stop)]
    return cut if WHOLE in held else [*cut[:2], held["test"]]


def _read_extra(folder: Path) -> dict[str, Any] | None:
    """The content of `fedtune.json`; None if another program wrote the folder, so that there is no such file."""
    file = folder / EXTRA
    if not file.exists():
        return None
    with reading(file, f"{file} must be as `fedtune data export` wrote it"):
        extra = json.loads(file.read_text(encoding="utf-8"))
        # A file of somebody else may hold any JSON: what is missing or has another type raises here, not later.
        _saved_spec(extra), _saved_form(extra)
        if not isinstance(extra["name"], str) or not all(isinstance(name, str) for name in extra["client_ids"]):
            raise TypeError("name and client_ids must be strings")
    return dict(extra)


def _saved_parts(
    folder: Path, extra: dict[str, Any], parts: Parts, num_rows: int
) -> tuple[list[str], list[list[Range]]]:
    """The clients that fedtune saved, and their parts; a part without examples is empty."""
    client_ids = extra["client_ids"]
    if strangers := set().union(*parts.values()).difference(client_ids):
        raise InputError(f"{folder / EXTRA} must name every user in client_ids, got no {min(strangers)!r}")
    none = (num_rows, num_rows)
    return client_ids, [[parts.get(part, {}).get(client, none) for part in PARTS] for client in client_ids]


def _saved_spec(extra: Any) -> DatasetSpec:
    spec = TypeAdapter(DatasetSpec).validate_json(json.dumps(extra["spec"]), strict=True)
    if min([0, *spec.input_shape, *spec.target_shape]) < 0:
        raise ValueError("shapes must not be negative")
    return spec


def _saved_form(extra: Any) -> Form:
    input_shape, target_shape = (tuple(extra["spec"][name]) for name in ("input_shape", "target_shape"))
    x_dtype, y_dtype = np.dtype(extra["x_dtype"]), np.dtype(extra["y_dtype"])
    if {x_dtype.kind, y_dtype.kind} - set("uif"):
        raise TypeError(f"x and y must hold numbers, got {x_dtype} and {y_dtype}")
    return Form(bool(extra["characters"]), input_shape, x_dtype, target_shape, y_dtype)
