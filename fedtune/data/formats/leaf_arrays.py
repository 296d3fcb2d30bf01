"""The lists in LEAF's files as arrays."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedtune.data.formats.leaf_files import FileNotes, LeafUser, part_files, read_users
from fedtune.data.formats.text import encode_characters
from fedtune.data.problems import Problem
from fedtune.errors import InputError


@dataclass(frozen=True)
class Form:
    """The shapes and types of a data set's arrays."""

    characters: bool  # whether x and y are strings in the files, which become tokens
    input_shape: tuple[int, ...]  # of one example
    x_dtype: np.dtype
    target_shape: tuple[int, ...]  # of one example's labels
    y_dtype: np.dtype


class LeafArrays(NamedTuple):
    """The examples of one user in one file."""

    user: str
    place: str  # the file and the user, for an error message
    x: np.ndarray  # (example, *input_shape), float32
    y: np.ndarray  # (example,), int64


def read_leaf(folder: str | Path, input_shape: tuple[int, ...], tolerated: list[Problem]) -> Iterator[LeafArrays]:
    """The examples of every user in the files of a LEAF folder, file by file, for a data set that makes its own parts.

    A user who has examples in several parts comes several times. One user's numbers are held at a time. A warning for
    each harmless fault of the files is added to `tolerated`. `from_leaf` makes a data set of such a folder as it is.
    """
    form = Form(False, input_shape, np.dtype(np.float32), (), np.dtype(np.int64))
    notes = FileNotes(tolerated, {})
    for files in part_files(Path(folder)).values():
        for user in read_users(files, notes):
            yield LeafArrays(user.name, user.place, *arrays_of(user, form))


def arrays_of(user: LeafUser, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """The user's x and y in the form. Raises InputError, which names the file and the user, if they do not fit."""
    return _inputs(user, form), _labels(user, form)


def form_of(user: LeafUser, input_shape: list[int] | None, input_kind: str | None) -> Form:
    """The form of a data set whose first user this is; `input_shape` and `input_kind` as in `from_leaf`."""
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
    if 0 in shape:
        raise InputError(f"{user.place}: an example must hold a number or more, got shape {shape}")
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
    """The numbers in a dtype. Raises InputError if a dtype of whole numbers is too small for them."""
    if dtype.kind in "iu" and given.size:
        limits = np.iinfo(dtype)
        if given.min() < limits.min or given.max() > limits.max:
            raise InputError(f"{place}: whole numbers must be in {limits.min}..{limits.max}, got others")
    return given.astype(dtype)
