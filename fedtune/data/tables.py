"""Tables as data sets: a pandas DataFrame, or a CSV or Parquet file, with a row an example and a client column."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet")


def load_table(
    path: str | Path,
    *,
    client: str,
    label: str,
    features: Sequence[str] | None = None,
    objective: str = "classification",
    standardize: bool = True,
    seed: int = 0,
) -> FederatedDataset:
    """The data set of a CSV or Parquet file; the options are those of `from_frame`."""
    path = Path(path)
    return from_frame(
        read_frame(path),
        client=client,
        label=label,
        features=features,
        objective=objective,
        standardize=standardize,
        seed=seed,
        name=path.stem,
    )


def read_frame(path: Path) -> "pd.DataFrame":
    """The table in a file. Raises InputError where it can't be read."""
    import pandas as pd  # not above: worker processes never need it

    if path.suffix not in SUFFIXES:
        raise InputError(f"a table must be a file that ends in {' or '.join(SUFFIXES)}, got {path}")
    try:
        return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError, pd.errors.ParserError) as error:  # pyarrow's errors are ValueErrors
        raise InputError(f"the table {path} can't be read: {' '.join(str(error).split())}") from error


def from_frame(
    frame: "pd.DataFrame",
    *,
    client: str,
    label: str,
    features: Sequence[str] | None = None,
    objective: str = "classification",
    standardize: bool = True,
    name: str = "table",
    **options: Any,
) -> FederatedDataset:
    """The data set of a table: its clients by the column `client`, in order of their names, what to predict in `label`.

    `features` None means all other columns, which must hold numbers. With `standardize` each is brought to mean 0 and
    variance 1 over the whole table. Labels of a classification that are whole numbers from 0 are classes as they stand;
    others, such as strings, are numbered in their order. The further options are those of
    `FederatedDataset.from_clients`.
    """
    import pandas as pd

    for column in (client, label, *(features or ())):
        if column not in frame.columns:
            raise UnknownNameError("column", column, frame.columns)
    chosen = [column for column in frame.columns if column not in (client, label)] if features is None else [*features]
    if not chosen:
        raise InputError(f"a table must have a column beside {client!r} and {label!r}, got none")
    for column in chosen:
        if not (pd.api.types.is_numeric_dtype(frame[column]) or pd.api.types.is_bool_dtype(frame[column])):
            raise InputError(
                f"features must be numbers, got column {column!r} of type {frame[column].dtype}; name the columns to "
                "use in features"
            )
    for column in (client, label):
        if missing := int(frame[column].isna().sum()):
            raise InputError(f"column {column!r} must have a value in every row, got none in {missing} of {len(frame)}")
    if frame.empty:
        raise InputError("a table must have at least one row, got none")
    x = frame[chosen].to_numpy(np.float32, na_value=np.nan)
    if standardize:
        std = x.std(axis=0, dtype=np.float64)
        std[~(std > 0)] = 1.0  # constant, or not finite: the check names its clients
        x = ((x - x.mean(axis=0, dtype=np.float64)) / std).astype(np.float32)
    y, num_classes = _labels(frame[label], objective)
    codes, names = pd.factorize(frame[client], sort=True)
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    clients = {client_id: (x[rows], y[rows]) for client_id, rows in zip(names.tolist(), groups, strict=True)}
    return FederatedDataset.from_clients(
        clients, name=name, objective=objective, **{"num_classes": num_classes, **options}
    )


def _labels(column: "pd.Series[Any]", objective: str) -> tuple[np.ndarray, int | None]:
    """The labels as numbers, and how many classes there are; None leaves that to the largest."""
    import pandas as pd

    if objective == "regression":
        if not pd.api.types.is_numeric_dtype(column):
            raise InputError(f"the labels of a regression must be numbers, got column of type {column.dtype}")
        return column.to_numpy(np.float32), None
    if objective != "classification":
        raise InputError(f"objective of a table must be 'classification' or 'regression', got {objective!r}")
    if pd.api.types.is_integer_dtype(column) and column.min() >= 0:
        return column.to_numpy(np.int64), None
    if pd.api.types.is_float_dtype(column):
        raise InputError(
            f"labels of a classification must be whole numbers or names, got column {column.name!r} of type "
            f"{column.dtype}; for real targets set objective = 'regression'"
        )
    codes, names = pd.factorize(column, sort=True)
    return codes.astype(np.int64), len(names)
