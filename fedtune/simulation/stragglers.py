"""Slow and failed attempts: how long an attempt at a job takes, and when it fails (thesis, section 3.3.3).

An attempt takes its nominal duration times 1 + |z| with z ~ N(0, straggler_std), drawn anew for each attempt. While it
runs, it fails with probability p in each time unit, so it survives a duration d with probability (1 - p)^d.

Departures: the thesis prints 1 - (1 - p)^d for the probability to survive, which is the probability to fail. Time is
continuous here: the hazard is constant, and a share p of the attempts fails in each whole unit.

Each function takes one draw from the generator, whatever its arguments and its result: so no setting shifts the draws
that follow.
"""

import math

import numpy as np


def attempt_duration(nominal: float, straggler_std: float, rng: np.random.Generator) -> float:
    """How long an attempt takes if it does not fail, at least `nominal`; straggler_std >= 0."""
    return nominal * (1 + straggler_std * abs(rng.standard_normal()))


def fails_after(duration: float, drop_probability: float, rng: np.random.Generator) -> float | None:
    """The time, less than `duration`, after which an attempt fails; None if it survives.

    `drop_probability` is p, in [0, 1).
    """
    uniform = rng.random()
    if drop_probability == 0:
        return None
    time = math.log1p(-uniform) / math.log1p(-drop_probability)  # P(time >= t) = (1 - p)^t
    return time if time < duration else None
