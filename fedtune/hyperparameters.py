"""From settings to trials: which hyperparameters are fixed, which are searched, and how trial number n is drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from fedtune import plugins, rng
from fedtune.client.flat_model import FlatModel
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError, UnknownNameError
from fedtune.server import optimizers
from fedtune.settings import Settings, client_program
from fedtune.tuning.space import Config, SearchSpace, check_space, parse_domain, sample
from fedtune.tuning.trial import Compose, Draw, Trial, Tuner
from fedtune.tuning.tuners import checked_options, make_trial_pool, make_tuner, within_one_federation


@dataclass(frozen=True)
class Hyperparameters:
    """What the settings say of hyperparameters: a value for each, and what may be searched."""

    client: Config  # of `[client]`, completed by the client program's defaults: what `train` and `manual` use
    server: Config
    space: SearchSpace


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


def study_tuner(name: str, seed: int, settings: Settings, hyperparameters: Hyperparameters) -> Tuner:
    """The tuner of a study, before its first ask."""
    options = settings.tuner.get(name, {})
    return make_tuner(
        name,
        make_draw(name, seed, hyperparameters, options),
        max_rounds=settings.max_rounds,
        total_rounds=settings.total_rounds,
        options=options,
        compose=make_compose(name, seed, hyperparameters, options),
        space=hyperparameters.space,
        seed=seed,
    )


def check_tuners(settings: Settings, space: SearchSpace) -> None:
    """Raises InputError unless every tuner can be made from its table and has something to search."""
    for name, options in settings.tuner.items():
        checked_options(name, options)  # a table of a tuner that is not run must be right all the same
    for name in settings.shares:
        if name not in settings.tuners:
            raise UnknownNameError("tuner in shares", name, settings.tuners)
    for name in settings.tuners:
        try:
            make_tuner(
                name,
                lambda number: Trial(number, {}, (({},),)),
                max_rounds=settings.max_rounds,
                total_rounds=settings.total_rounds,
                options=settings.tuner.get(name, {}),
                compose=lambda number, server, client: Trial(number, {}, (({},),)),
                space=space,
            )
        except UnknownNameError:
            raise
        except InputError as error:
            raise InputError(f"tuner {name}: {error}") from None
    searching = [name for name in settings.tuners if name != "manual"]
    if searching and not space.client and not space.server:
        raise InputError(f"[space.client] or [space.server] must name what {searching[0]} may search, got neither")
