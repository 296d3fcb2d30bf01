import itertools
import math

import numpy as np
import pytest

from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning import fedex
from fedtune.tuning.fedex import BASELINES, LARGEST_STEP_SIZE, STEP_SIZES, FedExSettings, FedExState
from fedtune.tuning.feedback import worst_error
from fedtune.tuning.policy import entropy

MOVING = [step_size for step_size in STEP_SIZES if step_size != "off"]


def make_pool(*sizes):
    return tuple(tuple({f"h{i}": j} for j in range(size)) for i, size in enumerate(sizes))


def state_at(*thetas, **fields):
    """A state with these distributions."""
    log_theta = tuple(np.log(np.array(theta)) for theta in thetas)
    return fedex.init(make_pool(*map(len, thetas)))._replace(log_theta=log_theta, **fields)


def run(settings, errors, drawn, num_validation, before=None, sizes=(3,)):
    """The state after rounds of given draws and errors, each (round, client)."""
    state = fedex.init(make_pool(*sizes))
    for t in range(len(errors)):
        error_before = None if before is None else before[t]
        state = fedex.update(state, drawn[t], errors[t], num_validation, settings, 1.0, error_before)
    return state


def some_rounds(settings=None, sizes=(3,), num_rounds=50, cohort=5):
    """Errors below 0.5, draws from theta as these errors move it, numbers of validation examples, and errors before."""
    rng = np.random.default_rng(0)
    errors, before = rng.uniform(0, 0.5, (2, num_rounds, cohort))
    num_validation, drawn = rng.integers(1, 30, cohort), []
    settings, state = settings or FedExSettings(), fedex.init(make_pool(*sizes))
    for t in range(num_rounds):
        drawn.append(fedex.draw(state, settings, rng, cohort))
        state = fedex.update(state, drawn[t], errors[t], num_validation, settings, 1.0, before[t])
    return errors, np.array(drawn), num_validation, before


# The gradient: every outcome (c_1, ..., c_B) of a small case, weighed by its probability.

SMALL_CASES = {
    "flat": ([[0.2, 0.5, 0.3]], np.array([4, 1, 7])),
    "product": ([[0.3, 0.7], [0.2, 0.5, 0.3]], np.array([5, 2])),
}


def centred(vector):
    return vector - vector.mean()


def outcomes(state, settings, num_clients):
    """Every array of draws, (client, factor), with its probability."""
    thetas = fedex.probabilities(state, settings)
    arms = list(itertools.product(*(range(len(theta)) for theta in thetas)))
    for drawn in itertools.product(arms, repeat=num_clients):
        yield np.array(drawn), math.prod(thetas[i][index] for arm in drawn for i, index in enumerate(arm))


def expected_steps(state, settings, error_of, num_validation, error_before):
    """For each factor the expectation of the gradient that `update` used, up to a constant vector.

    With the constant step size eta0 = sqrt(2 ln k), log theta moves by -eta0 times the gradient and then by a constant.
    """
    expected = [np.zeros(len(z)) for z in state.log_theta]
    for drawn, probability in outcomes(state, settings, len(num_validation)):
        error = np.array([error_of(k, tuple(arm)) for k, arm in enumerate(drawn)])
        before = error_before(error) if callable(error_before) else error_before
        new = fedex.update(state, drawn, error, num_validation, settings, 10.0, before)
        for i, (z, z_new) in enumerate(zip(state.log_theta, new.log_theta, strict=True)):
            expected[i] += probability * (z - z_new) / math.sqrt(2 * math.log(len(z)))
    return [centred(step) for step in expected]


def exact_gradient(state, settings, error_of, share):
    """For each factor the derivative of sum_k share_k E[F_k] by each of its probabilities, centred."""
    thetas = fedex.probabilities(state, settings)
    gradient = [np.zeros(len(theta)) for theta in thetas]
    for arm in itertools.product(*(range(len(theta)) for theta in thetas)):
        error = sum(share[k] * error_of(k, arm) for k in range(len(share)))
        for i, index in enumerate(arm):
            others = math.prod(thetas[f][arm[f]] for f in range(len(arm)) if f != i)
            gradient[i][index] += others * error
    return [centred(step) for step in gradient]


def errors_by_arm(seed=0):
    table = {}
    rng = np.random.default_rng(seed)

    def error_of(client, arm):
        return table.setdefault((client, arm), rng.uniform(0, 2))

    return error_of


@pytest.mark.parametrize("min_probability", [0.0, 0.1])
@pytest.mark.parametrize("baseline", [*BASELINES, "previous, first round"])
@pytest.mark.parametrize("case", SMALL_CASES)
def test_the_expected_gradient_is_exact(case, baseline, min_probability):
    thetas, num_validation = SMALL_CASES[case]
    past = {"past_error": 0.37, "past_weight": 1.9} if baseline == "previous" else {}
    state = state_at(*thetas, **past)
    settings = FedExSettings(
        step_size="constant", baseline=baseline.split(",")[0], min_probability=min_probability, pool_size=3
    )
    before = np.array([0.9, 0.1, 1.3])[: len(num_validation)]
    error_of = errors_by_arm()
    expected = expected_steps(state, settings, error_of, num_validation, before)
    exact = exact_gradient(state, settings, error_of, num_validation / num_validation.sum())
    for step, gradient in zip(expected, exact, strict=True):
        np.testing.assert_allclose(step, gradient, rtol=0, atol=1e-12)


def test_the_rounds_own_mean_as_the_baseline_is_biased():
    """Why it is not offered: the expectation becomes sum_k v_k (1 - v_k) F_k. (Smuggled in as the clients' own.)"""
    (theta,), num_validation = SMALL_CASES["flat"]
    share = num_validation / num_validation.sum()
    state, error_of = state_at(theta), errors_by_arm()
    settings = FedExSettings(step_size="constant", baseline="client")
    (biased,) = expected_steps(
        state, settings, error_of, num_validation, lambda error: np.full(len(error), share @ error)
    )
    (exact,) = exact_gradient(state, settings, error_of, share)
    (formula,) = exact_gradient(state, settings, error_of, share * (1 - share))
    np.testing.assert_allclose(biased, formula, rtol=0, atol=1e-12)
    assert np.abs(biased - exact).max() > 0.05


# One step by hand.


@pytest.mark.parametrize("base_step_size", [None, 0.3])
@pytest.mark.parametrize("step_size", MOVING)
def test_two_rounds_by_hand(step_size, base_step_size):
    settings = FedExSettings(step_size=step_size, base_step_size=base_step_size, baseline="none")
    default = math.sqrt(2 * math.log(2))
    eta0 = base_step_size or default
    g1 = np.array([0.25 * 0.2 / 0.5, 0.75 * 0.6 / 0.5])  # = (0.1, 0.9)
    eta1 = {
        "aggressive": eta0 / 0.9,
        "adaptive": eta0 / 0.9,
        "auto": eta0,
        "constant": eta0,
        "scale": eta0 * default,
    }[step_size]
    theta1 = 0.5 * np.exp(-eta1 * g1)
    theta1 /= theta1.sum()
    state = fedex.init(make_pool(2))
    state = fedex.update(state, np.array([[0], [1]]), np.array([0.2, 0.6]), np.array([1, 3]), settings, 1.0)
    np.testing.assert_allclose(np.exp(state.log_theta[0]), theta1, rtol=1e-14)

    g2 = (0.5 * 0.4 + 0.5 * 0.2) / theta1[0]  # both clients drew the first arm
    eta2 = {
        "aggressive": eta0 / g2,
        "adaptive": eta0 / math.sqrt(0.9**2 + g2**2),
        "auto": eta0 / math.sqrt(2),
        "constant": eta0,
        "scale": eta0 * default,
    }[step_size]
    theta2 = theta1 * np.exp(-eta2 * np.array([g2, 0.0]))
    theta2 /= theta2.sum()
    state = fedex.update(state, np.array([[0], [0]]), np.array([0.4, 0.2]), np.array([2, 2]), settings, 1.0)
    np.testing.assert_allclose(np.exp(state.log_theta[0]), theta2, rtol=1e-14)


def test_the_previous_baseline_by_hand():
    """Three rounds whose means are 0.2, 0.5 and 0.6 leave (0.6 + 0.9 * 0.5 + 0.81 * 0.2) / (1 + 0.9 + 0.81)."""
    settings = FedExSettings(baseline="previous", discount=0.9)
    num_validation = np.array([1, 3])
    errors = [np.array([0.5, 0.1]), np.array([0.5, 0.5]), np.array([0.0, 0.8])]
    state = run(settings, errors, np.zeros((3, 2, 1), np.int64), num_validation)
    assert state.past_error == pytest.approx((0.6 + 0.9 * 0.5 + 0.81 * 0.2) / (1 + 0.9 + 0.81), rel=1e-14)
    last = run(FedExSettings(discount=0.0), errors, np.zeros((3, 2, 1), np.int64), num_validation)
    assert last.past_error == pytest.approx(0.6, rel=1e-14)
    mean = run(FedExSettings(discount=1.0), errors, np.zeros((3, 2, 1), np.int64), num_validation)
    assert mean.past_error == pytest.approx((0.2 + 0.5 + 0.6) / 3, rel=1e-14)


def test_each_factor_has_its_own_default_step_size():
    """Or one given to all of them, unless the schedule is `scale`."""
    drawn, num_validation, error = np.array([[0, 0]]), np.array([1]), np.array([0.5])

    def steps(**options):
        settings = FedExSettings(baseline="none", **options)
        (two, five) = fedex.update(fedex.init(make_pool(2, 5)), drawn, error, num_validation, settings, 1.0).log_theta
        return [two[1] - two[0], five[1] - five[0]]  # the gradients are 0.5 * 2 and 0.5 * 5 in one coordinate

    default = [math.sqrt(2 * math.log(2)), math.sqrt(2 * math.log(5))]
    assert steps(step_size="aggressive") == pytest.approx(default)
    assert steps(step_size="aggressive", base_step_size=0.2) == pytest.approx([0.2, 0.2])
    assert steps(step_size="constant", base_step_size=0.2) == pytest.approx([0.2, 0.2 * 2.5])
    scaled = [0.2 * default[0], 0.2 * default[1] * 2.5]
    assert steps(step_size="scale", base_step_size=0.2) == pytest.approx(scaled)


# Stopping.


class AuthorsFedEx:
    """The step and the draws of the authors' FedEx, as their text and code describe them, with a baseline of 0."""

    def __init__(self, sizes, eta0, cutoff):
        self.z, self.eta0, self.cutoff, self.stopped = [np.full(k, -np.log(k)) for k in sizes], eta0, cutoff, False

    def draws(self):
        """The probabilities with which a client draws: theta, or the most probable element after the stop."""
        theta = [np.exp(z) for z in self.z]
        return [np.eye(len(t))[t.argmax()] for t in theta] if self.stopped else theta

    def step(self, drawn, error, share):
        if self.stopped:
            return
        for i, z in enumerate(self.z):
            theta, gradient = np.exp(z), np.zeros(len(z))
            for k, arm in enumerate(drawn[:, i]):
                gradient[arm] += share[k] * error[k] / theta[arm]
            z -= self.eta0 * gradient
            z -= np.log(np.exp(z).sum())
        joint = np.multiply.outer(*(np.exp(z) for z in self.z)).ravel()
        self.stopped = -(joint @ np.log(joint)) < self.cutoff


@pytest.mark.parametrize("cutoff", [0.0, 0.3, 1.0, 1.7, 5.0])
def test_it_stops_where_the_authors_stop(cutoff):
    """At 1.7, near the ln 6 of a uniform theta, and at 5 it stops after the first round, and not before it."""
    settings = FedExSettings(step_size="constant", base_step_size=0.2, baseline="none", entropy_cutoff=cutoff)
    state, authors = fedex.init(make_pool(3, 2)), AuthorsFedEx((3, 2), 0.2, cutoff)
    assert not fedex.stopped(state, settings)
    num_validation, stops = np.array([1, 4, 2]), []
    for t in range(60):
        drawn = fedex.draw(state, settings, np.random.default_rng(t), 3)
        error = np.where(drawn.sum(axis=1) == 0, 0.2, 0.9)
        for ours, theirs in zip(fedex.probabilities(state, settings), authors.draws(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)
        state = fedex.update(state, drawn, error, num_validation, settings, 1.0)
        authors.step(drawn, error, num_validation / num_validation.sum())
        stops.append(fedex.stopped(state, settings))
        assert stops[-1] == authors.stopped
    assert stops[-1] == (cutoff > 0)
    assert stops[0] == (cutoff > math.log(6))


def test_after_the_stop_every_client_draws_the_best_and_nothing_moves():
    settings = FedExSettings(entropy_cutoff=0.6, min_probability=0.05)
    state = state_at([0.1, 0.85, 0.05], rounds=1, past_error=0.4, past_weight=1.0)
    assert entropy((0.85 * np.array([0.1, 0.85, 0.05]) + 0.05,)) > 0.6
    assert not fedex.stopped(state, settings)  # the floor is within the entropy
    settings = FedExSettings(entropy_cutoff=0.8, min_probability=0.05)
    assert fedex.stopped(state, settings)
    assert fedex.probabilities(state, settings)[0].tolist() == [0.0, 1.0, 0.0]
    drawn = fedex.draw(state, settings, np.random.default_rng(0), 1000)
    assert set(drawn[:, 0]) == {1}
    again = fedex.update(state, drawn[:2], np.array([0.9, 0.1]), np.array([1, 1]), settings, 1.0)
    assert again is state
    assert fedex.best(state) == (1,)


def test_a_stop_outlives_a_checkpoint(tmp_path):
    settings = FedExSettings(step_size="constant", base_step_size=3.0, entropy_cutoff=1.2)
    errors, drawn, num_validation, _ = some_rounds(settings, sizes=(3, 2), num_rounds=80)
    straight = run(settings, errors, drawn, num_validation, sizes=(3, 2))
    assert fedex.stopped(straight, settings)
    assert 1 < straight.rounds < 80
    for half in (straight.rounds - 1, straight.rounds, straight.rounds + 1):
        np.savez(
            tmp_path / "state.npz", **fedex.to_arrays(run(settings, errors[:half], drawn, num_validation, sizes=(3, 2)))
        )
        with np.load(tmp_path / "state.npz") as arrays:
            resumed = fedex.from_arrays(dict(arrays))
        for t in range(half, 80):
            resumed = fedex.update(resumed, drawn[t], errors[t], num_validation, settings, 1.0)
        for kept, meant in zip(fedex.to_arrays(resumed).values(), fedex.to_arrays(straight).values(), strict=True):
            assert np.array_equal(kept, meant)
        assert fedex.stopped(resumed, settings)


# What theta must not depend on.


@pytest.mark.parametrize("baseline", ["previous", "leave_one_out", "client"])
@pytest.mark.parametrize("step_size", MOVING)
def test_a_shift_of_all_errors_changes_nothing(step_size, baseline):
    settings = FedExSettings(step_size=step_size, baseline=baseline)
    errors, drawn, num_validation, before = some_rounds(settings)
    plain = run(settings, errors, drawn, num_validation, before)
    shifted = run(settings, errors + 0.375, drawn, num_validation, before + 0.375)
    np.testing.assert_allclose(shifted.log_theta[0], plain.log_theta[0], rtol=1e-9)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("step_size", ["aggressive", "adaptive"])
def test_aggressive_and_adaptive_do_not_see_the_scale_of_errors(step_size, baseline):
    settings = FedExSettings(step_size=step_size, baseline=baseline)
    errors, drawn, num_validation, before = some_rounds(settings)
    plain = run(settings, errors, drawn, num_validation, before)
    scaled = run(settings, errors * 0.37, drawn, num_validation, before * 0.37)
    np.testing.assert_allclose(scaled.log_theta[0], plain.log_theta[0], rtol=1e-9)


@pytest.mark.parametrize("step_size", ["auto", "constant", "scale"])
def test_auto_and_constant_and_scale_see_the_scale_of_errors(step_size):
    errors, drawn, num_validation, _ = some_rounds()
    settings = FedExSettings(step_size=step_size)
    plain = run(settings, errors[:1], drawn, num_validation).log_theta[0]
    halved = run(settings, errors[:1] / 2, drawn, num_validation).log_theta[0]
    np.testing.assert_allclose(centred(plain), 2 * centred(halved), rtol=1e-9)


@pytest.mark.parametrize("step_size", MOVING)
def test_renaming_the_arms_renames_theta(step_size):
    settings = FedExSettings(step_size=step_size)
    errors, drawn, num_validation, _ = some_rounds(settings)
    new_name = np.array([2, 0, 1])
    plain = run(settings, errors, drawn, num_validation).log_theta[0]
    renamed = run(settings, errors, new_name[drawn], num_validation).log_theta[0]
    np.testing.assert_allclose(renamed[new_name], plain, rtol=1e-12)


@pytest.mark.parametrize("error", [0.1, 0.3, 1 / 3, 0.7])
@pytest.mark.parametrize("baseline", ["previous", "leave_one_out", "client"])
@pytest.mark.parametrize("step_size", MOVING)
def test_equal_errors_teach_nothing(step_size, baseline, error):
    """These are no binary fractions; `aggressive` would blow a rounding error of their mean up to a whole step."""
    rng = np.random.default_rng(0)
    settings, state = FedExSettings(step_size=step_size, baseline=baseline), fedex.init(make_pool(3))
    for _ in range(5):
        drawn, num_validation, errors = rng.integers(0, 3, (7, 1)), rng.integers(1, 30, 7), np.full(7, error)
        state = fedex.update(state, drawn, errors, num_validation, settings, 1.0, errors)
    np.testing.assert_allclose(np.exp(state.log_theta[0]), 1 / 3, rtol=1e-12)


def test_off_leaves_theta_alone():
    errors, drawn, num_validation, _ = some_rounds()
    state = run(FedExSettings(step_size="off"), errors, drawn, num_validation)
    assert np.array_equal(state.log_theta[0], fedex.init(make_pool(3)).log_theta[0])


# What goes wrong.


@pytest.mark.parametrize(
    ("step_size", "baseline", "min_probability", "num_rounds", "base_step_size"),
    [
        ("adaptive", "previous", 0.0, 10_000, None),
        ("constant", "none", 0.0, 10_000, None),
        ("aggressive", "leave_one_out", 0.0, 2000, None),
        ("auto", "client", 0.01, 2000, None),
        ("scale", "previous", 0.0, 2000, LARGEST_STEP_SIZE),
        ("scale", "client", 0.01, 2000, 1e-300),
    ],
)
def test_theta_stays_a_distribution(step_size, baseline, min_probability, num_rounds, base_step_size):
    rng = np.random.default_rng(0)
    settings = FedExSettings(step_size, base_step_size, baseline, min_probability=min_probability)
    state = fedex.init(make_pool(4, 2))
    values = np.array([0.0, 1e-30, 1e6, np.nan, np.inf, -1e308])
    num_validation = np.array([1, 1000, 3])
    for _ in range(num_rounds):
        drawn = fedex.draw(state, settings, rng, 3)
        error, before = rng.choice(values, (2, 3))
        state = fedex.update(state, drawn, error, num_validation, settings, 1.0, before)
    for theta in fedex.probabilities(state, settings):
        assert np.isfinite(theta).all()
        assert theta.min() >= min_probability
        assert theta.sum() == pytest.approx(1, rel=1e-12)
    assert np.isfinite([state.past_error, state.past_weight, *state.gradient_norm]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_a_bad_error_counts_as_the_worst(bad):
    settings, drawn, num_validation = FedExSettings(), np.array([[0], [1]]), np.array([3, 4])
    state = fedex.init(make_pool(2))
    for worst in (worst_error("error", 10), worst_error("loss", 10)):
        told = fedex.update(state, drawn, np.array([0.2, bad]), num_validation, settings, worst)
        meant = fedex.update(state, drawn, np.array([0.2, worst]), num_validation, settings, worst)
        assert np.array_equal(told.log_theta[0], meant.log_theta[0])


@pytest.mark.parametrize("step_size", MOVING)
def test_an_error_below_zero_counts_as_zero(step_size):
    """A client that reports -1e308 once would make theta NaN for ever."""
    settings, drawn, num_validation = FedExSettings(step_size=step_size), np.array([[0], [1]]), np.array([3, 4])
    state = fedex.init(make_pool(2))
    told = fedex.update(state, drawn, np.array([0.2, -1e308]), num_validation, settings, 1.0)
    meant = fedex.update(state, drawn, np.array([0.2, 0.0]), num_validation, settings, 1.0)
    assert np.array_equal(told.log_theta[0], meant.log_theta[0])
    assert np.isfinite(told.log_theta[0]).all()


@pytest.mark.parametrize("step_size", MOVING)
def test_a_signal_too_weak_to_square_still_counts(step_size):
    """1e-200 squared is 0, and 1 / 1e-310 is infinite."""
    settings, state = FedExSettings(step_size=step_size, baseline="none"), fedex.init(make_pool(2))
    for error in (1e-200, 1e-310, 0.0):
        drawn, errors = np.array([[0], [1]]), np.array([error, 0.0])
        state = fedex.update(state, drawn, errors, np.array([1, 1]), settings, 1.0)
    assert np.isfinite(state.log_theta[0]).all()
    if step_size in ("aggressive", "adaptive"):
        assert state.log_theta[0][0] < math.log(0.5) - 0.5


def test_a_cohort_without_an_answer_changes_nothing():
    state = run(FedExSettings(), *some_rounds()[:3])
    nobody = fedex.update(state, np.empty((0, 1), np.int64), np.empty(0), np.empty(0, np.int64), FedExSettings(), 1.0)
    unheard = fedex.update(state, np.array([[1]]), np.array([0.3]), np.array([0]), FedExSettings(), 1.0)
    assert nobody is state
    assert unheard is state


def test_a_client_without_validation_examples_is_not_heard():
    settings, state = FedExSettings(baseline="leave_one_out"), fedex.init(make_pool(3))
    drawn, error = np.array([[0], [1], [2]]), np.array([0.2, 0.6, np.nan])
    with_it = fedex.update(state, drawn, error, np.array([2, 5, 0]), settings, 1.0)
    without = fedex.update(state, drawn[:2], error[:2], np.array([2, 5]), settings, 1.0)
    assert np.array_equal(with_it.log_theta[0], without.log_theta[0])


def test_a_lone_client_without_a_past_moves_nothing():
    state = fedex.init(make_pool(3))
    new = fedex.update(state, np.array([[1]]), np.array([0.9]), np.array([4]), FedExSettings(), 1.0)
    np.testing.assert_allclose(new.log_theta[0], state.log_theta[0], rtol=1e-15)
    assert new.past_error == 0.9


def test_the_client_baseline_needs_the_errors_before():
    with pytest.raises(InputError, match="error_before must be given for the baseline 'client', got None"):
        run(FedExSettings(baseline="client"), *some_rounds()[:3])


@pytest.mark.parametrize("step_size", STEP_SIZES)
def test_a_pool_of_one_configuration(step_size):
    settings, state = FedExSettings(step_size=step_size), fedex.init(make_pool(1))
    for t in range(5):
        drawn = fedex.draw(state, settings, np.random.default_rng(t), 4)
        assert np.array_equal(drawn, np.zeros((4, 1)))
        state = fedex.update(state, drawn, np.array([0.1, 0.9, np.nan, 0.3]), np.array([1, 2, 3, 4]), settings, 1.0)
    assert np.array_equal(np.exp(state.log_theta[0]), [1.0])
    assert math.copysign(1, entropy(fedex.probabilities(state, settings))) == 1
    assert entropy(fedex.probabilities(state, settings)) == 0


# Learning.


@pytest.mark.parametrize("kind", ["random", "one good arm", "switching"])
def test_full_information_regret_stays_below_the_bound(kind):
    """Exponentiated gradient with eta = sqrt(8 ln k / T) on losses in [0, 1] has regret at most sqrt(T ln k / 2).

    Clients that draw every arm once, with theta as their weights, make the estimate F itself; and constant steps of
    sqrt(2 ln k) on F * 2 / sqrt(T) are steps of that eta on F.
    """
    k, num_rounds = 5, 1000
    rng = np.random.default_rng(0)
    losses = rng.random((num_rounds, k))
    if kind == "one good arm":
        losses[:, 2] *= 0.5
    if kind == "switching":
        losses = (np.arange(num_rounds)[:, None] // 100 % k == np.arange(k)).astype(float)
    settings = FedExSettings(step_size="constant", baseline="none")
    state, suffered = fedex.init(make_pool(k)), 0.0
    every_arm = np.arange(k)[:, None]
    for loss in losses:
        (theta,) = fedex.probabilities(state, settings)
        suffered += theta @ loss
        state = fedex.update(state, every_arm, loss * 2 / math.sqrt(num_rounds), theta, settings, 1.0)
    regret = suffered - losses.sum(0).min()
    assert 0 < regret <= math.sqrt(num_rounds * math.log(k) / 2)


@pytest.mark.parametrize("baseline", BASELINES)
def test_theta_finds_the_better_arm(baseline):
    """Two arms that err with probability 0.1 and 0.9: over 500 seeds a baseline, the better never ended below 0.99.

    So a false alarm has a probability below 0.6 % (at 95 % confidence).
    """
    rng = np.random.default_rng(0)
    settings = FedExSettings(baseline=baseline)
    state = fedex.init(make_pool(2))
    for _ in range(200):
        drawn = fedex.draw(state, settings, rng, 10)
        error = (rng.random(10) < np.where(drawn[:, 0] == 0, 0.1, 0.9)).astype(float)
        state = fedex.update(state, drawn, error, np.full(10, 7), settings, 1.0, np.full(10, 0.5))
    assert fedex.probabilities(state, settings)[0][0] > 0.9
    assert fedex.best(state) == (0,)
    assert entropy(fedex.probabilities(state, settings)) < 0.4


# Drawing.


def test_draws_follow_theta():
    """False alarm below 5 * 2 exp(-2 * 20000 * 0.02^2) = 1e-6 (Hoeffding, for each element of each factor)."""
    state = state_at([0.1, 0.6, 0.3], [0.25, 0.75])
    settings = FedExSettings(min_probability=0.1)
    drawn = fedex.draw(state, settings, np.random.default_rng(0), 20_000)
    assert drawn.shape == (20_000, 2)
    expected = [0.7 * np.array([0.1, 0.6, 0.3]) + 0.1, 0.8 * np.array([0.25, 0.75]) + 0.1]
    for i, (theta, column) in enumerate(zip(expected, drawn.T, strict=True)):
        np.testing.assert_allclose(fedex.probabilities(state, settings)[i], theta, rtol=1e-12)
        np.testing.assert_allclose(np.bincount(column) / 20_000, theta, atol=0.02)


def test_factors_are_drawn_independently():
    """False alarm below 2 exp(-2 * 20000 * 0.02^2) = 3e-7 (Hoeffding)."""
    state = state_at([0.5, 0.5], [0.5, 0.5])
    drawn = fedex.draw(state, FedExSettings(), np.random.default_rng(0), 20_000)
    assert abs(np.mean(drawn[:, 0] == drawn[:, 1]) - 0.5) < 0.02


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_an_arm_whose_probability_is_gone_is_never_drawn(gone):
    log_theta = np.full(3, math.log(0.5))
    log_theta[gone] = -1000.0
    state = fedex.init(make_pool(3))._replace(log_theta=(log_theta,))
    assert gone not in fedex.draw(state, FedExSettings(), np.random.default_rng(0), 1000)

    class Edges(np.random.Generator):
        """Draws the two ends of a generator's range."""

        def random(self, size):
            return np.resize([0.0, 1 - 2**-53], size)

    assert gone not in fedex.draw(state, FedExSettings(), Edges(np.random.PCG64()), 2)


def test_draws_depend_on_the_stream_alone():
    state = state_at([0.1, 0.6, 0.3])
    first, again, other = (fedex.draw(state, FedExSettings(), np.random.default_rng(s), 50) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(first[:20], fedex.draw(state, FedExSettings(), np.random.default_rng(1), 20))


def test_the_entropy_of_theta_and_its_best_element():
    settings = FedExSettings()
    uniform = fedex.probabilities(fedex.init(make_pool(9, 4)), settings)
    assert entropy(uniform) == pytest.approx(math.log(9) + math.log(4))
    state = state_at([0.25, 0.75], [0.2, 0.4, 0.4])
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) - (0.2 * math.log(0.2) + 0.8 * math.log(0.4))
    assert entropy(fedex.probabilities(state, settings)) == pytest.approx(expected)
    assert fedex.best(state) == (1, 1)
    gone = fedex.init(make_pool(2))._replace(log_theta=(np.array([0.0, -1000.0]),))
    assert entropy(fedex.probabilities(gone, settings)) == 0


# Keeping it.


def test_a_checkpoint_keeps_every_bit(tmp_path):
    errors, drawn, num_validation, _ = some_rounds(sizes=(3, 2))
    settings = FedExSettings()
    half = run(settings, errors[:25], drawn[:25], num_validation, sizes=(3, 2))
    np.savez(tmp_path / "state.npz", **fedex.to_arrays(half))
    with np.load(tmp_path / "state.npz") as arrays:
        resumed = fedex.from_arrays(dict(arrays))
    for t in range(25, 50):
        resumed = fedex.update(resumed, drawn[t], errors[t], num_validation, settings, 1.0)
    straight = run(settings, errors, drawn, num_validation, sizes=(3, 2))
    assert isinstance(resumed, FedExState)
    for kept, meant in zip(fedex.to_arrays(resumed).values(), fedex.to_arrays(straight).values(), strict=True):
        assert np.array_equal(kept, meant)
    assert len(resumed.log_theta) == 2
    assert (resumed.rounds, type(resumed.rounds)) == (50, int)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("step_size", "fast", "unknown step_size 'fast'; known: adaptive, aggressive, auto, constant, off, scale"),
        ("base_step_size", 0.0, "base_step_size must be a finite number > 0 and <= 1000000.0, got 0.0"),
        ("base_step_size", 1e7, "base_step_size must be a finite number > 0 and <= 1000000.0, got 10000000.0"),
        ("entropy_cutoff", -0.1, "entropy_cutoff must be a finite number >= 0, got -0.1"),
        ("entropy_cutoff", math.nan, "entropy_cutoff must be a finite number >= 0, got nan"),
        ("baseline", "mean", "unknown baseline 'mean'; known: client, leave_one_out, none, previous"),
        ("signal", "accuracy", "unknown signal 'accuracy'; known: error, loss"),
        ("form", "tree", "unknown form 'tree'; known: flat, product"),
        ("discount", 1.5, "discount must be a finite number >= 0 and <= 1, got 1.5"),
        ("discount", math.nan, "discount must be a finite number >= 0 and <= 1, got nan"),
        ("pool_size", 0, "pool_size must be a whole number >= 1, got 0"),
        ("perturbation", -0.1, "perturbation must be a finite number >= 0 and <= 1, got -0.1"),
        ("min_probability", 0.2, "min_probability must be a finite number >= 0 and <= 0.1111111111111111, got 0.2"),
    ],
)
def test_settings_that_are_not_allowed(field, value, said):
    with pytest.raises(InputError) as raised:
        FedExSettings(**{field: value})
    assert str(raised.value) == said
    assert isinstance(raised.value, UnknownNameError) == ("unknown" in said)
