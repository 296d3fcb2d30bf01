"""Devices on the virtual clock: which clients take part in a round, how long the round takes, and which attempts fail.

The server asks available clients: cohort_size × (1 + over_selection) of them, rounded up, or fewer if there are not so
many. A client downloads the weights, trains, and uploads its update. The round ends as soon as `cohort_size` clients
have answered, or when all asked clients have answered, if they are fewer. Otherwise it ends at the `deadline`; without
a deadline, it ends with the last answer. A client that would answer after the end is a straggler. The updates of
stragglers and of clients that drop out do not count (Bonawitz et al. 2019, "Towards federated learning at scale",
sections 2.2 and 9).

Everything is drawn from streams keyed by the round and the client, and is known before anything is trained. So
stragglers are never trained, and every trial of a seed has the same devices. Of a trial's hyperparameters, only
`epochs` changes the duration of its rounds; if its pool has several numbers of epochs, their mean counts.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fedtune import rng
from fedtune.errors import InputError
from fedtune.settings import DevicesSettings, Settings
from fedtune.simulation.device_distributions import RANGES, distributions
from fedtune.simulation.stragglers import attempt_duration, fails_after
from fedtune.tuning.space import Number
from fedtune.tuning.trial import Job, Trial

LEAST_CHANCE = 0.001  # the least probability that an attempt succeeds, so that a job that is retried ends in practice


class Device(NamedTuple):
    """The speed and the availability of one client's machine."""

    seconds_per_example: float  # of one epoch of local training
    download_speed: float  # bytes a second
    upload_speed: float
    availability: float  # the probability that it can be asked in a round


class Asked(NamedTuple):
    """The clients that the server asks in a round, ascending; the same for every trial."""

    clients: Int[np.ndarray, "client"]
    drops_out: Bool[np.ndarray, "client"]  # whether the client drops out before it answers
    unavailable: int  # number of clients that were drawn and could not be asked


class RoundPlan(NamedTuple):
    """One round of a trial as its devices decide it: the cohort, the duration, and numbers of clients."""

    cohort: list[int]  # the clients whose updates count, ascending
    duration: float
    asked: int
    stragglers: int
    dropouts: int
    unavailable: int


class Fate(NamedTuple):
    """What will happen to one attempt at a job, known before it is trained. Times count from the attempt's start."""

    fails_after: float | None  # None if the attempt succeeds
    finish_times: Float[np.ndarray, "round"]  # when each of its rounds ends, unless the attempt fails before


class Devices:
    """The devices of a study's clients. Raises InputError if the table `[devices]` has an impossible value."""

    def __init__(self, settings: Settings, seed: int, num_train: Int[np.ndarray, "client"], weight_bytes: int) -> None:
        self._settings = settings.devices
        self._seed = seed
        self._num_train = num_train
        self._weight_bytes = weight_bytes
        self._cohort_size = settings.cohort_size
        self._num_asked = min(len(num_train), math.ceil(settings.cohort_size * (1 + self._settings.over_selection)))
        self._distributions = distributions(self._settings)
        usual = distributions(DevicesSettings())
        self._always_available = self._distributions["availability"] == usual["availability"]
        # Whether clients take no time.
        self._instant = all(self._distributions[name] == usual[name] for name in RANGES if name != "availability")
        self._asked: dict[int, Asked] = {}  # by round
        self._devices: dict[int, Device] = {}  # drawn so far, by client

    def plan(self, trial: Trial, server_round: int) -> RoundPlan:
        """Which clients take part in the trial's round, and how long it takes."""
        if server_round not in self._asked:
            self._asked[server_round] = self._ask(server_round)
        clients, drops_out, unavailable = self._asked[server_round]
        # Find the first clients that answer in time.
        answer_times = self._answer_times(clients, mean_epochs(trial))
        in_time = np.flatnonzero(~drops_out & (answer_times <= self._settings.deadline))
        counted = in_time[np.argsort(answer_times[in_time], kind="stable")][: self._cohort_size]
        # Wait for the last counted client; if the cohort is too small, until the deadline or for the last answer.
        if len(counted) == min(self._cohort_size, len(clients)):
            waited = float(answer_times[counted].max(initial=0.0))
        elif math.isfinite(self._settings.deadline):
            waited = self._settings.deadline
        else:
            waited = float(answer_times[~drops_out].max(initial=0.0))
        return RoundPlan(
            cohort=np.sort(clients[counted]).tolist(),
            duration=self._settings.round_time + waited,
            asked=len(clients),
            stragglers=int((~drops_out).sum()) - len(counted),
            dropouts=int(drops_out.sum()),
            unavailable=unavailable,
        )

    def attempt_fate(self, job: Job, number: int, after: int) -> Fate:
        """What will happen to attempt `number` (from 0) at a job whose trial has had `after` rounds."""
        draws = rng.stream(self._seed, "attempt", job.trial.number, job.rounds, number)
        slowdown = attempt_duration(1.0, self._settings.straggler_std, draws)
        durations = [self.plan(job.trial, server_round).duration for server_round in range(after + 1, job.rounds + 1)]
        finish_times = slowdown * np.cumsum(durations)
        return Fate(fails_after(float(finish_times[-1]), self._settings.drop_probability, draws), finish_times)

    def _ask(self, server_round: int) -> Asked:
        num_clients = len(self._num_train)
        draws = rng.stream(self._seed, "cohort", server_round)
        if self._always_available:
            clients, unavailable = draws.choice(num_clients, self._num_asked, replace=False).tolist(), 0
        else:
            clients, unavailable = self._available(server_round, draws)
        clients = np.sort(np.array(clients, np.int64))
        return Asked(clients, self._coins("drop out", server_round, clients, self._settings.drop_out), unavailable)

    def _available(self, server_round: int, draws: np.random.Generator) -> tuple[list[int], int]:
        clients: list[int] = []
        unavailable = 0
        for client in shuffled(len(self._num_train), draws):
            if rng.stream(self._seed, "available", server_round, client).random() < self._device(client).availability:
                clients.append(client)
            else:
                unavailable += 1
            if len(clients) == self._num_asked:
                break
        return clients, unavailable

    def _coins(
        self, purpose: str, server_round: int, clients: Int[np.ndarray, "client"], probability: float
    ) -> Bool[np.ndarray, "client"]:
        if probability == 0:
            return np.zeros(len(clients), bool)
        coins = [rng.stream(self._seed, purpose, server_round, client).random() for client in clients.tolist()]
        return np.array(coins, float) < probability

    def _answer_times(self, clients: Int[np.ndarray, "client"], epochs: float) -> Float[np.ndarray, "client"]:
        """The time at which each client answers, in seconds after it was asked."""
        if self._instant:
            return np.zeros(len(clients))
        devices = [self._device(client) for client in clients.tolist()]
        seconds, down, up, _ = np.array(devices, float).reshape(-1, 4).T
        return np.asarray(self._weight_bytes * (1 / down + 1 / up) + seconds * self._num_train[clients] * epochs)

    def _device(self, client: int) -> Device:
        if client not in self._devices:
            self._devices[client] = self._draw_device(client)
        return self._devices[client]

    def _draw_device(self, client: int) -> Device:
        values = {}
        for name, distribution in self._distributions.items():
            if isinstance(distribution, float):
                values[name] = distribution
            else:
                values[name] = float(distribution.sample(rng.stream(self._seed, f"device {name}", client)))
        return Device(**values)


def check_jobs_can_end(devices: Devices, drop_probability: float, longest_job: int, epochs: Number) -> None:
    """Raises InputError if an attempt at a job hardly ever succeeds: retrying the job would not end.

    It is a job of `longest_job` rounds, whose clients train for that many `epochs`.
    """
    if drop_probability == 0:
        return
    trial = Trial(0, {}, (({"epochs": epochs},),))
    lasts = sum(devices.plan(trial, server_round).duration for server_round in range(1, longest_job + 1))
    chance = (1 - drop_probability) ** lasts
    if chance < LEAST_CHANCE:
        raise InputError(
            f"devices.drop_probability must leave a job of {longest_job} rounds a chance of {LEAST_CHANCE} to end, "
            f"got {drop_probability}, which leaves it {chance:.1g}: the job takes {lasts:.4g} units of virtual time"
        )


def mean_epochs(trial: Trial) -> float:
    """The mean number of local epochs over the trial's pool; 1 if its client program has no epochs."""
    for factor in trial.pool:
        if "epochs" in factor[0]:
            return float(np.mean([config["epochs"] for config in factor]))
    return 1.0


def shuffled(number: int, draws: np.random.Generator) -> Iterator[int]:
    """0 to number - 1 in random order. Each one costs the same whatever `number` is (a lazy Fisher-Yates shuffle)."""
    moved: dict[int, int] = {}
    for index in range(number):
        other = int(draws.integers(index, number))
        yield moved.get(other, other)
        moved[other] = moved.pop(index, index)
