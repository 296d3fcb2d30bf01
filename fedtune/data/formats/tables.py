"""Data sets of tables: a pandas DataFrame, or a CSV, Parquet or Arrow file.

Each row is an example, and one column names the client of each row.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.formats.clients import from_clients
from fedtune.data.formats.columns import column_problems, feature_columns, labels_of
from fedtune.data.problems import BadDataError
from fedtune.data.reading import check_memory, reading
from fedtune.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

ARROW_SUFFIXES = (".arrow", ".feather")
SUFFIXES = (".csv", ".parquet", *ARROW_SUFFIXES)
# What pandas calls columns that hold numbers only, and columns that hold texts only. A column of None is "empty".
NUMBERS = ("integer", "floating", "mixed-integer-float", "empty")
TEXTS = ("string", "empty")


def from_table(
    path: str | Path,
    *,
    client: str,
    label: str,
    features: Sequence[str] | None = None,
    objective: str = "classification",
    standardize: bool | None = None,
    mapped: bool = False,
    seed: int = 0,
) -> FederatedDataset:
    """The data set of a table in a file; the options are those of `from_frame`.

    With `mapped` an Arrow file is mapped into memory instead of read: see `fedtune.data.formats.arrow`. Then its
    features stay as they are, and the parts of a client are its first rows, the next rows and its last rows.
    `standardize` None means true, but false for a mapped table.
    """
    path = Path(path)
    if mapped:
        from fedtune.data.formats.arrow import map_table

        if path.suffix not in ARROW_SUFFIXES:
            raise InputError(f"a mapped table must be a file that ends in {' or '.join(ARROW_SUFFIXES)}, got {path}")
        if standardize:
            raise InputError("standardize must be false for a mapped table, whose numbers stay in the file, got true")
        return map_table(path, client=client, label=label, features=features, objective=objective)
    return from_frame(
        read_frame(path),
        client=client,
        label=label,
        features=features,
        objective=objective,
        standardize=standardize is not False,
        seed=seed,
        name=path.stem,
    )


def read_frame(path: Path) -> "pd.DataFrame":
    """The table in a file. Raises InputError if the file can't be read."""
    import pandas as pd  # not above: worker processes never need it
    from pyarrow import feather

    if path.suffix not in SUFFIXES:
        raise InputError(f"a table must be a file that ends in {' or '.join(SUFFIXES)}, got {path}")
    with reading(path, f"the table {path} can't be read"):
        if path.suffix in ARROW_SUFFIXES:
            feather.read_table(path, memory_map=False).validate(full=True)  # a damaged one would end the process
            return pd.read_feather(path)
        if path.suffix == ".csv":
            return _read_csv(path)
        check_memory(f"the table {path}", _unpacked_bytes(path))
        return pd.read_parquet(path)


def read_columns(path: Path, *, numbers: Iterable[str] = (), texts: Iterable[str] = ()) -> "pd.DataFrame":
    """The table in a CSV or Parquet file that has at least these columns of numbers and of texts.

    The other columns too must hold numbers or texts. The numbers in a CSV file are read to the last bit. Raises
    InputError.
    """
    import pandas as pd

    with reading(path, f"{path} can't be read"):
        if path.suffix == ".csv":
            frame = pd.read_csv(path, engine="python")  # the other engine may change a number's last bit
        else:
            check_memory(str(path), _unpacked_bytes(path))
            frame = pd.read_parquet(path)
        # Texts are read here, so that damaged ones are found here.
        held = {name: column if column.dtype.kind in "biuf" else column.to_list() for name, column in frame.items()}
        kinds = {name: pd.api.types.infer_dtype(values, skipna=True) for name, values in held.items()}
    for wanted, names, allowed in (("numbers", numbers, NUMBERS), ("texts", texts, TEXTS)):
        for name in names:
            if name not in kinds:
                raise InputError(f"{path} must have the column {name}, got none")
            if kinds[name] not in allowed:
                raise InputError(f"{path}: the column {name} must hold {wanted}, got {kinds[name]}")
    if strange := [name for name, kind in kinds.items() if kind not in NUMBERS + TEXTS]:
        raise InputError(f"{path}: the column {strange[0]} must hold numbers or texts, got {kinds[strange[0]]}")
    return frame


def _unpacked_bytes(path: Path) -> int:
    """How much memory the numbers of a Parquet file take, if all are of eight bytes."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    return int(8 * metadata.num_rows * metadata.num_columns)


def _read_csv(path: Path) -> "pd.DataFrame":
    """The table in a CSV file, with the names in its first line as they are: pandas would rename a repeated one."""
    import pandas as pd

    frame = pd.read_csv(path, low_memory=False)  # one type for each column, also of a long file
    names = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
    if len(set(names)) < len(names):
        frame.columns = pd.Index(names)
    return frame


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
    """The data set of a table, with the clients in the order of their names.

    The column `client` names the client of each row, the column `label` holds what to predict. `features` None means
    all other columns; features must be numbers. With `standardize` each feature is brought to mean 0 and variance 1
    over the whole table. For a classification, labels that are whole numbers from 0 are the classes themselves; other
    labels, such as strings, are numbered in their sorted order. The other options are those of `from_clients`.

    Raises BadDataError, which lists every column that is wrong.

        from_frame(pd.DataFrame({"user": ["a", "a", "a"], "age": [20, 30, 40], "likes": [0, 1, 1]}), client="user",
                   label="likes")
    """
    import pandas as pd

    chosen = feature_columns(frame.columns, client, label, features)
    if frame.empty:
        raise InputError("a table must have at least one row, got none")
    if problems := column_problems(frame, client, label, chosen):
        raise BadDataError(problems)
    x = frame[chosen].to_numpy(np.float32, na_value=np.nan, copy=standardize)
    if standardize:
        for feature in x.T:
            finite = feature[np.isfinite(feature)].astype(np.float64)  # the check reports the other values by client
            if len(finite):
                feature[...] = (feature - finite.mean()) / (finite.std() or 1.0)
    y, num_classes = labels_of(frame[label], objective)
    codes, names = pd.factorize(frame[client], sort=True)
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    clients = {client_id: (x[rows], y[rows]) for client_id, rows in zip(names.tolist(), groups, strict=True)}
    options.setdefault("num_classes", num_classes)
    return from_clients(clients, name=name, objective=objective, **options)
