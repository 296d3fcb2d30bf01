"""The finite pool of client configurations of one trial.

FedEx weighs one centre and small perturbations of it; elimination starts from the whole space.
"""

from collections.abc import Mapping

import numpy as np

from fedtune.tuning.domains import Domain
from fedtune.tuning.fedex import FedExSettings
from fedtune.tuning.space import Config, perturb, sample
from fedtune.tuning.trial import Pool


def make_pool(settings: FedExSettings, centre: Config, domains: Mapping[str, Domain], rng: np.random.Generator) -> Pool:
    """The pool that the settings describe, around a whole client configuration."""
    build = {"flat": perturbed_pool, "product": product_pool}[settings.form]
    return build(centre, domains, rng, settings.pool_size, settings.perturbation)


def perturbed_pool(
    centre: Config, domains: Mapping[str, Domain], rng: np.random.Generator, size: int, fraction: float
) -> Pool:
    """A flat pool: the centre and size - 1 configurations with every searched hyperparameter perturbed."""
    return ((dict(centre), *(perturb(domains, centre, rng, fraction) for _ in range(size - 1))),)


def product_pool(
    centre: Config, domains: Mapping[str, Domain], rng: np.random.Generator, size: int, fraction: float
) -> Pool:
    """A pool with one factor for each searched hyperparameter: its value at the centre and size - 1 perturbations.

    A value that is drawn twice in a factor is kept once: equal elements would only share their probability. The values
    that are not searched are a first factor of one element.
    """
    if size == 1 or not domains:
        return ((dict(centre),),)
    fixed = {name: value for name, value in centre.items() if name not in domains}
    factors = []
    for name in sorted(domains):
        values = [centre[name], *(domains[name].perturb(centre[name], rng, fraction) for _ in range(size - 1))]
        factors.append(tuple({name: value} for value in dict.fromkeys(values)))
    return (((fixed,),) if fixed else ()) + tuple(factors)


def whole_space_pool(centre: Config, domains: Mapping[str, Domain], rng: np.random.Generator, size: int) -> Pool:
    """A flat pool: the centre and size - 1 configurations with every searched hyperparameter drawn from its domain."""
    return ((dict(centre), *({**centre, **sample(domains, rng)} for _ in range(size - 1))),)
