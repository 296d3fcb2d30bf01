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
    before: Metrics = {}
    if error_before:
        model.load(weights)
        ((error, loss),) = _measure(model, dataset, [(client, "validation")], device)
        before = {"error_before": error, "loss_before": loss}
    trained = _trained(train, model, weights, dataset, client, config, seed, device)
    ((error, loss),) = _measure(model, dataset, [(client, "validation")], device)
    counts = {f"num_{part}": len(dataset.examples(client, part)[1]) for part in ("train", "validation")}
    return trained, {"error": error, "loss": loss, **before, **counts}


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
    measured = iter(_measure(model, dataset, parts, device))
    results = []
    for client in clients:
        metrics: Metrics = {}
        for part in ("validation", "test"):
            metrics[f"{part}_error"], metrics[f"{part}_loss"] = next(measured)
            metrics[f"num_{part}"] = len(dataset.examples(client, part)[1])
        results.append(metrics)
    return results


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


def _measure(
    model: FlatModel, dataset: FederatedDataset, parts: Sequence[tuple[int, str]], device: Device
) -> list[tuple[float, float]]:
    """The mean error and the mean loss of the model's weights on each of some clients' parts."""
    stored = [dataset.examples(client, part) for client, part in parts]
    x, y = (np.concatenate(arrays) for arrays in zip(*stored, strict=True))
    batches = [slice(start, start + EVALUATION_BATCH) for start in range(0, len(y), EVALUATION_BATCH)]
    results = [evaluate(model, make_examples(x[batch], y[batch], dataset.spec, device)) for batch in batches]
    losses, errors = (torch.cat(values).cpu().numpy().astype(np.float64) for values in zip(*results, strict=True))
    stops = np.cumsum([len(labels) for _, labels in stored])[:-1]
    return [
        (float(error.mean()), float(loss.mean()))
        for error, loss in zip(np.split(errors, stops), np.split(losses, stops), strict=True)
    ]
