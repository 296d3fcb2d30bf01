"""What a client does in a round: it trains, and it measures a model on its own validation and test parts.

Each verb has a form for each way of working:

- `train_alone`, `measure_alone`: one client, or one set of weights, at a time.
- `train_side_by_side`, `measure_side_by_side`: several clients of a small model, with less overhead. The results are
  the same to the bit.
- `train_batched`, `measure_batched`: many clients in one tensor program. The results differ by rounding.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from fedtune.client.examples import Examples, StoredExamples
from fedtune.client.flat_model import EVALUATION_BATCH, FlatModel
from fedtune.client.objectives import Measures
from fedtune.client.tasks import ClientTask, Metrics, PersonaliseTask, Result, TrainTask, Update
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.tuning.space import Config

# The functions of a client program; `ClientProgram` says what they are given and return.
Train = Callable[[FlatModel, Tensor, Examples, Config, np.random.Generator], Tensor]
TrainTogether = Callable[
    [FlatModel, Tensor, Sequence[StoredExamples], Sequence[Config], Sequence[np.random.Generator]], list[Tensor]
]
TrainBatched = Callable[
    [FlatModel, Tensor, Examples, Sequence[int], Sequence[Config], Sequence[np.random.Generator]], Tensor
]

# `train_alone` or `train_side_by_side` with its first argument bound.
TrainTasks = Callable[[FlatModel, Tensor, FederatedDataset, Sequence[ClientTask]], list[Tensor]]

ClientPart = tuple[int, str]  # a client, and "train", "validation" or "test"
Arrays = tuple[np.ndarray, np.ndarray]  # the inputs and the labels of a part, as they are stored

T = TypeVar("T")


class Measured(NamedTuple):
    """A model's mean error and mean loss over one part of a client's examples."""

    error: float
    loss: float


def train_and_measure(
    train: TrainTasks,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    tasks: Sequence[ClientTask],
) -> list[Result]:
    """Each task's result after training from `weights`. The weights in it are valid until the model is next used."""
    before = [
        measure_alone(model, weights, dataset, parts_of(task))[0]
        if isinstance(task, TrainTask) and task.error_before
        else None
        for task in tasks
    ]
    trained = train(model, weights, dataset, tasks)
    after = measure_side_by_side(model, trained, dataset, list(map(parts_of, tasks)))
    return [result(dataset, *of_task) for of_task in zip(tasks, trained, after, before, strict=True)]


def parts_of(task: ClientTask) -> list[ClientPart]:
    """The parts on which the task's trained weights are measured."""
    names = ("validation",) if isinstance(task, TrainTask) else ("validation", "test")
    return [(task.client, name) for name in names]


def result(
    dataset: FederatedDataset,
    task: ClientTask,
    weights: Float[Tensor, "weight"],
    after: Sequence[Measured],
    before: Measured | None,
) -> Result:
    """The task's result, made of the trained weights and of what was measured on `parts_of(task)`.

    An update's metrics are `error` and `loss`, means over the validation part after training; `error_before` and
    `loss_before`, the same before training, if the task asks for them; and `num_train` and `num_validation`, numbers
    of examples.
    """
    if isinstance(task, PersonaliseTask):
        return [_evaluation_metrics(dataset, task.client, *after)]
    (validation,) = after
    earlier = {} if before is None else {"error_before": before.error, "loss_before": before.loss}
    counts = {f"num_{part}": len(dataset.examples(task.client, part)[1]) for part in ("train", "validation")}
    return Update(weights, {"error": validation.error, "loss": validation.loss, **earlier, **counts})


def evaluate_clients(
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    clients: Sequence[int],
) -> list[Metrics]:
    """For each client, the mean error and loss of the weights on its validation and its test part, and their sizes.

    The examples of all clients go through the model in one stream of batches, so that small clients cost little. They
    are copied for it, in the form in which they are stored.
    """
    parts = [(client, part) for client in clients for part in ("validation", "test")]
    measured = measure_alone(model, weights, dataset, parts)
    return [
        _evaluation_metrics(dataset, client, validation, test)
        for client, validation, test in zip(clients, measured[::2], measured[1::2], strict=True)
    ]


def train_alone(
    train: Train,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    tasks: Sequence[ClientTask],
) -> list[Float[Tensor, "weight"]]:
    """The weights of the only task's client after training from `weights`. The model then holds them."""
    (task,) = tasks
    examples = StoredExamples(*dataset.examples(task.client, "train"), dataset.spec, model.flat.device).all()
    model.load(train(model, weights, examples, task.config, generator(task.seed)))
    return [model.flat]


def train_side_by_side(
    train_together: TrainTogether,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    tasks: Sequence[ClientTask],
) -> list[Float[Tensor, "weight"]]:
    """The weights of each task's client after training from `weights`: to the bit what `train_alone` gives."""
    stored = [dataset.examples(task.client, "train") for task in tasks]
    examples = [StoredExamples(*arrays, dataset.spec, model.flat.device) for arrays in stored]
    configs, rngs = [task.config for task in tasks], [generator(task.seed) for task in tasks]
    trained = list(train_together(model, weights, examples, configs, rngs))
    shapes = [(row.dtype, row.shape) for row in trained]
    if shapes != [(model.flat.dtype, model.flat.shape)] * len(tasks):
        raise InputError(
            f"train_together must return {len(tasks)} float32 tensors of shape {(*model.flat.shape,)}, got {shapes}"
        )
    # The model's own weights change as soon as it is used.
    return [row.clone() if _share_memory(row, model.flat) else row for row in trained]


def train_batched(
    program_train_batched: TrainBatched,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    tasks: Sequence[ClientTask],
) -> Float[Tensor, "client weight"]:
    """The weights of each task's client after training from `weights`, a row for each."""
    stored = [dataset.examples(task.client, "train") for task in tasks]
    examples = StoredExamples(*_joined(stored), dataset.spec, model.flat.device).all()
    configs, rngs = [task.config for task in tasks], [generator(task.seed) for task in tasks]
    return program_train_batched(model, weights, examples, _sizes(stored), configs, rngs)


def measure_alone(
    model: FlatModel, weights: Float[Tensor, "weight"], dataset: FederatedDataset, parts: Sequence[ClientPart]
) -> list[Measured]:
    """What the weights give on each of the parts. The model then holds the weights."""
    (measured,) = measure_side_by_side(model, [weights], dataset, [parts])
    return measured


def measure_side_by_side(
    model: FlatModel,
    weights: Sequence[Float[Tensor, "weight"]],
    dataset: FederatedDataset,
    parts: Sequence[Sequence[ClientPart]],
) -> list[list[Measured]]:
    """For each of several weights, what `measure_alone` gives on the parts at the same place in `parts`, to the bit."""
    measures: list[Measures] = []
    waiting: list[tuple[Tensor, Tensor]] = []  # outputs and labels that are not measured yet
    sizes: list[int] = []
    model.module.eval()
    with torch.inference_mode():
        for row, row_parts in zip(weights, parts, strict=True):
            model.load(row)
            stored = [dataset.examples(*part) for part in row_parts]
            sizes += _sizes(stored)
            if not any(_sizes(stored)):
                raise InputError(f"to be measured, clients must have examples in {list(row_parts)}, got none")
            for examples in _batches(stored, dataset, model.flat.device):
                waiting.append((model.module(examples.x), examples.y))
                # Outputs wait until they fill a batch: measuring a few costs as much as measuring many.
                if sum(len(labels) for _, labels in waiting) >= EVALUATION_BATCH:
                    measures.append(_measure_all(model, waiting))
                    waiting = []
        if waiting:
            measures.append(_measure_all(model, waiting))
    losses, errors = (torch.cat(values) for values in zip(*measures, strict=True))
    return _grouped(_means(losses, errors, sizes), map(len, parts))


def measure_batched(
    model: FlatModel,
    weights: Float[Tensor, "client weight"],
    dataset: FederatedDataset,
    parts: Sequence[Sequence[ClientPart]],
) -> list[list[Measured]]:
    """For each client, what its row of the weights gives on each of its parts."""
    device = model.flat.device
    stored = [dataset.examples(*part) for client_parts in parts for part in client_parts]
    examples = StoredExamples(*_joined(stored), dataset.spec, device).all()
    losses, errors = torch.empty(2, examples.num_examples, device=device)

    # Where each client's examples begin, and how many it has.
    sizes = np.array([sum(part_sizes) for part_sizes in _grouped(_sizes(stored), map(len, parts))])  # (client,)
    starts = np.cumsum(sizes) - sizes  # (client,)

    # A batch of each client that has examples left: the clients with the most examples are left to the end.
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
            outputs = vmap(model.outputs)(row_weights, examples.x[index])  # (row, example, ...)
            measures = model.measure(outputs.flatten(0, 1), examples.y[index].flatten(0, 1))  # (row · example,)
        losses[index.flatten()], errors[index.flatten()] = measures
    return _grouped(_means(losses, errors, _sizes(stored)), map(len, parts))


def generator(seed: int) -> np.random.Generator:
    """The stream of random numbers that a client program gets for a task's seed."""
    return np.random.Generator(np.random.PCG64(seed))


def _evaluation_metrics(dataset: FederatedDataset, client: int, validation: Measured, test: Measured) -> Metrics:
    """The metrics of `evaluate_clients` for one client, made of what was measured on its two parts."""
    metrics: Metrics = {}
    for part, measured in (("validation", validation), ("test", test)):
        metrics[f"{part}_error"] = measured.error
        metrics[f"{part}_loss"] = measured.loss
        metrics[f"num_{part}"] = len(dataset.examples(client, part)[1])
    return metrics


def _sizes(stored: Sequence[Arrays]) -> list[int]:
    return [len(labels) for _, labels in stored]


def _joined(stored: Sequence[Arrays]) -> Arrays:
    """The inputs and the labels of all, one after the other; no copy if there is only one."""
    if len(stored) == 1:
        return stored[0]
    x, y = map(np.concatenate, zip(*stored, strict=True))
    return x, y


def _batches(stored: Sequence[Arrays], dataset: FederatedDataset, device: torch.device) -> Iterator[Examples]:
    x, y = _joined(stored)
    for start in range(0, len(y), EVALUATION_BATCH):
        batch = slice(start, start + EVALUATION_BATCH)
        yield StoredExamples(x[batch], y[batch], dataset.spec, device).all()


def _measure_all(model: FlatModel, waiting: list[tuple[Tensor, Tensor]]) -> Measures:
    outputs, labels = map(torch.cat, zip(*waiting, strict=True))
    return model.measure(outputs, labels)


def _means(losses: Float[Tensor, "example"], errors: Float[Tensor, "example"], sizes: list[int]) -> list[Measured]:
    """The means over the first `sizes[0]` examples, over the next `sizes[1]`, and so on."""
    stops = np.cumsum(sizes)[:-1]
    parts = [np.split(values.cpu().numpy().astype(np.float64), stops) for values in (errors, losses)]
    return [Measured(float(error.mean()), float(loss.mean())) for error, loss in zip(*parts, strict=True)]


def _grouped(values: Iterable[T], counts: Iterable[int]) -> list[list[T]]:
    """The values in groups: as many as the first count says, then as many as the second says, and so on."""
    remaining = iter(values)
    return [list(itertools.islice(remaining, count)) for count in counts]


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
