"""Search spaces and tuners. A tuner answers `ask` with a job, and `tell` reports the error; it trains nothing itself.

For a client program, which declares its hyperparameters:
    Hyperparameter  the default and the range of one hyperparameter
    Config          a configuration: hyperparameter names and their values, each a Number

For a search space, and what can be done with its domains:
    SearchSpace     the domains of the client's and of the server's hyperparameters
    Uniform, LogUniform, Integer, PowerOfTwo, Choice    the domains; Domain is any of them
    parse_domain    the domain in a settings table such as {log_uniform = [1e-4, 1.0]}
    sample, perturb    `sample` draws a random configuration, `perturb` moves a configuration a little

For a program that drives a tuner, and for a new tuner in `fedtune.tuning.tuners` (tuners are not plug-ins):
    Tuner           the interface: `ask` for a job, `tell` its error
    Extendable      a tuner that can be asked for more configurations
    Trial, Job      one federation under one configuration (or a pool), and the rounds to train it to
    Score, incumbent    a trial's error after some rounds, and the best one so far
    TunerKind       the description of a tuner: how it is made, what can be set, and how it behaves
    TunerSettings   one tuner's checked settings, which a kind parses from a settings table
    TrialSource, Budget    where a tuner takes its trials from, and what it may spend
    TUNERS          the kinds of all tuners, by name
    Policy          the interface of what happens inside a trial: it hands out client configurations
    PolicyKind, PolicySettings    the description of a policy, and its checked settings

    >>> from fedtune.tuning import TUNERS, Budget, LogUniform, SearchSpace, Trial, TrialSource
    >>> settings = TUNERS["asha"].parse("asha", {"reduction_factor": 3}, Budget(max_rounds=9, total_rounds=81))
    >>> def draw(number):
    ...     return Trial(number, {}, (({"learning_rate": 0.1},),))
    >>> def compose(number, server, client):
    ...     return Trial(number, server, ((client,),))
    >>> space = SearchSpace({"learning_rate": LogUniform(1e-4, 1.0)}, {})
    >>> tuner = settings.make_tuner(TrialSource(draw, compose, space, seed=0))
    >>> job = tuner.ask()
    >>> job.trial.number, job.rounds
    (0, 1)
    >>> tuner.tell(job, error=0.5)
"""

from fedtune.tuning.domains import Choice, Domain, Integer, LogUniform, Number, PowerOfTwo, Uniform, parse_domain
from fedtune.tuning.policy import Policy
from fedtune.tuning.policy_kinds import PolicyKind, PolicySettings
from fedtune.tuning.space import Config, Hyperparameter, SearchSpace, perturb, sample
from fedtune.tuning.trial import Extendable, Job, Score, Trial, Tuner, incumbent
from fedtune.tuning.tuner_kind import Budget, TrialSource, TunerKind, TunerSettings
from fedtune.tuning.tuners import TUNERS

__all__ = [
    "TUNERS",
    "Budget",
    "Choice",
    "Config",
    "Domain",
    "Extendable",
    "Hyperparameter",
    "Integer",
    "Job",
    "LogUniform",
    "Number",
    "Policy",
    "PolicyKind",
    "PolicySettings",
    "PowerOfTwo",
    "Score",
    "SearchSpace",
    "Trial",
    "TrialSource",
    "Tuner",
    "TunerKind",
    "TunerSettings",
    "Uniform",
    "incumbent",
    "parse_domain",
    "perturb",
    "sample",
]
