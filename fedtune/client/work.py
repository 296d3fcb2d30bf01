"""A client's work in a round: it trains, and it measures the trained model (`fedtune.client.measure`).

Training itself is in the client program, for example `fedtune_clients.local_sgd`. This module calls it:

- `train_alone` trains one client at a time.
- `train_batched` trains many clients in one tensor program. The results differ by rounding.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.client.examples import Examples, StoredExamples
from fedtune.client.flat_model import FlatModel
from fedtune.client.measure import ClientPart, Measured, measure_alone
from fedtune.client.tasks import ClientTask, Metrics, PersonaliseTask, Result, TrainTask, Update
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.tuning.space import Config

# The functions of a client program; `ClientProgram` says what they are given and return.
Train = Callable[[FlatModel, Tensor, Examples | StoredExamples, Config, np.random.Generator], Tensor]
TrainBatched = Callable[
    [FlatModel, Tensor, Examples, Sequence[int], Sequence[Config], Sequence[np.random.Generator]], Tensor
]


def train_and_measure(
    train: Train,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    task: ClientTask,
) -> Result:
    """The task's result after training from `weights`. Its weights are valid until the model is next used."""
    before = None
    if isinstance(task, TrainTask) and task.error_before:
        (before,) = measure_alone(model, weights, dataset, parts_of(task))
    trained = train_alone(train, model, weights, dataset, task)
    after = measure_alone(model, trained, dataset, parts_of(task))
    return result(dataset, task, trained, after, before)


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
    """The result of a task, from its trained weights and the measurements `after` training on `parts_of(task)`.

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

    The examples of all clients go through the model in one stream of batches, so that small clients cost little. The
    stream needs a copy of the examples, which has the form in which they are stored.
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
    task: ClientTask,
) -> Float[Tensor, "weight"]:
    """The weights of the task's client after training from `weights`, valid until the model is next used.

    A client program that can compile models gets the examples as they are stored.
    """
    stored = StoredExamples(*dataset.examples(task.client, "train"), dataset.spec, model.flat.device)
    examples = stored.all() if model.compiled is None else stored
    # The program gets a copy of the weights: others train from the same ones.
    trained = train(model, weights.clone(), examples, dict(task.config), generator(task.seed))
    return _checked("train", trained, (model.num_weights,))


def train_batched(
    program_train_batched: TrainBatched,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    examples: Examples,
    sizes: Sequence[int],
    tasks: Sequence[ClientTask],
) -> Float[Tensor, "client weight"]:
    """The weights of each task's client after training from `weights`: a row for each task.

    `program_train_batched` is the `train_batched` of the client program. `examples` holds the examples of all clients,
    client after client, and `sizes` the number of examples of each.
    """
    configs, rngs = [dict(task.config) for task in tasks], [generator(task.seed) for task in tasks]
    trained = program_train_batched(model, weights.clone(), examples, sizes, configs, rngs)
    return _checked("train_batched", trained, (len(tasks), model.num_weights))


def generator(seed: int) -> np.random.Generator:
    """The stream of random numbers that a client program gets for a task's seed."""
    return np.random.Generator(np.random.PCG64(seed))


def _checked(function: str, trained: object, shape: tuple[int, ...]) -> Tensor:
    """The weights that a client program's function returned, without their gradients. Raises InputError for others.

    A tensor of one number would be broadcast, whole numbers would be rounded, and gradients would make the model's own
    weights part of a graph.
    """
    wanted = f"{function} must return a float32 tensor of shape {shape}"
    if not isinstance(trained, Tensor):
        raise InputError(f"{wanted}, got {type(trained).__name__}")
    if trained.dtype != torch.float32 or trained.shape != shape:
        raise InputError(f"{wanted}, got {str(trained.dtype).removeprefix('torch.')} of shape {(*trained.shape,)}")
    return trained.detach()


def _evaluation_metrics(dataset: FederatedDataset, client: int, validation: Measured, test: Measured) -> Metrics:
    """The metrics of `evaluate_clients` for one client, made of what was measured on its two parts."""
    metrics: Metrics = {}
    for part, measured in (("validation", validation), ("test", test)):
        metrics[f"{part}_error"] = measured.error
        metrics[f"{part}_loss"] = measured.loss
        metrics[f"num_{part}"] = len(dataset.examples(client, part)[1])
    return metrics
