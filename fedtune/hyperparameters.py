"""From settings to tuners and trials: which hyperparameters are fixed or searched, and how trial number n is drawn."""

from dataclasses import dataclass

import torch
from jaxtyping import Float

from fedtune import plugins, rng
from fedtune.client.flat_model import FlatModel
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError, UnknownNameError
from fedtune.server import optimizers
from fedtune.settings import Settings, client_program_name
from fedtune.tuning.domains import parse_domain
from fedtune.tuning.space import Config, SearchSpace, check_space, sample
from fedtune.tuning.trial import Compose, Draw, Trial, Tuner
from fedtune.tuning.tuner_kind import Budget, TrialSource, TunerSettings
from fedtune.tuning.tuners import tuner_kind


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters in the settings: a fixed value for each, and the search space.

    With `fixed_first`, trial 0 of a search has the fixed values, also if they lie outside the search space.
    """

    client: Config  # from `[client]`, completed by the client program's defaults; `train` and `manual` use it
    server: Config
    space: SearchSpace
    fixed_first: bool = False


def resolve_hyperparameters(settings: Settings) -> Hyperparameters:
    """The hyperparameters, checked against those that the client program and the server use. Raises InputError."""
    known = plugins.load_client_program(client_program_name(settings)).HYPERPARAMETERS
    fixed = {name: value for name, value in settings.client.items() if name != "name"}
    for name in fixed:
        if name not in known:
            raise UnknownNameError("client hyperparameter", f"client.{name}", [f"client.{other}" for other in known])
    client = {name: known[name].check(f"client.{name}", fixed.get(name, known[name].default)) for name in known}
    server = {
        name: hyperparameter.check(f"server.{name}", getattr(settings.server, name))
        for name, hyperparameter in optimizers.HYPERPARAMETERS.items()
    }
    space = SearchSpace(
        {name: parse_domain(f"space.client.{name}", domain) for name, domain in settings.space.client.items()},
        {name: parse_domain(f"space.server.{name}", domain) for name, domain in settings.space.server.items()},
    )
    check_space(space.client, known, "client hyperparameter")
    check_space(space.server, optimizers.HYPERPARAMETERS, "server hyperparameter")
    return Hyperparameters(client, server, space, settings.fixed_first)


def make_compose(tuner: TunerSettings, seed: int, hyperparameters: Hyperparameters) -> Compose:
    """Makes the trials of a tuner from values of the hyperparameters that are searched."""

    def compose(number: int, server: Config, client: Config) -> Trial:
        centre = {**hyperparameters.client, **client}
        draws = rng.stream(seed, "pool", number)
        pool = tuner.policy.make_pool(centre, hyperparameters.space.client, draws)
        return Trial(number, {**hyperparameters.server, **server}, pool)

    return compose


def make_draw(tuner: TunerSettings, seed: int, hyperparameters: Hyperparameters) -> Draw:
    """Makes the trials of a tuner, each from random streams of its own.

    A tuner within one federation starts from the fixed values, and so does trial 0 of a search if it is `fixed_first`.
    All other trials of a search have drawn values. Trial n has the same centre under every search.
    """
    compose = make_compose(tuner, seed, hyperparameters)
    space = hyperparameters.space

    def draw(number: int) -> Trial:
        if not tuner.kind.searches or (number == 0 and hyperparameters.fixed_first):
            return compose(number, {}, {})
        server = sample(space.server, rng.stream(seed, "server config", number))
        return compose(number, server, sample(space.client, rng.stream(seed, "client config", number)))

    return draw


def initial_weights(settings: Settings, spec: DatasetSpec, seed: int) -> Float[torch.Tensor, "weight"]:
    """The model's weights before the first round, the same for every tuner of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.derived_seed(seed, "initial weights"))
        return FlatModel(plugins.make_model(settings.model, spec)).flat.clone()


def tuner_settings(name: str, settings: Settings) -> TunerSettings:
    """The settings of a run's tuner, from its `[tuner.NAME]` table and the budget. Raises InputError."""
    budget = Budget(settings.max_rounds, settings.total_rounds)
    return tuner_kind(name).parse(name, settings.tuner.get(name, {}), budget)


def study_tuner(tuner: TunerSettings, seed: int, hyperparameters: Hyperparameters) -> Tuner:
    """The tuner of a study, before its first ask."""
    draw, compose = make_draw(tuner, seed, hyperparameters), make_compose(tuner, seed, hyperparameters)
    return tuner.make_tuner(TrialSource(draw, compose, hyperparameters.space, seed))


def resolve_tuners(settings: Settings, space: SearchSpace) -> dict[str, TunerSettings]:
    """The settings of every tuner of a run, by name.

    Raises InputError unless every tuner can be made from its table and has something to search.
    """
    for name, table in settings.tuner.items():
        tuner_kind(name).checked_options(name, table)  # also the table of a tuner that is not run
    for name in settings.shares:
        if name not in settings.tuners:
            raise UnknownNameError("tuner in shares", name, settings.tuners)
    tuners = {}
    for name in settings.tuners:
        try:
            tuners[name] = tuner_settings(name, settings)
            tuners[name].check(space)
        except UnknownNameError:
            raise
        except InputError as error:
            raise InputError(f"tuner {name}: {error}") from None
    searching = [name for name in settings.tuners if name != "manual"]
    if searching and not space.client and not space.server:
        raise InputError(f"[space.client] or [space.server] must name what {searching[0]} may search, got neither")
    return tuners
