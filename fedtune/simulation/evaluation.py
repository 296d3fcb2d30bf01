"""Scores: which clients are evaluated, and how their errors become one number.

A federation's error is the mean over its last quarter of rounds (the tail mean): on skewed clients the error of a
single round varies between seeds two to three times as much.

The validation error has a standard error: how much the validation error would vary with other clients of the same
population. The clients of a data set are a sample of that population too. So there is no finite-population correction,
and evaluating all clients does not make the standard error 0. It measures the noise of evaluation only; the noise of
training shows in the differences between seeds.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from fedtune import rng
from fedtune.client.tasks import EvaluateTask, Failure, Metrics, Result
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import RunStopped
from fedtune.server.metrics import column, evaluation_means
from fedtune.simulation.records import Evaluation
from fedtune.tuning.trial import TAIL

STREAM_EXAMPLES = 2000  # about how many examples one evaluation task holds


def evaluation_clients(num_clients: int, wanted: int | None, seed: int) -> Int[np.ndarray, "client"]:
    """The clients on which every trial of a study is evaluated, ascending: at most `wanted`; None means all."""
    if wanted is None or wanted >= num_clients:
        return np.arange(num_clients)
    return np.sort(rng.stream(seed, "evaluation").choice(num_clients, wanted, replace=False))


def evaluation_tasks(dataset: FederatedDataset, clients: Int[np.ndarray, "client"]) -> list[EvaluateTask]:
    """The clients packed into tasks of about STREAM_EXAMPLES examples; the number of workers does not matter."""
    sizes = dataset.ranges[clients, 1:]
    cumulative = np.cumsum((sizes[..., 1] - sizes[..., 0]).sum(axis=1))
    streams = (cumulative - 1) // STREAM_EXAMPLES
    groups = np.split(clients, np.flatnonzero(np.diff(streams)) + 1)
    return [EvaluateTask(tuple(group.tolist())) for group in groups]


def combine(metrics: Sequence[Metrics]) -> Evaluation:
    """One evaluation, combined from the clients' metrics in client order."""
    errors, sizes = column(metrics, "validation_error"), column(metrics, "num_validation")
    return Evaluation(**evaluation_means(metrics), validation_error_se=standard_error(errors, sizes))


def standard_error(errors: Float[np.ndarray, "client"], sizes: Float[np.ndarray, "client"]) -> float:
    """The standard error of the clients' mean error weighted by their sizes; NaN with fewer than two clients.

    The mean is a ratio, sum(n e) / sum(n), and both sums vary with the clients drawn. To first order its variance over
    m clients is m / (m - 1) * sum((n (e - mean))^2) / sum(n)^2. The examples of a client are a cluster, since their
    errors are correlated: a client counts as one observation, however many examples it has.
    """
    counted = sizes > 0
    num_clients = int(counted.sum())
    if num_clients < 2:
        return float("nan")
    mean = np.dot(sizes, errors) / sizes.sum()
    with np.errstate(invalid="ignore"):  # the squared errors of a model that diverged are infinite
        deviations = sizes * (errors - mean)
    return float(np.sqrt(num_clients / (num_clients - 1) * np.dot(deviations, deviations)) / sizes.sum())


def flatten(results: Sequence[Result]) -> list[Metrics]:
    """The metrics in evaluation results. Raises RunStopped if a task failed: all clients must be evaluated.

    Without some of the clients, the errors of two rounds or trials could not be compared.
    """
    metrics: list[Metrics] = []
    for result in results:
        if isinstance(result, Failure):
            raise RunStopped(f"evaluation failed: {result.message}")
        assert isinstance(result, list)
        metrics += result
    return metrics


def tail_mean(rounds: Sequence[int], values: Sequence[float]) -> float:
    """The mean of the values whose rounds lie in the last quarter of the rounds so far; `rounds` ascend."""
    return float(
        np.mean([value for server_round, value in zip(rounds, values, strict=True) if server_round > TAIL * rounds[-1]])
    )
