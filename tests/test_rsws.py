import numpy as np
import pytest

from fedtune.tuning import rsws
from fedtune.tuning.rsws import RSWSState


def some_rounds(num_rounds, k=3, cohort=4, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(k, size=(cohort, 1)), rng.random(cohort), rng.integers(0, 9, cohort)) for _ in range(num_rounds)
    ]


def run(state, rounds):
    for drawn, error, num_validation in rounds:
        state = rsws.update(state, drawn, error, num_validation)
    return state


@pytest.mark.parametrize("num_rounds", [1, 2, 4, 7, 40])
def test_an_error_is_the_mean_over_the_last_quarter_by_validation_examples(num_rounds):
    """From all rounds anew: those after three quarters of them, as tail means of scores are taken."""
    rounds = some_rounds(num_rounds)
    wrong, examples = np.zeros(3), np.zeros(3)
    for t, (drawn, error, num_validation) in enumerate(rounds, start=1):
        if 4 * t > 3 * num_rounds:
            for c, each, n in zip(drawn[:, 0], error, num_validation, strict=True):
                wrong[c] += n * each
                examples[c] += n
    expected = [w / n if n else np.inf for w, n in zip(wrong, examples, strict=True)]
    np.testing.assert_allclose(rsws.mean_errors(run(rsws.init(), rounds), 3), expected, rtol=1e-12)


def test_only_the_last_quarter_is_kept():
    assert set(run(rsws.init(), some_rounds(40)).row_round) == set(range(31, 41))


def test_a_bad_error_counts_as_one_and_a_silent_client_as_nothing():
    state = rsws.update(rsws.init(), np.array([[0], [1], [2]]), np.array([0.5, np.nan, np.nan]), np.array([5, 5, 0]))
    assert rsws.mean_errors(state, 3).tolist() == [0.5, 1.0, np.inf]


def test_draws_are_uniform():
    """False alarm below 5 * 2 exp(-2 * 20000 * 0.02^2) = 1e-6 (Hoeffding)."""
    drawn = rsws.draw(5, np.random.default_rng(0), 20_000)
    assert drawn.shape == (20_000, 1)
    np.testing.assert_allclose(np.bincount(drawn[:, 0], minlength=5) / 20_000, 0.2, atol=0.02)


def test_a_checkpoint_keeps_every_bit(tmp_path):
    rounds = some_rounds(30)
    np.savez(tmp_path / "state.npz", **rsws.to_arrays(run(rsws.init(), rounds[:17])))
    with np.load(tmp_path / "state.npz") as arrays:
        resumed = run(rsws.from_arrays(dict(arrays)), rounds[17:])
    straight = rsws.to_arrays(run(rsws.init(), rounds))
    assert isinstance(resumed, RSWSState)
    for name, array in rsws.to_arrays(resumed).items():
        assert np.array_equal(array, straight[name])
        assert array.dtype == straight[name].dtype
