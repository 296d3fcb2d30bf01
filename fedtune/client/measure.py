"""A model's mean error and mean loss on the validation and test parts of clients.

- `measure_alone` measures one set of weights.
- `measure_batched` measures a set of weights for each client in one tensor program. The results differ by rounding.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fedtune.client.examples import Examples, StoredExamples
from fedtune.client.flat_model import EVALUATION_BATCH, FlatModel
from fedtune.client.stacked import outputs_of_each
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError

ClientPart = tuple[int, str]  # a client, and "train", "validation" or "test"
Arrays = tuple[np.ndarray, np.ndarray]  # the inputs and the labels of a part, as they are stored

T = TypeVar("T")


class Measured(NamedTuple):
    """A model's mean error and mean loss over one part of a client's examples."""

    error: float
    loss: float


def measure_alone(
    model: FlatModel, weights: Float[Tensor, "weight"], dataset: FederatedDataset, parts: Sequence[ClientPart]
) -> list[Measured]:
    """The mean error and mean loss of the weights on each of the parts. The model then holds the weights."""
    stored = [dataset.examples(*part) for part in parts]
    sizes = sizes_of(stored)
    if not any(sizes):
        raise InputError(f"to be measured, clients must have examples in {list(parts)}, got none")
    if model.compiled is not None:
        examples = StoredExamples(*joined(stored), dataset.spec, model.flat.device)
        return _means(*model.compiled.measure(weights, examples), sizes)
    model.load(weights)
    model.module.eval()
    with torch.inference_mode():
        batches = _batches(stored, dataset, model.flat.device)
        measures = [model.measure(model.module(batch.x), batch.y) for batch in batches]
    losses, errors = (torch.cat(values).cpu().numpy() for values in zip(*measures, strict=True))
    return _means(losses, errors, sizes)


def measure_batched(
    model: FlatModel,
    weights: Float[Tensor, "client weight"],
    examples: Examples,
    part_sizes: Sequence[Sequence[int]],
) -> list[list[Measured]]:
    """For each client, the mean error and mean loss of its row of the weights on each of its parts.

    `examples` holds the examples of all parts, part after part and client after client; `part_sizes` has the number of
    examples in each part of each client.
    """
    device = model.flat.device
    losses, errors = torch.empty(2, examples.num_examples, device=device)

    # Where each client's examples begin, and how many it has.
    sizes = np.array(list(map(sum, part_sizes)))  # (client,)
    starts = np.cumsum(sizes) - sizes  # (client,)

    # Measure one batch of every client that still has examples to measure, until no client has any.
    model.module.eval()
    largest_first = np.argsort(-sizes, kind="stable")
    for first in range(0, int(sizes.max()), EVALUATION_BATCH):
        rows = largest_first[sizes[largest_first] > first]  # (row,): clients
        offsets = first + np.arange(min(EVALUATION_BATCH, int(sizes.max()) - first))  # (example,)
        # A client that has no more examples is filled up with its last one, which is measured again.
        offsets = np.minimum(offsets, sizes[rows, None] - 1)  # (row, example)
        index = torch.from_numpy(starts[rows, None] + offsets).to(device)  # (row, example)
        with torch.no_grad():
            row_weights = weights[torch.from_numpy(rows).to(device)]  # (row, weight)
            outputs = outputs_of_each(model, row_weights, examples.x[index])  # (row, example, ...)
            measures = model.measure(outputs.flatten(0, 1), examples.y[index].flatten(0, 1))  # (row · example,)
        losses[index.flatten()], errors[index.flatten()] = measures
    all_sizes = list(itertools.chain.from_iterable(part_sizes))
    means = _means(losses.cpu().numpy(), errors.cpu().numpy(), all_sizes)
    return _grouped(means, map(len, part_sizes))


def sizes_of(stored: Sequence[Arrays]) -> list[int]:
    """How many examples each part has."""
    return [len(labels) for _, labels in stored]


def joined(stored: Sequence[Arrays]) -> Arrays:
    """The inputs and the labels of all, one after the other; no copy if there is only one."""
    if len(stored) == 1:
        return stored[0]
    x, y = map(np.concatenate, zip(*stored, strict=True))
    return x, y


def _batches(stored: Sequence[Arrays], dataset: FederatedDataset, device: torch.device) -> Iterator[Examples]:
    x, y = joined(stored)
    for start in range(0, len(y), EVALUATION_BATCH):
        batch = slice(start, start + EVALUATION_BATCH)
        yield StoredExamples(x[batch], y[batch], dataset.spec, device).all()


def _means(losses: np.ndarray, errors: np.ndarray, sizes: list[int]) -> list[Measured]:
    """The means over the first `sizes[0]` examples, over the next `sizes[1]`, and so on: in float64."""
    losses, errors = losses.astype(np.float64), errors.astype(np.float64)
    measured, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        measured.append(Measured(_mean(errors[part]), _mean(losses[part])))
        start += size
    return measured


def _mean(values: Float64[np.ndarray, "example"]) -> float:
    """Like `values.mean()` without its overhead; NaN without values."""
    return float(np.add.reduce(values)) / len(values) if len(values) else math.nan


def _grouped(values: Iterable[T], counts: Iterable[int]) -> list[list[T]]:
    """The values in groups: the first `counts[0]` values, the next `counts[1]` values, and so on."""
    remaining = iter(values)
    return [list(itertools.islice(remaining, count)) for count in counts]
