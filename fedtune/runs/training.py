"""Trains one job of a trial.

The result depends on the settings, the seed, the trial, the first and last round, and the checkpoint, and on nothing
else. So a job may be trained at any time, in any order, and at the same time as other jobs.
"""

import functools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from fedtune.client.tasks import Executor, Ticket
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.runs.lost_clients import LostClients
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import Settings
from fedtune.simulation.devices import Devices
from fedtune.simulation.federation import Federation
from fedtune.simulation.records import RoundRecord
from fedtune.tuning.policy import Policy
from fedtune.tuning.trial import Trial

OnRound = Callable[[Federation, RoundRecord], None]


@dataclass(frozen=True)
class TrainingSetup:
    """What all jobs of a study share. The settings, the seed and the journal's lost clients decide all of it."""

    study: str  # its name in messages
    settings: Settings
    seed: int
    dataset: FederatedDataset
    executor: Executor
    initial_weights: Float[torch.Tensor, "weight"]
    evaluation_clients: Int[np.ndarray, "client"]
    devices: Devices
    make_policy: Callable[[Trial], Policy]
    lost_clients: LostClients


def train(
    setup: TrainingSetup,
    trial: Trial,
    checkpoint: Mapping[str, np.ndarray] | None,
    to_round: int,
    order: float,
    on_round: OnRound,
) -> Generator[Ticket, None, Federation]:
    """The trial's federation after `to_round` rounds. Training starts from the checkpoint; None means from the start.

    It yields the tickets that it waits for. `order` is its place in the executor's queue, smaller first.
    """
    strategy = FedTuneStrategy(
        trial,
        setup.settings.server,
        setup.make_policy(trial),
        cohort_size=setup.settings.cohort_size,
        seed=setup.seed,
        objective=setup.dataset.spec.objective,
    )
    federation = Federation(
        strategy,
        setup.initial_weights,
        setup.dataset,
        setup.executor,
        setup.evaluation_clients,
        setup.devices,
        on_round,
        order,
        functools.partial(setup.lost_clients.in_round, trial.number),
        f"{setup.study}, ",
    )
    if checkpoint is not None:
        federation.restore(checkpoint)
    yield from federation.advance(to_round, setup.settings.evaluate_every)
    return federation


def ignore(federation: Federation, record: RoundRecord) -> None:
    """An `on_round` for rounds that are trained again: the journal holds them already."""
