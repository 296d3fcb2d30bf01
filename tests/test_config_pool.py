import numpy as np
import pytest

from fedtune.tuning.config_pool import make_pool, perturbed_pool, product_pool, whole_space_pool
from fedtune.tuning.domains import Choice, Integer, LogUniform
from fedtune.tuning.fedex import FedExSettings
from fedtune.tuning.policy import expand
from fedtune.tuning.trial import Trial

CENTRE = {"learning_rate": 0.1, "epochs": 2, "momentum": 0.9, "batch_size": 10}
DOMAINS = {"learning_rate": LogUniform(1e-4, 1.0), "epochs": Integer(1, 5), "momentum": Choice((0.0, 0.9))}


def test_a_flat_pool_is_the_centre_and_its_perturbations():
    (factor,) = perturbed_pool(CENTRE, DOMAINS, np.random.default_rng(0), 9, 0.1)
    assert len(factor) == 9
    assert factor[0] == CENTRE
    for config in factor[1:]:
        assert config.keys() == CENTRE.keys()
        assert 0.1 / 1e4**0.1 <= config["learning_rate"] <= 0.1 * 1e4**0.1
        assert config["epochs"] in (1, 2, 3)
        assert (config["momentum"], config["batch_size"]) == (0.9, 10)
    assert len({config["learning_rate"] for config in factor}) == 9


def test_a_product_pool_has_a_factor_for_each_searched_hyperparameter():
    pool = product_pool(CENTRE, DOMAINS, np.random.default_rng(0), 9, 0.1)
    assert [set().union(*factor) for factor in pool] == [
        {"batch_size"},
        {"epochs"},
        {"learning_rate"},
        {"momentum"},
    ]
    assert [len(factor) for factor in pool] == [1, 3, 9, 1]  # epochs can only be 1, 2 or 3, and a choice stays as it is
    assert expand(pool, np.zeros(4, np.int64)) == CENTRE
    assert all(len({tuple(element.items()) for element in factor}) == len(factor) for factor in pool)


def test_a_pool_of_the_whole_space_is_the_centre_and_draws():
    (factor,) = whole_space_pool(CENTRE, DOMAINS, np.random.default_rng(0), 200)
    assert len(factor) == 200
    assert factor[0] == CENTRE
    assert {config["epochs"] for config in factor} == {1, 2, 3, 4, 5}
    assert {config["momentum"] for config in factor} == {0.0, 0.9}
    assert {config["batch_size"] for config in factor} == {10}
    assert all(DOMAINS["learning_rate"].contains(config["learning_rate"]) for config in factor)
    assert whole_space_pool(CENTRE, DOMAINS, np.random.default_rng(0), 1) == ((CENTRE,),)


@pytest.mark.parametrize("build", [perturbed_pool, product_pool])
def test_the_centre_alone(build):
    assert build(CENTRE, DOMAINS, np.random.default_rng(0), 1, 0.1) == ((CENTRE,),)


def test_a_fraction_of_zero_gives_only_the_centre():
    (factor,) = perturbed_pool(CENTRE, DOMAINS, np.random.default_rng(0), 5, 0.0)
    assert factor == (CENTRE,) * 5
    assert all(len(factor) == 1 for factor in product_pool(CENTRE, DOMAINS, np.random.default_rng(0), 5, 0.0))


def test_nothing_to_search():
    assert product_pool(CENTRE, {}, np.random.default_rng(0), 5, 0.1) == ((CENTRE,),)


@pytest.mark.parametrize(("form", "build"), [("flat", perturbed_pool), ("product", product_pool)])
def test_make_pool_follows_the_settings(form, build):
    settings = FedExSettings(form=form, pool_size=4, perturbation=0.3)
    made = make_pool(settings, CENTRE, DOMAINS, np.random.default_rng(7))
    assert made == build(CENTRE, DOMAINS, np.random.default_rng(7), 4, 0.3)


@pytest.mark.parametrize("build", [perturbed_pool, product_pool, whole_space_pool])
def test_a_trial_knows_the_centre_of_its_pool(build):
    fraction = () if build is whole_space_pool else (0.1,)
    pool = build(CENTRE, DOMAINS, np.random.default_rng(0), 9, *fraction)
    assert Trial(0, {}, pool).centre == CENTRE
