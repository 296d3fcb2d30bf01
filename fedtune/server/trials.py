"""From settings to trials: which hyperparameters are fixed, which are searched, and how trial number n is drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from fedtune import plugins, rng
from fedtune.data.federated_dataset import DatasetSpec
from fedtune.errors import UnknownNameError
from fedtune.flat_model import FlatModel
from fedtune.server import optimizers
from fedtune.settings import Settings
from fedtune.tuning.space import Config, SearchSpace, check_space, parse_domain, sample
from fedtune.tuning.trial import Compose, Draw, Trial
from fedtune.tuning.tuners import make_trial_pool, within_one_federation


@dataclass(frozen=True)
class Hyperparameters:
    """What the settings say of hyperparameters: a value for each, and what may be searched."""

    client: Config  # of `[client]`, completed by the client program's defaults: what `train` and `manual` use
    server: Config
    space: SearchSpace


def client_program(settings: Settings) -> str:
    """The name of the client program."""
    return str(settings.client.get("name", plugins.DEFAULT_CLIENT))


def resolve_hyperparameters(settings: Settings) -> Hyperparameters:
    """The hyperparameters, checked against those that the client program and the server heed. Raises InputError."""
    known = plugins.client_program(client_program(settings)).HYPERPARAMETERS
    fixed = {name: value for name, value in settings.client.items() if name != "name"}
    for name in fixed:
        if name not in known:
            raise UnknownNameError("client hyperparameter", f"client.{name}", [f"client.{each}" for each in known])
    client = {name: known[name].check(f"client.{name}", fixed.get(name, known[name].default)) for name in known}
    server = {name: getattr(settings.server, name) for name in optimizers.HYPERPARAMETERS}
    space = SearchSpace(
        {name: parse_domain(f"space.client.{name}", domain) for name, domain in settings.space.client.items()},
        {name: parse_domain(f"space.server.{name}", domain) for name, domain in settings.space.server.items()},
    )
    check_space(space.client, known, "client hyperparameter")
    check_space(space.server, optimizers.HYPERPARAMETERS, "server hyperparameter")
    return Hyperparameters(client, server, space)


def make_compose(tuner: str, seed: int, hyperparameters: Hyperparameters, options: Mapping[str, Any]) -> Compose:
    """Makes the trials of a tuner, whose `[tuner.NAME]` table is `options`, from the values of what is searched."""

    def compose(number: int, server: Config, client: Config) -> Trial:
        centre = {**hyperparameters.client, **client}
        draws = rng.stream(seed, "pool", number)
        pool = make_trial_pool(tuner, options, centre, hyperparameters.space.client, draws)
        return Trial(number, {**hyperparameters.server, **server}, pool)

    return compose


def make_draw(tuner: str, seed: int, hyperparameters: Hyperparameters, options: Mapping[str, Any]) -> Draw:
    """Makes the trials of a tuner, each from random streams of its own.

    Tuners within one federation start from the fixed values; the others draw. Trial n has the same centre under every
    one that draws.
    """
    compose = make_compose(tuner, seed, hyperparameters, options)
    space = hyperparameters.space

    def draw(number: int) -> Trial:
        if within_one_federation(tuner):
            return compose(number, {}, {})
        server = sample(space.server, rng.stream(seed, "server config", number))
        return compose(number, server, sample(space.client, rng.stream(seed, "client config", number)))

    return draw


def initial_weights(settings: Settings, spec: DatasetSpec, seed: int) -> Float[torch.Tensor, "weight"]:
    """The model's weights before the first round, the same for every tuner of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.derived_seed(seed, "initial weights"))
        return FlatModel(plugins.make_model(settings.model, spec)).flat.clone()
