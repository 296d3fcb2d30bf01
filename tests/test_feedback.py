import math

import numpy as np
import pytest

from fedtune.tuning.feedback import SIGNALS, bounded, worst_error


def test_the_worst_of_a_classification_is_all_wrong_or_twice_the_loss_of_guessing():
    assert worst_error("error", 62) == 1
    assert worst_error("loss", 62) == 2 * math.log(62)


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_worst_of_a_regression_is_twice_that_of_guessing_the_mean(signal):
    assert worst_error(signal, 0) == 2


@pytest.mark.parametrize("worst", [1.0, 2 * math.log(10)])
def test_feedback_counts_between_nothing_and_the_worst(worst):
    errors = np.array([0.2, 0.0, worst, 1e6, np.inf, np.nan, -np.inf, -1e-300, -1e308, -0.5])
    expected = [0.2, 0.0, worst, worst, worst, worst, worst, 0.0, 0.0, 0.0]
    assert bounded(errors, worst).tolist() == expected
