"""How many examples the clients of a data set have, and how different the clients are."""

import numpy as np
from jaxtyping import Int64

from fedtune.data.checks import check
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.parts import PARTS
from fedtune.data.reading import check_memory
from fedtune.errors import InputError


def statistics(dataset: FederatedDataset) -> dict[str, int | float]:
    """The numbers of clients, examples and classes, and how different the clients are.

    `mean`, `std`, `skewness`, `smallest` and `largest` describe the numbers of examples a client (population std and
    skewness). `label_skew` is the mean over clients of the total-variation distance between the client's labels and
    the labels of all clients: 0 if all clients are alike, near 1 if no client resembles the whole. Only a
    classification has it. Raises InputError if the data set has errors.
    """
    if problems := check(dataset):
        raise InputError(f"statistics need a data set without problems, got {len(problems)}, first: {problems[0]}")
    spec, sizes = dataset.spec, dataset.sizes().sum(1)
    std = sizes.std()
    skewness = ((sizes - sizes.mean()) ** 3).mean() / std**3 if std > 0 else 0.0
    found: dict[str, int | float] = {"clients": dataset.num_clients, "examples": int(sizes.sum())}
    for part in PARTS:
        found[part] = int(dataset.num_examples(part).sum())
    found["targets" if spec.objective == "regression" else "classes"] = spec.num_outputs
    found |= {
        "mean": float(sizes.mean()),
        "std": float(std),
        "skewness": float(skewness),
        "smallest": int(sizes.min()),
        "largest": int(sizes.max()),
    }
    if spec.objective == "classification":
        counts = 8 * dataset.num_clients * spec.num_classes
        check_memory(f"the counts of {spec.num_classes:,} labels of each client", counts)
        found["label_skew"] = _label_skew(dataset)
    return found


def _label_skew(dataset: FederatedDataset) -> float:
    """The mean total-variation distance between a client's labels and the labels of all clients."""
    counts = _label_counts(dataset)
    distance = np.abs(counts / counts.sum(1, keepdims=True) - counts.sum(0) / counts.sum()).sum(1) / 2
    return float(distance.mean())


def _label_counts(dataset: FederatedDataset) -> Int64[np.ndarray, "client label"]:
    """How often each client has each label, in all its parts."""
    starts = dataset.ranges[..., 0].ravel()
    sizes = dataset.ranges[..., 1].ravel() - starts
    examples = np.repeat(starts - (sizes.cumsum() - sizes), sizes)
    examples += np.arange(len(examples))
    # Client and label as one number, so that one call counts all pairs.
    cells = dataset.y[examples]
    cells += np.repeat(np.arange(len(sizes)) // len(PARTS) * dataset.spec.num_classes, sizes)
    counts = np.bincount(cells, minlength=dataset.num_clients * dataset.spec.num_classes)
    return counts.reshape(dataset.num_clients, dataset.spec.num_classes)
