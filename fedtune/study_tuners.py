"""The tuner of a study and its trials, made from the settings of a run."""

from fedtune import rng
from fedtune.errors import InputError, UnknownNameError
from fedtune.hyperparameters import Hyperparameters
from fedtune.settings import Settings
from fedtune.tuning.space import Config, SearchSpace, sample
from fedtune.tuning.trial import Compose, Draw, Trial, Tuner
from fedtune.tuning.tuner_kind import Budget, TrialSource, TunerSettings
from fedtune.tuning.tuners import tuner_kind


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
