"""What a client does in a round: it trains, and it measures a model on its own validation and test parts.

`train_one` lets one client train, `train_each` several of small models, with less overhead and to the bit the same
results; `train_clients` and `measure_clients` do with many in one tensor program, whose results differ by rounding.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from fedtune.client.examples import StoredExamples
from fedtune.client.flat_model import EVALUATION_BATCH, FlatModel
from fedtune.client.objectives import Measures
from fedtune.client.program import Train, TrainBatched, TrainTogether
from fedtune.client.tasks import ClientTask, Metrics, PersonaliseTask, Result, TrainTask, Update
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError

# What `train_one` and `train_each` are with a client program's function in the first place.
TrainSome = Callable[[FlatModel, Tensor, FederatedDataset, Sequence[ClientTask]], list[Tensor]]
Part = tuple[int, str]  # a client, and the name of one of its parts
ErrorAndLoss = tuple[float, float]  # means over a part


def train_and_measure(
    train: TrainSome,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    tasks: Sequence[ClientTask],
) -> list[Result]:
    """Each task's result after training from `weights`. The weights in it are valid until the model is next used."""
    before = [
        measure(model, weights, dataset, parts_of(task))[0]
        if isinstance(task, TrainTask) and task.error_before
        else None
        for task in tasks
    ]
    trained = train(model, weights, dataset, tasks)
    after = measure_each(model, trained, dataset, list(map(parts_of, tasks)))
    return [result(dataset, *each) for each in zip(tasks, trained, after, before, strict=True)]


def parts_of(task: ClientTask) -> list[Part]:
    """On what the task's trained weights are measured."""
    names = ("validation",) if isinstance(task, TrainTask) else ("validation", "test")
    return [(task.client, name) for name in names]


def result(
    dataset: FederatedDataset,
    task: ClientTask,
    weights: Float[Tensor, "weight"],
    after: Sequence[ErrorAndLoss],
    before: ErrorAndLoss | None,
) -> Result:
    """The task's result, of the trained weights and what was measured on `parts_of(task)`.

    An update's metrics are `error` and `loss`, means over the validation part after training; `error_before` and
    `loss_before`, if asked for, the same before it; and `num_train` and `num_validation`, which count examples.
    """
    if isinstance(task, PersonaliseTask):
        return [_evaluation_metrics(dataset, task.client, *after)]
    ((error, loss),) = after
    earlier = {} if before is None else {"error_before": before[0], "loss_before": before[1]}
    counts = {f"num_{part}": len(dataset.examples(task.client, part)[1]) for part in ("train", "validation")}
    return Update(weights, {"error": error, "loss": loss, **earlier, **counts})


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
    measured = measure(model, weights, dataset, parts)
    return [
        _evaluation_metrics(dataset, client, validation, test)
        for client, validation, test in zip(clients, measured[::2], measured[1::2], strict=True)
    ]


def train_one(
    train: Train,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    tasks: Sequence[ClientTask],
) -> list[Float[Tensor, "weight"]]:
    """The weights of the only task's client after training from `weights`, which the model then holds."""
    (task,) = tasks
    examples = StoredExamples(*dataset.examples(task.client, "train"), dataset.spec, model.flat.device).all()
    model.load(train(model, weights, examples, task.config, generator(task.seed)))
    return [model.flat]


def train_each(
    train_together: TrainTogether,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    tasks: Sequence[ClientTask],
) -> list[Float[Tensor, "weight"]]:
    """The weights of each task's client after training from `weights`: to the bit those of `train_one`."""
    stored = [dataset.examples(task.client, "train") for task in tasks]
    examples = [StoredExamples(*arrays, dataset.spec, model.flat.device) for arrays in stored]
    configs, rngs = [task.config for task in tasks], [generator(task.seed) for task in tasks]
    trained = list(train_together(model, weights, examples, configs, rngs))
    shapes = [(each.dtype, each.shape) for each in trained]
    if shapes != [(model.flat.dtype, model.flat.shape)] * len(tasks):
        raise InputError(
            f"train_together must return {len(tasks)} float32 tensors of shape {(*model.flat.shape,)}, got {shapes}"
        )
    # The model's own weights change as soon as it is used.
    return [each.clone() if _share_memory(each, model.flat) else each for each in trained]


def train_clients(
    train_batched: TrainBatched,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    tasks: Sequence[ClientTask],
) -> Float[Tensor, "client weight"]:
    """The weights of each task's client after training from `weights`."""
    stored = [dataset.examples(task.client, "train") for task in tasks]
    x, y = (np.concatenate(arrays) for arrays in zip(*stored, strict=True))
    examples = StoredExamples(x, y, dataset.spec, model.flat.device).all()
    configs, rngs = [task.config for task in tasks], [generator(task.seed) for task in tasks]
    return train_batched(model, weights, examples, [len(labels) for _, labels in stored], configs, rngs)


def measure_clients(
    model: FlatModel,
    weights: Float[Tensor, "client weight"],
    dataset: FederatedDataset,
    parts: Sequence[Sequence[Part]],
) -> list[list[ErrorAndLoss]]:
    """For each client, the mean error and loss of its row of the weights on each of its parts."""
    stored = [[dataset.examples(*part) for part in each] for each in parts]
    x, y = (np.concatenate(arrays) for arrays in zip(*(pair for each in stored for pair in each), strict=True))
    device = model.flat.device
    examples = StoredExamples(x, y, dataset.spec, device).all()
    sizes = np.array([sum(len(labels) for _, labels in each) for each in stored])
    starts = np.cumsum(sizes) - sizes
    losses, errors = torch.empty(2, len(y), device=device)
    model.module.eval()
    largest_first = np.argsort(-sizes, kind="stable")
    for first in range(0, int(sizes.max()), EVALUATION_BATCH):
        rows = largest_first[sizes[largest_first] > first]
        offsets = first + np.arange(min(EVALUATION_BATCH, int(sizes.max()) - first))
        offsets = np.minimum(offsets, sizes[rows, None] - 1)  # the last example again, where a client has no more
        index = torch.from_numpy(starts[rows, None] + offsets).to(device)
        with torch.no_grad():
            outputs = vmap(model.outputs)(weights[torch.from_numpy(rows).to(device)], examples.x[index])
            measures = model.measure(outputs.flatten(0, 1), examples.y[index].flatten(0, 1))
        losses[index.flatten()], errors[index.flatten()] = measures
    means = iter(_means(losses, errors, [len(labels) for each in stored for _, labels in each]))
    return [[next(means) for _ in each] for each in parts]


def _evaluation_metrics(
    dataset: FederatedDataset, client: int, validation: ErrorAndLoss, test: ErrorAndLoss
) -> Metrics:
    """The metrics of `evaluate_clients`, of what was measured on the two parts."""
    metrics: Metrics = {}
    for part, (error, loss) in (("validation", validation), ("test", test)):
        metrics |= {f"{part}_error": error, f"{part}_loss": loss, f"num_{part}": len(dataset.examples(client, part)[1])}
    return metrics


def generator(seed: int) -> np.random.Generator:
    """The stream that a client program gets for a task's seed."""
    return np.random.Generator(np.random.PCG64(seed))


def measure(
    model: FlatModel, weights: Float[Tensor, "weight"], dataset: FederatedDataset, parts: Sequence[Part]
) -> list[ErrorAndLoss]:
    """The mean error and the mean loss of the weights, which the model then holds, on each of some clients' parts."""
    (measured,) = measure_each(model, [weights], dataset, [parts])
    return measured


def measure_each(
    model: FlatModel,
    weights: Sequence[Float[Tensor, "weight"]],
    dataset: FederatedDataset,
    parts: Sequence[Sequence[Part]],
) -> list[list[ErrorAndLoss]]:
    """What `measure` gives, to the bit, for each of some weights on the parts beside them."""
    measures: list[Measures] = []
    waiting: list[tuple[Tensor, Tensor]] = []  # outputs and labels
    sizes: list[int] = []
    model.module.eval()
    with torch.inference_mode():
        for row, each in zip(weights, parts, strict=True):
            model.load(row)
            stored = [dataset.examples(*part) for part in each]
            sizes += [len(labels) for _, labels in stored]
            if not any(len(labels) for _, labels in stored):
                raise InputError(f"to be measured, clients must have examples in {list(each)}, got none")
            x, y = stored[0] if len(stored) == 1 else map(np.concatenate, zip(*stored, strict=True))
            for start in range(0, len(y), EVALUATION_BATCH):
                batch = slice(start, start + EVALUATION_BATCH)
                examples = StoredExamples(x[batch], y[batch], dataset.spec, model.flat.device).all()
                waiting.append((model.module(examples.x), examples.y))
                if sum(len(labels) for _, labels in waiting) >= EVALUATION_BATCH:
                    measures.append(model.measure(*map(torch.cat, zip(*waiting, strict=True))))
                    waiting = []
        if waiting:
            measures.append(model.measure(*map(torch.cat, zip(*waiting, strict=True))))
    losses, errors = (torch.cat(values) for values in zip(*measures, strict=True))
    means = iter(_means(losses, errors, sizes))
    return [[next(means) for _ in each] for each in parts]


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _means(losses: Float[Tensor, "example"], errors: Float[Tensor, "example"], sizes: list[int]) -> list[ErrorAndLoss]:
    """The mean error and the mean loss of the first so many examples, of the next so many, and so on."""
    error, loss = (values.cpu().numpy().astype(np.float64) for values in (errors, losses))
    parts = [slice(stop - size, stop) for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True)]
    return [(float(error[part].mean()), float(loss[part].mean())) for part in parts]
