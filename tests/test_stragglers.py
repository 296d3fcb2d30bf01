import math

import numpy as np
import pytest

from fedtune import rng
from fedtune.simulation.stragglers import attempt_duration, fails_after

NUM_DRAWS = 20_000
# By Dvoretzky, Kiefer and Wolfowitz an empirical distribution of n draws strays further than this from its own
# somewhere with a probability of at most 1e-9.
MOST_STRAYED = math.sqrt(math.log(2 / 1e-9) / (2 * NUM_DRAWS))


def strayed(drawn, distribution):
    """The largest distance of the draws' empirical distribution from the true one."""
    drawn = np.sort(drawn)
    true = np.array([distribution(value) for value in drawn])
    below, upto = np.arange(len(drawn)) / NUM_DRAWS, np.arange(1, len(drawn) + 1) / NUM_DRAWS
    return max(np.abs(true - below).max(), np.abs(true - upto).max())


def test_duration_is_the_formula():
    normals = rng.stream(0, "stragglers").standard_normal(100)
    draws = rng.stream(0, "stragglers")
    for k, z in enumerate(normals, 1):
        assert attempt_duration(3.0 * k, 0.5, draws) == pytest.approx(3 * k * (1 + abs(0.5 * z)), rel=1e-15)


def test_durations_are_half_normal_above_the_nominal():
    """False alarm: 1e-9. P(4 (1 + |z|) <= d) = erf((d / 4 - 1) / (std sqrt(2)))."""
    draws, std = rng.stream(1, "stragglers"), 1.33
    durations = [attempt_duration(4.0, std, draws) for _ in range(NUM_DRAWS)]
    assert strayed(durations, lambda d: math.erf((d / 4 - 1) / (std * math.sqrt(2)))) < MOST_STRAYED


def test_drop_time_is_the_formula():
    """The inverse transform: dropped at t just where u = (1 - p)^t, and not at all where t is no less than d."""
    uniforms = rng.stream(0, "drops").random(100)
    draws = rng.stream(0, "drops")
    for k, uniform in enumerate(uniforms, 1):
        time = fails_after(k / 4, 0.1, draws)
        survives = 1 - uniform <= 0.9 ** (k / 4)
        assert (time is None) == survives
        if time is not None:
            assert 0.9**time == pytest.approx(1 - uniform)


@pytest.mark.parametrize(("duration", "drop_probability"), [(256.0, 0.01), (40.0, 0.02), (0.5, 0.7), (2.0, 1e-5)])
def test_drop_times_have_a_constant_hazard_up_to_the_duration(duration, drop_probability):
    """False alarm: 1e-9 a case. P(dropped by t) = 1 - (1 - p)^t for t <= d, and the rest survives."""
    draws = rng.stream(2, "drops")
    times = [fails_after(duration, drop_probability, draws) for _ in range(NUM_DRAWS)]
    dropped = [time for time in times if time is not None]
    assert all(0 <= time < duration for time in dropped)
    distance = strayed(dropped, lambda t: 1 - (1 - drop_probability) ** t) if dropped else 0
    assert distance < MOST_STRAYED
    assert abs(len(dropped) / NUM_DRAWS - (1 - (1 - drop_probability) ** duration)) < MOST_STRAYED


def test_without_noise():
    draws = rng.stream(3, "noise")
    assert attempt_duration(7.0, 0.0, draws) == 7.0
    assert attempt_duration(0.0, 2.0, draws) == 0.0
    assert all(fails_after(1e300, 0.0, draws) is None for _ in range(100))
    assert all(fails_after(0.0, 0.999, draws) is None for _ in range(100))  # no time to be dropped in


def test_hazards_at_the_ends_of_the_range():
    draws = rng.stream(4, "noise")
    assert all(fails_after(1e6, math.nextafter(1, 0), draws) < 1e6 for _ in range(100))
    assert all(fails_after(1e6, 5e-324, draws) is None for _ in range(100))


def test_no_setting_shifts_the_draws_that_follow():
    following = set()
    for std, drop_probability in ((0.0, 0.0), (2.0, 0.0), (0.0, 0.5), (2.0, 0.001)):
        draws = rng.stream(5, "noise")
        for nominal in (1.0, 256.0):
            fails_after(attempt_duration(nominal, std, draws), drop_probability, draws)
        following.add(draws.random())
    assert len(following) == 1
