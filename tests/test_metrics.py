import math

import pytest

from fedtune.server.metrics import evaluation_means, finite_mean


def client(num_validation, num_test, value):
    """Metrics of a client whose error on the validation part is `value`, with other multiples of it for the rest."""
    return {
        "num_validation": num_validation,
        "validation_error": value,
        "validation_loss": 2 * value,
        "num_test": num_test,
        "test_error": 3 * value,
        "test_loss": 4 * value,
    }


def test_means_weigh_each_part_by_its_own_examples():
    validation, test = (1 * 0.1 + 3 * 0.2) / 4, (5 * 0.1 + 1 * 0.2) / 6
    assert evaluation_means([client(1, 5, 0.1), client(3, 1, 0.2)]) == pytest.approx(
        {
            "validation_error": validation,
            "validation_loss": 2 * validation,
            "test_error": 3 * test,
            "test_loss": 4 * test,
        }
    )


def test_a_finite_mean_leaves_out_what_is_not_finite():
    metrics = [client(1, 1, 0.1), client(3, 1, 0.2), client(7, 1, math.inf), client(9, 1, math.nan)]
    assert finite_mean(metrics, "validation_error") == pytest.approx((1 * 0.1 + 3 * 0.2) / 4)
    assert math.isnan(finite_mean(metrics[2:], "validation_error"))
    assert math.isnan(finite_mean([], "validation_error"))
