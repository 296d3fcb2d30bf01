"""Data sets made of objects in memory: arrays, torch data sets, or a Hugging Face data set."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from fedtune.data.checks import find_problems
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.parts import split_clients
from fedtune.data.problems import BadDataError, form_problems, in_client_order, repeated_ids
from fedtune.data.spec import LABEL_DTYPES, DatasetSpec, count_classes
from fedtune.errors import InputError, UnknownNameError


def from_clients(
    clients: Mapping[Any, tuple[Any, Any]],
    *,
    name: str,
    objective: str = "classification",
    num_classes: int | None = None,
    scale: float = 1.0,
    input_kind: str = "real",
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> FederatedDataset:
    """A data set of `{client id: (x, y)}`.

    x and y are arrays, tensors or lists with one row for each example. Each client's examples are split at random into
    train, validation and test, in these `fractions`; `seed` draws the split. A model gets x * `scale`, or with
    `input_kind` "token" whole numbers. `num_classes` None means the largest label + 1. Each target of a regression is
    brought to mean 0 and variance 1 over all train parts.

    Raises BadDataError if some clients' arrays differ in form from the others; it lists all problems of all clients.

        from_clients({"ann": ([[0.1], [0.2], [0.3]], [0, 1, 1])}, name="sites")
    """
    if not clients:
        raise InputError("a data set must have at least one client, got none")
    client_ids = [str(client_id) for client_id in clients]
    xs = [np.asarray(x) for x, _ in clients.values()]
    ys = [np.asarray(y) for _, y in clients.values()]
    if objective not in LABEL_DTYPES:
        raise UnknownNameError("objective", objective, LABEL_DTYPES)
    problems = form_problems(client_ids, xs, ys, objective)
    unfit = {problem.client for problem in problems}
    fitting = [number for number, client_id in enumerate(client_ids) if client_id not in unfit]
    if fitting:
        dataset = _joined(
            [client_ids[number] for number in fitting],
            [xs[number] for number in fitting],
            [ys[number] for number in fitting],
            name=name,
            objective=objective,
            num_classes=num_classes,
            scale=scale,
            input_kind=input_kind,
            seed=seed,
            fractions=fractions,
        )
        if not problems:
            return dataset
        problems += find_problems(dataset)
    raise BadDataError(in_client_order(repeated_ids(client_ids) + problems, client_ids))


def from_torch(clients: Mapping[Any, Any], *, name: str, **options: Any) -> FederatedDataset:
    """A data set of `{client id: torch Dataset}`.

    Each torch Dataset is map-style and has items (x, y); each item is read once. The other options are
    those of `from_clients`.
    """
    arrays = {}
    for client_id, dataset in clients.items():
        items = [dataset[number] for number in range(len(dataset))]
        xs, ys = zip(*items, strict=True) if items else ((), ())
        arrays[client_id] = (np.array([np.asarray(x) for x in xs]), np.array([np.asarray(y) for y in ys]))
    return from_clients(arrays, name=name, **options)


def from_hub(
    dataset: Any, partitioner: Any, *, name: str, x: str = "image", y: str = "label", **options: Any
) -> FederatedDataset:
    """A data set of a Hugging Face Dataset, whose rows a partitioner of flwr-datasets gives to the clients.

    `x` and `y` name its columns. If the examples are images, all images must have one size. A client's id is its name
    in the partitioner, or its number if the partitioner has no names. The other options are those of
    `from_clients`.
    """
    for column in (x, y):
        if column not in dataset.column_names:
            raise UnknownNameError("column", column, dataset.column_names)
    partitioner.dataset = dataset
    clients = {}
    for number in range(partitioner.num_partitions):
        part = partitioner.load_partition(number).with_format("numpy")
        names = getattr(partitioner, "partition_id_to_natural_id", {})
        clients[names.get(number, number)] = (np.asarray(part[x][:]), np.asarray(part[y][:]))
    return from_clients(clients, name=name, **options)


def _joined(
    client_ids: Sequence[str],
    xs: Sequence[np.ndarray],
    ys: Sequence[np.ndarray],
    *,
    name: str,
    objective: str,
    num_classes: int | None,
    scale: float,
    input_kind: str,
    seed: int,
    fractions: tuple[float, float, float],
) -> FederatedDataset:
    """The data set of clients whose arrays have one form; see `from_clients`."""
    permutations, ranges = split_clients([len(y) for y in ys], fractions, seed)
    total = sum(len(y) for y in ys)
    x = np.empty((total, *xs[0].shape[1:]), xs[0].dtype)
    y = np.empty((total, *ys[0].shape[1:]), LABEL_DTYPES[objective])
    for client, order in enumerate(permutations):
        x[ranges[client, 0, 0] : ranges[client, 2, 1]] = xs[client][order]
        y[ranges[client, 0, 0] : ranges[client, 2, 1]] = ys[client][order]
    if objective == "regression":
        mean, std = _standardise(y, ranges)
        spec = DatasetSpec(x.shape[1:], input_kind, 0, scale, objective, y.shape[1:], mean, std)
    else:
        spec = DatasetSpec(x.shape[1:], input_kind, count_classes(y, num_classes), scale, objective, y.shape[1:])
    return FederatedDataset(name, spec, x, y, client_ids, ranges)


def _standardise(
    y: Shaped[np.ndarray, "example ..."], ranges: Int64[np.ndarray, "client 3 2"]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of each target over all train parts, after the targets were changed in place.

    The mean is subtracted, then the target is divided by the standard deviation. A constant target is not divided. A
    target with NaN or infinity stays as it is: the check finds it.
    """
    targets = y.reshape(len(y), -1)
    used = np.concatenate([targets[start:stop] for start, stop in ranges[:, 0]]).astype(np.float64)
    mean, std = (used.mean(0), used.std(0)) if len(used) else (np.zeros(used.shape[1]), np.ones(used.shape[1]))
    mean[~np.isfinite(mean)] = 0.0
    std[~(np.isfinite(std) & (std > 0))] = 1.0
    targets[...] = (targets - mean) / std
    return tuple(mean.tolist()), tuple(std.tolist())
