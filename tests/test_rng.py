import numpy as np

from fedtune import rng


def first(*arguments):
    return rng.stream(*arguments).random()


def test_equal_arguments_give_equal_streams():
    assert np.array_equal(rng.stream(3, "cohort", 5).random(8), rng.stream(3, "cohort", 5).random(8))


def test_every_argument_matters():
    draws = [
        first(3, "cohort", 5),
        first(4, "cohort", 5),
        first(3, "client", 5),
        first(3, "cohort", 6),
        first(3, "cohort"),
        first(3, "cohort", 5, 0),  # numpy alone would pad (5,) to (5, 0)
        first(3, "cohort", 0, 5),
    ]
    assert len(set(draws)) == len(draws)


def test_numpy_integers_are_the_same_keys():
    assert first(np.int64(3), "cohort", np.int32(5)) == first(3, "cohort", 5)


def test_derived_seed_fits_a_signed_64_bit_integer():
    seeds = [rng.derived_seed(0, "client", key) for key in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_derived_seeds_are_the_derived_seed_of_each_last_key():
    last_keys = [*range(2000), 2**40, np.int64(7)]
    together = rng.derived_seeds(5, "client", 3, 4, last_keys=last_keys)
    assert together == [rng.derived_seed(5, "client", 3, 4, key) for key in last_keys]
    assert {type(seed) for seed in together} == {int}
    assert rng.derived_seeds(5, "client", last_keys=[1]) == [rng.derived_seed(5, "client", 1)]
    assert rng.derived_seeds(5, "client", 3, last_keys=[]) == []
