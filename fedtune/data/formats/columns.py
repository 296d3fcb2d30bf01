"""The columns of a table: features, labels, and their problems."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.data.problems import Problem
from fedtune.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd


MOST_DIFFERENT = 10  # rows in which all labels may be different: a table for a first try


def column_problems(frame: "pd.DataFrame", client: str, label: str, features: Iterable[str]) -> list[Problem]:
    """A problem for each feature that is not a number or has no values, and for a client or label column with gaps."""
    import pandas as pd

    problems = []
    for column in features:
        if frame[column].isna().all():
            message = f"features must have values, got column {column!r} with none in {len(frame)} rows"
            problems.append(Problem(message, "features without values"))
        elif not (pd.api.types.is_numeric_dtype(frame[column]) or pd.api.types.is_bool_dtype(frame[column])):
            texts = frame[column][frame[column].map(lambda value: isinstance(value, str))]
            wrong = texts[pd.to_numeric(texts, errors="coerce").isna()]
            message = (
                f"features must be numbers, got column {column!r} of type {frame[column].dtype}"
                f"{f', such as {wrong.iloc[0]!r}' if len(wrong) else ''}; name the columns to use in features"
            )
            problems.append(Problem(message, "features that are no numbers"))
    for column in (client, label):
        if (missing := frame[column].isna()).any():
            message = (
                f"column {column!r} must have a value in every row, got none in {missing.sum()} of {len(frame)}, "
                f"first in row {missing.argmax() + 1}"
            )
            problems.append(Problem(message, "missing values"))
    return problems


def feature_columns(columns: Iterable[str], client: str, label: str, features: Sequence[str] | None) -> list[str]:
    """The feature columns of a table: `features`, or if it is None all columns except the client and the label."""
    columns = [*columns]
    if twice := _repeated(columns):
        raise InputError(f"a table must name each column once, got {twice!r} twice")
    for column in (client, label, *(features or ())):
        if column not in columns:
            raise UnknownNameError("column", column, columns)
    if client == label:
        raise InputError(f"label must be another column than the client, got {label!r} for both")
    if twice := _repeated(features or ()):
        raise InputError(f"features must name each column once, got {twice!r} twice")
    chosen = [column for column in columns if column not in (client, label)] if features is None else [*features]
    if taken := {client, label} & {*chosen}:
        raise InputError(f"features must be other columns than the client and the label, got {min(taken)!r}")
    if not chosen:
        raise InputError(f"a table must have a column in addition to {client!r} and {label!r}, got none")
    return chosen


def labels_of(column: "pd.Series[Any]", objective: str) -> tuple[np.ndarray, int | None]:
    """The labels as numbers, and how many classes there are; None means the largest label + 1, or a regression."""
    import pandas as pd

    if objective == "regression":
        if not pd.api.types.is_numeric_dtype(column):
            raise InputError(f"the labels of a regression must be numbers, got column of type {column.dtype}")
        return column.to_numpy(np.float32), None
    if objective != "classification":
        raise InputError(f"objective of a table must be 'classification' or 'regression', got {objective!r}")
    if pd.api.types.is_float_dtype(column):
        raise InputError(
            f"labels of a classification must be whole numbers or names, got column {column.name!r} of type "
            f"{column.dtype}; for real targets set objective = 'regression'"
        )
    codes, names = pd.factorize(column, sort=True)
    if len(names) == 1:
        lone = names.tolist()[0]
        raise InputError(
            f"labels of a classification must be of two classes or more, got {lone!r} in every row of column "
            f"{column.name!r}"
        )
    if len(names) == len(column) > MOST_DIFFERENT:
        raise InputError(
            f"labels of a classification must repeat, got {len(names)} different ones in the {len(column)} rows of "
            f"column {column.name!r}; for a number to predict set objective = 'regression'"
        )
    if pd.api.types.is_integer_dtype(column) and column.min() >= 0:
        return column.to_numpy(np.int64), None
    return codes.astype(np.int64), len(names)


def _repeated(names: Sequence[str]) -> str | None:
    """The first name that stands in the list twice; None if there is none."""
    return next((name for name, count in Counter(names).items() if count > 1), None)
