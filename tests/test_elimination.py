import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import InputError
from fedtune.tuning import elimination
from fedtune.tuning.elimination import EliminationSettings, EliminationState

WORST = 2 * math.log(10)


def play(state, rounds, loss_of, cohort_size=10, m=4, seed=0, first=0):
    """The state after some rounds; `loss_of(generator, drawn)` are the cohort's losses."""
    for t in range(first, first + rounds):
        rng = np.random.default_rng([seed, t])
        drawn = elimination.draw(state, rng, cohort_size)
        state = elimination.update(state, drawn, loss_of(rng, drawn[:, 0]), np.full(cohort_size, 5), m, WORST)
    return state


def by_number(rng, drawn):
    """Losses that fall with the configuration's number, and noise."""
    return 1.5 - 0.05 * drawn + rng.normal(0, 0.02, len(drawn))


def literal_effects(rows, num_configs):
    """The alternating means of `rows`, (round, configuration, loss), one at a time."""
    effect = dict.fromkeys(range(num_configs), 0.0)
    for _ in range(12):
        level = {}
        for t in {t for t, _, _ in rows}:
            residuals = [y - effect[c] for u, c, y in rows if u == t]
            level[t] = sum(residuals) / len(residuals)
        for c in effect:
            residuals = [y - level[t] for t, d, y in rows if d == c]
            effect[c] = sum(residuals) / (len(residuals) + 0.5)
    return [effect[c] for c in range(num_configs)]


def state_of(rows, num_configs):
    t, c, y = (np.array(column) for column in zip(*rows, strict=True))
    return elimination.init(num_configs)._replace(row_round=t, row_config=c, row_loss=y.astype(float))


# The fit and the cut.


def test_a_round_by_hand():
    """Losses 0.2, 0.4, 0.9, 0.5: the round is their mean 0.5, an effect (y - 0.5) / 1.5; 0 and 1 are kept."""
    drawn, loss = np.array([[0], [1], [2], [3]]), np.array([0.2, 0.4, 0.9, 0.5])
    state = elimination.update(elimination.init(4), drawn, loss, np.full(4, 5), 2, WORST)
    np.testing.assert_allclose(elimination.effects(state), [-0.2, -0.1 / 1.5, 0.4 / 1.5, 0.0], atol=1e-15)
    assert state.live.all()
    state = elimination.update(state, np.array([[1], [0]]), np.array([0.4, 0.4]), np.array([5, 5]), 2, WORST)
    assert state.live.tolist() == [True, True, False, False]
    assert state.dealt.tolist() == [2, 2, 1, 1]
    state = elimination.update(state, np.array([[1], [0]]), np.array([0.1, 0.9]), np.array([5, 5]), 2, WORST)
    state = elimination.update(state, np.array([[1], [0]]), np.array([0.1, 0.9]), np.array([5, 5]), 2, WORST)
    assert elimination.over(state)
    assert elimination.survivor(state) == 1


def test_effects_are_the_alternating_means():
    """Against the literal sums; the losses fall from round to round, and configuration 4 was never heard."""
    rng = np.random.default_rng(0)
    rows = [(t, int(rng.integers(4)), float(2 / (1 + t) + rng.random())) for t in range(6) for _ in range(t + 1)]
    effects = elimination.effects(state_of(rows, 5))
    np.testing.assert_allclose(effects, literal_effects(rows, 5), rtol=1e-12, atol=1e-15)
    assert effects[4] == 0


def test_effects_solve_the_shrunken_least_squares_problem():
    """What the sweeps run to: the minimum of sum (y - round - effect)^2 + 0.5 sum effect^2."""
    rng = np.random.default_rng(1)
    num_rounds, k = 8, 3
    rows = [(t, c, float(rng.random() + 0.3 * c - 0.2 * t)) for t in range(num_rounds) for c in range(k)]
    design = np.zeros((len(rows) + k, num_rounds + k))
    target = np.zeros(len(rows) + k)
    for i, (t, c, y) in enumerate(rows):
        design[i, t] = design[i, num_rounds + c] = 1
        target[i] = y
    for c in range(k):
        design[len(rows) + c, num_rounds + c] = math.sqrt(0.5)
    solution = np.linalg.lstsq(design, target)[0][num_rounds:]
    np.testing.assert_allclose(elimination.effects(state_of(rows, k)), solution, rtol=1e-6)


def test_rounds_that_are_worse_for_all_do_not_tell_against_those_who_played_them():
    """Configuration 0 only met the hard round, 1 only the easy one; both were 0.3 better than 2."""
    rows = [(0, 0, 1.7), (0, 2, 2.0), (1, 1, 0.1), (1, 2, 0.4)] * 5
    effects = elimination.effects(state_of(rows, 3))
    assert effects[0] == pytest.approx(effects[1], abs=1e-12)
    assert effects[0] < effects[2]


def test_27_become_13_6_3_1_and_it_is_over_after_four_times_m_rounds():
    state, lives = elimination.init(27), []
    for t in range(4 * 5):
        assert not elimination.over(state)
        state = play(state, 1, by_number, m=5, first=t)
        lives.append(int(state.live.sum()))
    assert lives == [27] * 4 + [13] * 5 + [6] * 5 + [3] * 5 + [1]
    assert elimination.over(state)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_survives(seed):
    """Configurations 0.05 apart, noise of 0.02: over 1000 seeds the best always survived."""
    state = play(elimination.init(27), 16, by_number, seed=seed)
    assert elimination.survivor(state) == 26


def test_after_the_end_all_use_the_survivor_and_nothing_changes():
    state = play(elimination.init(5), 8, by_number)
    assert elimination.over(state)
    assert (elimination.draw(state, np.random.default_rng(0), 7) == elimination.survivor(state)).all()
    assert len(state.row_loss) == 0
    assert play(state, 3, by_number, first=8) is state


def test_one_configuration_is_over_before_it_begins():
    state = elimination.init(1)
    assert elimination.over(state)
    assert elimination.survivor(state) == 0
    assert (elimination.draw(state, np.random.default_rng(0), 3) == np.zeros((3, 1))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_a_bad_loss_counts_as_the_worst(bad):
    drawn, heard = np.array([[0], [1], [2]]), np.array([5, 5, 5])
    told = elimination.update(elimination.init(3), drawn, np.array([0.5, bad, 0.9]), heard, 1, WORST)
    meant = elimination.update(elimination.init(3), drawn, np.array([0.5, WORST, 0.9]), heard, 4, WORST)
    assert elimination.survivor(told) == 0
    assert meant.row_loss.tolist() == [0.5, WORST, 0.9]
    untold = elimination.update(elimination.init(3), drawn, np.array([0.5, bad, 0.9]), heard, 4, WORST)
    assert np.array_equal(untold.row_loss, meant.row_loss)


def test_a_client_that_did_not_answer_spends_its_card_and_says_nothing():
    drawn, loss = np.array([[0], [1], [2]]), np.array([0.5, np.nan, 0.9])
    state = elimination.update(elimination.init(3), drawn, loss, np.array([5, 0, 5]), 4, WORST)
    assert state.row_config.tolist() == [0, 2]
    assert state.dealt.tolist() == [1, 1, 1]
    nobody = elimination.update(state, drawn, np.full(3, np.nan), np.zeros(3), 4, WORST)
    assert nobody.rounds == 2
    assert len(nobody.row_loss) == 2


def test_ties_go_to_the_lower_number():
    state = play(elimination.init(6), 8, lambda rng, drawn: np.full(len(drawn), 0.5), cohort_size=6)
    assert elimination.survivor(state) == 0


def test_renaming_the_configurations_renames_the_survivors():
    rng = np.random.default_rng(0)
    new_name = rng.permutation(27)
    state = renamed = elimination.init(27)
    for _ in range(16):
        drawn = elimination.draw(state, rng, 10)
        loss = by_number(rng, drawn[:, 0])
        state = elimination.update(state, drawn, loss, np.full(10, 5), 4, WORST)
        renamed = elimination.update(renamed, new_name[drawn], loss, np.full(10, 5), 4, WORST)
        assert np.array_equal(renamed.live[new_name], state.live)
    assert elimination.survivor(renamed) == new_name[elimination.survivor(state)]


# The deck.


@given(st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(0, 2**32))
def test_each_is_dealt_once_before_any_is_dealt_twice(num_configs, cohort_sizes, seed):
    """At every moment the live ones have been dealt equally often but for one, also after a cut."""
    state, rng = elimination.init(num_configs), np.random.default_rng(seed)
    for cohort_size in cohort_sizes:
        drawn = elimination.draw(state, rng, cohort_size)
        assert state.live[drawn].all()
        state = elimination.update(state, drawn, rng.random(cohort_size), np.full(cohort_size, 5), 3, WORST)
        if not elimination.over(state):
            assert np.ptp(state.dealt[state.live]) <= 1


def test_any_client_may_get_any_configuration():
    """Three cards for five clients, dealt 4000 times: every client gets each with probability 1 / 3.

    False alarm below 16 * 2 exp(-2 * 4000 * 0.04^2) = 9e-5 (Hoeffding).
    """
    state, rng = elimination.init(3), np.random.default_rng(0)
    drawn = np.array([elimination.draw(state, rng, 5)[:, 0] for _ in range(4000)])
    shares = [[(drawn[:, client] == config).mean() for config in range(3)] for client in range(5)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)
    state = state._replace(dealt=np.array([1, 0, 1]))
    assert (elimination.draw(state, rng, 1) == 1).all()
    pairs = np.array([elimination.draw(state, rng, 2)[:, 0] for _ in range(4000)])
    assert ((pairs == 1).sum(axis=1) == 1).all()
    assert (pairs[:, 0] == 1).mean() == pytest.approx(1 / 2, abs=0.04)  # the card that is due goes to either client


def test_the_deck_follows_from_the_state_and_the_stream_alone():
    state = play(elimination.init(27), 6, by_number)
    first, again, other = (elimination.draw(state, np.random.default_rng(s), 10) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# Keeping it.


@pytest.mark.parametrize("stop", [0, 3, 7, 16])
def test_a_checkpoint_keeps_every_bit(tmp_path, stop):
    half = play(elimination.init(27), stop, by_number)
    np.savez(tmp_path / "state.npz", **elimination.to_arrays(half))
    with np.load(tmp_path / "state.npz") as arrays:
        resumed = elimination.from_arrays(dict(arrays))
    resumed = play(resumed, 14 - min(stop, 14), by_number, first=stop)
    straight = play(elimination.init(27), max(stop, 14), by_number)
    assert isinstance(resumed, EliminationState)
    assert type(resumed.rounds) is int
    for name, meant in elimination.to_arrays(straight).items():
        assert np.array_equal(elimination.to_arrays(resumed)[name], meant)
        assert elimination.to_arrays(resumed)[name].dtype == meant.dtype


@pytest.mark.parametrize(("max_rounds", "m"), [(16, 4), (81, 4), (199, 4), (200, 5), (405, 10)])
def test_how_many_rounds_a_halving_takes(max_rounds, m):
    assert EliminationSettings().resolve(max_rounds) == m
    assert EliminationSettings(rounds_per_halving=2).resolve(max_rounds) == 2


@pytest.mark.parametrize(("num_configs", "halvings"), [(1, 0), (2, 1), (3, 1), (4, 2), (27, 4), (31, 4), (32, 5)])
def test_it_must_be_over_by_max_rounds(num_configs, halvings):
    settings = EliminationSettings(num_configs, rounds_per_halving=3)
    state = play(elimination.init(num_configs), 3 * halvings, by_number, m=3)
    assert elimination.over(state)
    assert settings.resolve(max(1, 3 * halvings)) == 3
    if halvings:
        with pytest.raises(InputError) as raised:
            settings.resolve(3 * halvings - 1)
        assert str(raised.value) == (
            f"max_rounds must be >= {3 * halvings} to reduce {num_configs} configurations to one by halving every 3 "
            f"rounds, got {3 * halvings - 1}"
        )


@pytest.mark.parametrize("field", ["num_configs", "rounds_per_halving"])
def test_settings_that_are_not_allowed(field):
    with pytest.raises(InputError, match=f"{field} must be a whole number >= 1, got 0"):
        EliminationSettings(**{field: 0})
