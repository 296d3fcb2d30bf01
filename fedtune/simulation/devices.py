"""Devices on the virtual clock: who of a cohort takes part in a round, and how long the round takes.

The server asks clients that are available, `over_selection` more of them than the cohort needs. A client downloads the
weights, trains, and uploads its update. The round ends when `cohort_size` clients have answered, or all that were
asked, or at the `deadline`, or where there is none when nobody is left to wait for. Who answers later is late: its
update is left out, as is that of a client that drops out (Bonawitz et al. 2019, "Towards federated learning at scale",
sections 2.2 and 9).

All of it is drawn from streams keyed by the round and the client, and known before anything is trained: late clients
are never computed, and every trial of a seed meets the same devices. Only a trial's own number of epochs makes its
rounds longer; where its pool has several, their mean counts.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fedtune import rng
from fedtune.errors import InputError
from fedtune.settings import DevicesSettings, Settings
from fedtune.tuning.domains import Choice, Domain, parse_domain
from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import Trial

FREE = {"seconds_per_example": 0.0, "download_speed": math.inf, "upload_speed": math.inf}  # take no time
LEAST_CHANCE = 0.001  # of ending that a job must have which is tried again until it does


class LogNormal(NamedTuple):
    """Positive numbers around a median, whose logarithms are normal with standard deviation sigma."""

    median: float
    sigma: float

    def sample(self, draws: np.random.Generator) -> float:
        return float(self.median * math.exp(self.sigma * draws.standard_normal()))


Quantity = float | Domain | LogNormal


class Device(NamedTuple):
    """What one client's machine can do."""

    seconds_per_example: float  # of one epoch of local training
    download_speed: float  # bytes a second
    upload_speed: float
    availability: float  # the probability that it can be asked in a round


class Asked(NamedTuple):
    """Whom the server asks in a round, whatever it trains; clients ascend."""

    clients: Int[np.ndarray, "client"]
    left: Bool[np.ndarray, "client"]  # who drops out before answering
    unavailable: int  # how many were drawn and could not be asked


class RoundPlan(NamedTuple):
    """One round of a trial as its devices decide it."""

    cohort: list[int]  # the clients whose updates count, ascending
    duration: float
    asked: int
    late: int
    left: int
    unavailable: int


class Devices:
    """The devices of a study's clients. Raises InputError where the table `[devices]` has an impossible value."""

    def __init__(self, settings: Settings, seed: int, num_train: Int[np.ndarray, "client"], weight_bytes: int) -> None:
        self._settings = settings.devices
        self._seed = seed
        self._num_train = num_train
        self._weight_bytes = weight_bytes
        self._cohort_size = settings.cohort_size
        self._num_asked = min(len(num_train), math.ceil(settings.cohort_size * (1 + self._settings.over_selection)))
        self._quantities = quantities(self._settings)
        self._always_there = self._quantities["availability"] == 1.0
        self._instant = all(self._quantities[name] == free for name, free in FREE.items())
        self._asked: dict[int, Asked] = {}  # by round
        self._devices: dict[int, Device] = {}  # of the clients that were asked so far

    def plan(self, trial: Trial, server_round: int) -> RoundPlan:
        """Who takes part in the trial's round, and how long it takes."""
        if server_round not in self._asked:
            self._asked[server_round] = self._ask(server_round)
        clients, left, unavailable = self._asked[server_round]
        finishes = self._finishes(clients, mean_epochs(trial))
        in_time = np.flatnonzero(~left & (finishes <= self._settings.deadline))
        counted = in_time[np.argsort(finishes[in_time], kind="stable")][: self._cohort_size]
        if len(counted) == min(self._cohort_size, len(clients)):
            waited = float(finishes[counted].max(initial=0.0))
        elif math.isfinite(self._settings.deadline):
            waited = self._settings.deadline
        else:
            waited = float(finishes[~left].max(initial=0.0))
        return RoundPlan(
            cohort=np.sort(clients[counted]).tolist(),
            duration=self._settings.round_time + waited,
            asked=len(clients),
            late=int((~left).sum()) - len(counted),
            left=int(left.sum()),
            unavailable=unavailable,
        )

    def ends(self, trial: Trial, after: int, up_to: int) -> Float[np.ndarray, "round"]:
        """The times at which the trial's rounds after + 1 to up_to end, counted from the first one's begin."""
        return np.cumsum([self.plan(trial, server_round).duration for server_round in range(after + 1, up_to + 1)])

    def _ask(self, server_round: int) -> Asked:
        num_clients = len(self._num_train)
        draws = rng.stream(self._seed, "cohort", server_round)
        if self._always_there:
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

    def _finishes(self, clients: Int[np.ndarray, "client"], epochs: float) -> Float[np.ndarray, "client"]:
        """When each client has answered, in seconds after it was asked."""
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
        return Device(
            **{
                name: quantity
                if isinstance(quantity, float)
                else float(quantity.sample(rng.stream(self._seed, f"device {name}", client)))
                for name, quantity in self._quantities.items()
            }
        )


def quantities(settings: DevicesSettings) -> dict[str, Quantity]:
    """What each device is drawn from, checked: a number or a distribution for each field of Device."""
    return {name: _quantity(f"devices.{name}", getattr(settings, name)) for name in Device._fields}


def _quantity(name: str, value: float | dict[str, Any]) -> Quantity:
    ends: tuple[float, ...]
    quantity: Quantity
    if not isinstance(value, dict):
        quantity, ends = float(value), (value,)
    elif list(value) == ["log_normal"]:
        given = value["log_normal"]
        if not isinstance(given, list) or len(given) != 2:
            raise InputError(f"{name}: log_normal must be [median, sigma], got {given!r}")
        median = float(checked_number(f"{name}: the median of log_normal", given[0], low=0, low_open=True))
        sigma = float(checked_number(f"{name}: the sigma of log_normal", given[1], low=0, high=10))
        quantity, ends = LogNormal(median, sigma), (median,)
        if name == "devices.availability":
            raise InputError(f"{name} must be a probability, got {value!r}, which has no upper end")
    else:
        quantity = parse_domain(name, value)
        ends = quantity.options if isinstance(quantity, Choice) else (quantity.low, quantity.high)
    for end in ends:
        if name == "devices.availability":
            checked_number(name, end, low=0, high=1, low_open=True)
        elif name == "devices.seconds_per_example":
            checked_number(name, end, low=0)
        elif end != math.inf:
            checked_number(name, end, low=0, low_open=True)
    return quantity


def check_jobs_can_end(settings: DevicesSettings, longest_job: int) -> None:
    """Raises InputError where a job of that many rounds, tried again whenever it is dropped, hardly ever ends."""
    chance = (1 - settings.drop_probability) ** (longest_job * settings.round_time)
    if chance < LEAST_CHANCE:
        raise InputError(
            f"devices.drop_probability must leave a job of {longest_job} rounds a chance of {LEAST_CHANCE} to end, "
            f"got {settings.drop_probability}, which leaves it {chance:.1g}"
        )


def mean_epochs(trial: Trial) -> float:
    """The mean number of local epochs over the trial's pool; 1 where its client program has no such thing."""
    for factor in trial.pool:
        if "epochs" in factor[0]:
            return float(np.mean([config["epochs"] for config in factor]))
    return 1.0


def shuffled(number: int, draws: np.random.Generator) -> Iterator[int]:
    """0 to number - 1 in random order; each costs the same however many there are (Fisher and Yates, lazily)."""
    moved: dict[int, int] = {}
    for index in range(number):
        other = int(draws.integers(index, number))
        yield moved.get(other, other)
        moved[other] = moved.pop(index, index)
