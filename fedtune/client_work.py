"""What one client does in a round: it trains, and it measures a model on its own validation and test parts."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.flat_model import EVALUATION_BATCH, Examples, FlatModel, evaluate, make_examples
from fedtune.tasks import Metrics
from fedtune.tuning.space import Config

Train = Callable[[FlatModel, Tensor, Examples, Config, np.random.Generator], Tensor]  # a client program's `train`
Device = str | torch.device
Part = tuple[int, str]  # a client, and the name of one of its parts
ErrorAndLoss = tuple[float, float]  # means over a part


def train_client(
    train: Train,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    client: int,
    config: Config,
    seed: int,
    error_before: bool,
    device: Device,
) -> tuple[Float[Tensor, "weight"], Metrics]:
    """The client's weights after training, valid until the model is next used, and its metrics.

    `error` and `loss` are means over the validation part after training; `error_before` and `loss_before`, if asked
    for, are the same before it; `num_train` and `num_validation` count examples.
    """
    before = None
    if error_before:
        model.load(weights)
        (before,) = measure(model, dataset, [(client, "validation")], device)
    trained = _trained(train, model, weights, dataset, client, config, seed, device)
    (after,) = measure(model, dataset, [(client, "validation")], device)
    return trained, update_metrics(dataset, client, after, before)


def evaluate_clients(
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    clients: Sequence[int],
    device: Device,
) -> list[Metrics]:
    """For each client, the mean error and loss of the weights on its validation and its test part, and their sizes.

    The examples of all clients go through the model in one stream of batches, so that small clients cost little. They
    are copied for it, in the form in which they are stored.
    """
    model.load(weights)
    parts = [(client, part) for client in clients for part in ("validation", "test")]
    measured = measure(model, dataset, parts, device)
    return [
        evaluation_metrics(dataset, client, validation, test)
        for client, validation, test in zip(clients, measured[::2], measured[1::2], strict=True)
    ]


def personalise_client(
    train: Train,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    client: int,
    config: Config,
    seed: int,
    device: Device,
) -> Metrics:
    """The metrics of `evaluate_clients` for one client, after training on its train part."""
    trained = _trained(train, model, weights, dataset, client, config, seed, device)
    return evaluate_clients(model, trained, dataset, [client], device)[0]


def update_metrics(dataset: FederatedDataset, client: int, after: ErrorAndLoss, before: ErrorAndLoss | None) -> Metrics:
    """The metrics of `train_client`, of what was measured on the validation part."""
    counts = {f"num_{part}": len(dataset.examples(client, part)[1]) for part in ("train", "validation")}
    earlier = {} if before is None else {"error_before": before[0], "loss_before": before[1]}
    return {"error": after[0], "loss": after[1], **earlier, **counts}


def evaluation_metrics(dataset: FederatedDataset, client: int, validation: ErrorAndLoss, test: ErrorAndLoss) -> Metrics:
    """The metrics of `evaluate_clients`, of what was measured on the two parts."""
    metrics: Metrics = {}
    for part, (error, loss) in (("validation", validation), ("test", test)):
        metrics |= {f"{part}_error": error, f"{part}_loss": loss, f"num_{part}": len(dataset.examples(client, part)[1])}
    return metrics


def _trained(
    train: Train,
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    dataset: FederatedDataset,
    client: int,
    config: Config,
    seed: int,
    device: Device,
) -> Float[Tensor, "weight"]:
    """The weights after training, which the model then holds."""
    examples = make_examples(*dataset.examples(client, "train"), dataset.spec, device)
    model.load(train(model, weights, examples, config, np.random.Generator(np.random.PCG64(seed))))
    return model.flat


def measure(model: FlatModel, dataset: FederatedDataset, parts: Sequence[Part], device: Device) -> list[ErrorAndLoss]:
    """The mean error and the mean loss of the model's weights on each of some clients' parts."""
    stored = [dataset.examples(client, part) for client, part in parts]
    x, y = (np.concatenate(arrays) for arrays in zip(*stored, strict=True))
    batches = [slice(start, start + EVALUATION_BATCH) for start in range(0, len(y), EVALUATION_BATCH)]
    results = [evaluate(model, make_examples(x[batch], y[batch], dataset.spec, device)) for batch in batches]
    losses, errors = (torch.cat(values) for values in zip(*results, strict=True))
    return _means(losses, errors, [len(labels) for _, labels in stored])


def _means(losses: Float[Tensor, "example"], errors: Float[Tensor, "example"], sizes: list[int]) -> list[ErrorAndLoss]:
    """The mean error and the mean loss of the first so many examples, of the next so many, and so on."""
    stops = np.cumsum(sizes)[:-1]
    parts = (np.split(values.cpu().numpy().astype(np.float64), stops) for values in (errors, losses))
    return [(float(error.mean()), float(loss.mean())) for error, loss in zip(*parts, strict=True)]
