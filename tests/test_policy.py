import math

import numpy as np
import pytest

from fedtune.tuning import elimination, fedex, rsws
from fedtune.tuning.config_pool import perturbed_pool
from fedtune.tuning.domains import LogUniform
from fedtune.tuning.elimination import EliminationPolicy
from fedtune.tuning.elimination_then_fedex import EliminationThenFedEx
from fedtune.tuning.fedex import FedExPolicy, FedExSettings
from fedtune.tuning.policy import Policy, entropy, expand
from fedtune.tuning.rsws import RSWSPolicy

CONFIGS = tuple({"learning_rate": 10 ** (-i / 2)} for i in range(7))
POOL = (CONFIGS,)
NUM_VALIDATION = np.array([5, 1, 9, 4, 7])
NUM_CLASSES = 10
WORST = 2 * math.log(NUM_CLASSES)


def fedex_around(centre):
    """FedEx on losses over nine configurations around the survivor, always the same nine."""
    pool = perturbed_pool(centre, {"learning_rate": LogUniform(1e-4, 1.0)}, np.random.default_rng(3), 9, 0.1)
    return FedExPolicy(pool, FedExSettings(signal="loss", baseline="client"), NUM_CLASSES)


POLICIES = {
    "fedex": lambda: FedExPolicy(POOL, FedExSettings(), NUM_CLASSES),
    "uniform": lambda: FedExPolicy(POOL, FedExSettings(step_size="off"), NUM_CLASSES),
    "one": lambda: FedExPolicy((CONFIGS[:1],), FedExSettings(), NUM_CLASSES),
    "elimination": lambda: EliminationPolicy(POOL, 3, NUM_CLASSES),
    "elimination+fedex": lambda: EliminationThenFedEx(EliminationPolicy(POOL, 3, NUM_CLASSES), fedex_around),
    "rsws": lambda: RSWSPolicy(POOL),
}
every_policy = pytest.mark.parametrize("name", POLICIES)


def loss_of(config):
    """Best at a learning rate of 0.1."""
    return 0.2 + (math.log10(config["learning_rate"]) + 1) ** 2 / 4


def play(policy, rounds):
    """Rounds of a cohort of five, some of whom do not answer or are dropped; everything depends on the round alone."""
    for t in rounds:
        rng = np.random.default_rng(t)
        drawn = policy.draw(rng, 5)
        error = np.array([loss_of(expand(policy.pool, row)) for row in drawn]) + rng.normal(0, 0.02, 5)
        error[rng.random(5) < 0.1] = np.nan
        num_validation = np.where(rng.random(5) < 0.1, 0, NUM_VALIDATION)
        policy.update(drawn, error, num_validation, rng.random(5) if policy.needs_error_before else None)
    return policy


def test_expand_merges_one_element_of_each_factor():
    pool = (({"a": 1, "b": 2},), ({"c": 3}, {"c": 4}), ({"d": 5}, {"d": 6}))
    assert expand(pool, np.array([0, 1, 0])) == {"a": 1, "b": 2, "c": 4, "d": 5}


def test_the_entropy_of_a_product_is_the_sum_of_the_factors_entropies():
    thetas = np.array([0.25, 0.75]), np.array([1.0, 0.0]), np.array([0.2, 0.4, 0.4])
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) - (0.2 * math.log(0.2) + 0.8 * math.log(0.4))
    assert entropy(thetas) == pytest.approx(expected)


@every_policy
def test_every_policy_keeps_to_the_protocol(name):
    policy = POLICIES[name]()
    assert isinstance(policy, Policy)
    for t in range(12):
        assert policy.signal in ("error", "loss")
        sizes = [len(factor) for factor in policy.pool]
        assert [theta.shape for theta in policy.probabilities()] == [(size,) for size in sizes]
        assert all(theta.sum() == pytest.approx(1, rel=1e-12) for theta in policy.probabilities())
        assert all(0 <= index < size for index, size in zip(policy.best(), sizes, strict=True))
        drawn = policy.draw(np.random.default_rng(0), 5)
        assert drawn.shape == (5, len(sizes))
        assert all(theta[column].all() for theta, column in zip(policy.probabilities(), drawn.T, strict=True))
        play(policy, [t])


@every_policy
@pytest.mark.parametrize("stop", [0, 4, 6, 9])
def test_a_restored_policy_goes_on_to_the_bit(name, stop, tmp_path):
    """Elimination of seven by halving every three rounds is over after six."""
    straight, half = play(POLICIES[name](), range(12)), play(POLICIES[name](), range(stop))
    np.savez(tmp_path / "state.npz", **half.to_arrays())
    resumed = POLICIES[name]()
    with np.load(tmp_path / "state.npz") as arrays:
        resumed.restore(dict(arrays))
    play(resumed, range(stop, 12))
    assert resumed.pool == straight.pool
    assert resumed.best() == straight.best()
    assert resumed.to_arrays().keys() == straight.to_arrays().keys()
    for array, meant in zip(resumed.to_arrays().values(), straight.to_arrays().values(), strict=True):
        assert np.array_equal(array, meant)
        assert array.dtype == meant.dtype


@every_policy
def test_restoring_forgets_what_came_after(name):
    policy = play(POLICIES[name](), range(2))
    before = policy.to_arrays()
    play(policy, range(2, 12))
    policy.restore(before)
    assert policy.pool == POLICIES[name]().pool
    for array, meant in zip(policy.to_arrays().values(), before.values(), strict=True):
        assert np.array_equal(array, meant)


@every_policy
def test_a_round_in_which_nobody_answers_teaches_nothing(name):
    policy = play(POLICIES[name](), range(4))
    best, thetas = policy.best(), policy.probabilities()
    policy.update(policy.draw(np.random.default_rng(0), 5), np.full(5, np.nan), np.zeros(5, np.int64))
    assert policy.best() == best
    assert all(np.array_equal(a, b) for a, b in zip(policy.probabilities(), thetas, strict=True))


def test_fedex_is_what_the_functions_say_of_those_who_answered():
    policy, settings, state = POLICIES["fedex"](), FedExSettings(), fedex.init(POOL)
    for t in range(5):
        rng = np.random.default_rng(t)
        drawn, error = fedex.draw(state, settings, rng, 5), rng.random(5)
        assert np.array_equal(policy.draw(np.random.default_rng(t), 5), drawn)
        answered = np.array([True, t != 1, True, t != 3, True])
        state = fedex.update(state, drawn[answered], error[answered], NUM_VALIDATION[answered], settings, 1.0)
        policy.update(drawn, np.where(answered, error, np.nan), np.where(answered, NUM_VALIDATION, 0))
        assert np.array_equal(policy.probabilities()[0], fedex.probabilities(state, settings)[0])
    assert policy.best() == fedex.best(state)


def test_fedex_leaves_theta_where_no_update_was_usable():
    """All five answered, and all five updates were dropped: the weights stay too, so nothing was learnt of them."""
    policy = play(POLICIES["fedex"](), range(3))
    theta = policy.probabilities()[0]
    policy.update(policy.draw(np.random.default_rng(0), 5), np.full(5, np.nan), NUM_VALIDATION)
    assert np.array_equal(policy.probabilities()[0], theta)


def test_uniform_stays_uniform():
    np.testing.assert_allclose(play(POLICIES["uniform"](), range(12)).probabilities()[0], 1 / 7, rtol=1e-14)


def test_elimination_follows_its_functions_and_counts_rounds_without_an_answer():
    policy = EliminationPolicy(POOL, 3, NUM_CLASSES)
    state = elimination.init(7)
    for t in range(6):
        drawn, loss = elimination.draw(state, np.random.default_rng(t), 5), np.random.default_rng(t).random(5)
        assert np.array_equal(policy.draw(np.random.default_rng(t), 5), drawn)
        heard = NUM_VALIDATION if t != 2 else np.zeros(5, np.int64)
        state = elimination.update(state, drawn, loss, heard, 3, WORST)
        policy.update(drawn, loss, heard)
        assert np.array_equal(policy.probabilities()[0] > 0, state.live)
        assert entropy(policy.probabilities()) == pytest.approx(math.log(state.live.sum()))
    assert policy.best() == (elimination.survivor(state),)
    assert policy.signal == "loss"


def test_fedex_follows_elimination_around_the_survivor():
    policy = EliminationThenFedEx(EliminationPolicy(POOL, 3, NUM_CLASSES), fedex_around)
    alone = EliminationPolicy(POOL, 3, NUM_CLASSES)
    for t in range(6):
        assert policy.pool == POOL
        assert not policy.needs_error_before
        play(policy, [t])
        play(alone, [t])
    survivor = CONFIGS[alone.best()[0]]
    assert survivor == CONFIGS[2]  # the learning rate of 0.1
    assert policy.pool == fedex_around(survivor).pool
    assert policy.needs_error_before
    np.testing.assert_allclose(policy.probabilities()[0], 1 / 9, rtol=1e-14)
    play(policy, range(6, 60))
    reference = play(fedex_around(survivor), range(6, 60))
    assert np.array_equal(policy.probabilities()[0], reference.probabilities()[0])
    assert policy.probabilities()[0].max() > 0.3


def test_fedex_around_a_pool_of_one_starts_at_once():
    policy = EliminationThenFedEx(EliminationPolicy((CONFIGS[:1],), 3, NUM_CLASSES), fedex_around)
    assert policy.pool == fedex_around(CONFIGS[0]).pool


def test_rsws_draws_uniformly_and_picks_by_the_last_quarters_errors():
    policy = play(RSWSPolicy(POOL), range(40))
    assert np.array_equal(policy.probabilities()[0], np.full(7, 1 / 7))
    assert policy.best() == (int(rsws.mean_errors(policy.state, 7).argmin()),)
    assert CONFIGS[policy.best()[0]]["learning_rate"] == 0.1
