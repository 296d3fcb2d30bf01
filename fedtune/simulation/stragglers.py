"""Stragglers and dropped jobs: how long an attempt at a job takes, and when it is dropped (thesis, section 3.3.3).

An attempt takes its nominal duration times 1 + |z| with z ~ N(0, straggler_std), drawn anew for each attempt. While it
runs it is dropped with probability p in each time unit, so it survives a duration d with probability (1 - p)^d.

Departures: the text gives that survival as 1 - (1 - p)^d, which is its complement. Time is continuous here: the hazard
is constant and loses a share p in each whole unit.

What a generator has left after a call depends on neither the values given nor the outcome, so that no setting shifts
the draws that come after.
"""

import math

import numpy as np


def attempt_duration(nominal: float, straggler_std: float, rng: np.random.Generator) -> float:
    """How long an attempt takes where it is not dropped, never less than `nominal`; straggler_std >= 0."""
    return nominal * (1 + straggler_std * abs(rng.standard_normal()))


def fails_after(duration: float, drop_probability: float, rng: np.random.Generator) -> float | None:
    """The time, less than `duration`, after which an attempt is dropped; None where it survives.

    `drop_probability` is p, in [0, 1).
    """
    uniform = rng.random()
    if drop_probability == 0:
        return None
    time = math.log1p(-uniform) / math.log1p(-drop_probability)  # P(time >= t) = (1 - p)^t
    return time if time < duration else None
