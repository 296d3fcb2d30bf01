"""Data sets whose examples stay in an Arrow file, which is mapped into memory.

The file must be uncompressed, must have one record batch, and must hold the clients one after another. The examples are
one column of lists of one size, or several columns of one type of number that lie at equal distances in the file, as
neighbouring columns do.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.formats.columns import feature_columns, labels_of
from fedtune.data.mapped import Place
from fedtune.data.reading import reading
from fedtune.data.spec import LABEL_DTYPES
from fedtune.errors import InputError


def map_table(
    path: Path, *, client: str, label: str, features: Sequence[str] | None = None, objective: str = "classification"
) -> FederatedDataset:
    """The data set of an Arrow file, with the clients in the order of the file; see `FederatedDataset.from_arrays`.

    Labels are copied if they do not have the objective's type. Raises InputError, with the reason, if the file can't be
    mapped.
    """
    with reading(path, f"the table {path} can't be read"):
        with pa.memory_map(str(path)) as source:
            start = source.read_buffer(1).address
            reader = pa.ipc.open_file(source)
            if reader.num_record_batches != 1:
                raise _unfit(path, f"have one record batch, got {reader.num_record_batches}")
            batch = reader.get_batch(0)
        return _map_batch(path, start, batch, client, label, features, objective)


def _map_batch(
    path: Path,
    start: int,
    batch: pa.RecordBatch,
    client: str,
    label: str,
    features: Sequence[str] | None,
    objective: str,
) -> FederatedDataset:
    """The data set of the only batch of a file, which is mapped at the address `start`."""
    chosen = feature_columns(batch.schema.names, client, label, features)
    if batch.num_rows == 0:
        raise InputError("a table must have at least one row, got none")
    batch.column(client).validate(full=True)  # a damaged file can say that its names lie outside it
    for column in (client, label):
        if missing := batch.column(column).null_count:
            raise InputError(
                f"column {column!r} must have a value in every row, got none in {missing} of {batch.num_rows}"
            )
    client_ids, sizes = _clients(path, client, batch.column(client))
    x = _side_by_side(path, [_place(path, start, name, batch.column(name)) for name in chosen])
    y, num_classes = labels_of(batch.column(label).to_pandas().rename(label), objective)
    if num_classes is None and batch.column(label).type == pa.from_numpy_dtype(LABEL_DTYPES[objective]):
        y = _place(path, start, label, batch.column(label)).map()
    return FederatedDataset.from_arrays(
        x, y, sizes, name=path.stem, client_ids=client_ids, objective=objective, num_classes=num_classes
    )


def _clients(path: Path, name: str, column: pa.Array) -> tuple[list[str], np.ndarray]:
    """The clients' ids and how many rows each client has. The memory for this does not grow with the number of rows."""
    names = None
    if isinstance(column, pa.DictionaryArray):
        column, names = column.indices, column.dictionary
    if not (
        pa.types.is_primitive(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    ):
        raise InputError(f"column {name!r} must hold names or numbers, got type {column.type}")
    runs = pc.run_end_encode(column, run_end_type=pa.int64())
    found = (runs.values if names is None else names.take(runs.values)).to_pylist()
    first: dict[Any, int] = {}
    for number, value in enumerate(found):
        if first.setdefault(value, number) < number:
            raise _unfit(path, f"be sorted by {name!r}, got the rows of {value!r} in several places")
    return [str(value) for value in found], np.diff(runs.run_ends.to_numpy(), prepend=0)


def _place(path: Path, start: int, name: str, column: pa.Array) -> Place:
    """Where the numbers of a column lie in the file. The file is mapped at the address `start`."""
    shape = [len(column)]
    missing = column.null_count
    while pa.types.is_fixed_size_list(column.type):
        shape.append(column.type.list_size)
        column = column.values
        missing += column.null_count
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise _unfit(path, f"hold numbers or lists of one size, got column {name!r} of type {column.type}")
    if missing:
        raise _unfit(path, f"have no missing value, got {missing} in column {name!r}")
    dtype = np.dtype(column.type.to_pandas_dtype())
    offset = column.buffers()[1].address - start
    if not 0 <= offset <= path.stat().st_size - math.prod(shape) * dtype.itemsize:
        raise _unfit(path, "be uncompressed")
    strides = dtype.itemsize * np.cumprod([1, *shape[:0:-1]])[::-1]
    return Place(str(path.resolve()), dtype, offset, tuple(shape), tuple(strides.tolist()))


def _side_by_side(path: Path, places: Sequence[Place]) -> np.ndarray:
    """The examples: the only place if it holds whole examples, else one feature from each place."""
    first = places[0]
    if len(places) == 1 and len(first.shape) > 1:
        return first.map()
    if len(first.shape) > 1 or len({(place.dtype, place.shape) for place in places}) > 1:
        raise _unfit(path, "have features of one type of number, or one feature of lists")
    steps = np.diff([place.offset for place in places], append=places[-1].offset + first.dtype.itemsize)
    step = int(steps[0])
    if step <= 0 or (steps[:-1] != step).any():
        raise _unfit(path, "hold its features side by side")
    return first._replace(shape=(*first.shape, len(places)), strides=(*first.strides, step)).map()


def _unfit(path: Path, condition: str) -> InputError:
    return InputError(f"to be mapped, {path} must {condition}; without data.mapped it is read whole")
