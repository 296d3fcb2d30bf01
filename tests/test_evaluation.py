import numpy as np
import pytest

from fedtune.client.tasks import Failure
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import RunStopped
from fedtune.simulation.evaluation import (
    STREAM_EXAMPLES,
    combine,
    evaluation_clients,
    evaluation_tasks,
    flatten,
    standard_error,
    tail_mean,
)


def test_the_tail_is_the_last_quarter_of_the_rounds():
    rounds, values = [4, 8, 12, 16], [0.9, 0.5, 0.4, 0.2]
    assert tail_mean(rounds, values) == 0.2  # 12 is not after three quarters of 16
    assert tail_mean([5, 10, 15, 16], values) == np.mean([0.4, 0.2])
    assert tail_mean([1], [0.7]) == 0.7


@pytest.mark.parametrize("at_most", [None, 50, 80])
def test_an_evaluation_has_all_clients_where_there_are_no_more_than_it_may_have(at_most):
    assert np.array_equal(evaluation_clients(50, at_most, 0), np.arange(50))


def test_the_clients_of_an_evaluation_depend_on_the_seed_alone():
    chosen = evaluation_clients(50, 10, 0)
    assert len(set(chosen.tolist())) == 10
    assert np.array_equal(chosen, np.sort(chosen))
    assert np.array_equal(chosen, evaluation_clients(50, 10, 0))
    assert not np.array_equal(chosen, evaluation_clients(50, 10, 1))


def test_tasks_hold_each_client_once_in_order_and_about_as_many_examples():
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 3000, 60)
    clients = {str(i): (np.zeros((n, 1), np.float32), np.arange(n) % 2) for i, n in enumerate(sizes)}
    dataset = FederatedDataset.from_clients(clients, name="ragged")
    chosen = evaluation_clients(60, 40, 0)
    tasks = evaluation_tasks(dataset, chosen)
    assert [client for task in tasks for client in task.clients] == chosen.tolist()
    held = dataset.num_examples("validation") + dataset.num_examples("test")
    loads = [held[list(task.clients)].sum() for task in tasks]
    assert max(loads) < STREAM_EXAMPLES + held.max()
    assert min(loads[:-1]) > STREAM_EXAMPLES - held.max()


def test_combine_weighs_by_examples():
    metrics = [
        {
            "num_validation": 1,
            "validation_error": 1.0,
            "validation_loss": 2.0,
            "num_test": 3,
            "test_error": 0.0,
            "test_loss": 1.0,
        },
        {
            "num_validation": 4,
            "validation_error": 0.5,
            "validation_loss": 1.0,
            "num_test": 1,
            "test_error": 1.0,
            "test_loss": 5.0,
        },
    ]
    evaluation = combine(metrics)
    assert evaluation.validation_error == pytest.approx((1 * 1.0 + 4 * 0.5) / 5)
    assert evaluation.validation_loss == pytest.approx((1 * 2.0 + 4 * 1.0) / 5)
    assert evaluation.test_error == pytest.approx((3 * 0.0 + 1 * 1.0) / 4)
    assert evaluation.test_loss == pytest.approx((3 * 1.0 + 1 * 5.0) / 4)
    assert evaluation.validation_error_se == standard_error(np.array([1.0, 0.5]), np.array([1.0, 4.0]))


def test_the_standard_error_with_equal_sizes_is_that_of_a_mean():
    errors = np.random.default_rng(0).random(50)
    assert standard_error(errors, np.full(50, 12.0)) == pytest.approx(errors.std(ddof=1) / np.sqrt(50))


def test_the_standard_error_counts_clients_not_examples():
    errors, sizes = np.random.default_rng(0).random(9), np.arange(1.0, 10.0)
    assert standard_error(errors, 100 * sizes) == pytest.approx(standard_error(errors, sizes))
    with_nobody = standard_error(np.append(errors, 0.3), np.append(sizes, 0.0))
    assert with_nobody == pytest.approx(standard_error(errors, sizes))
    assert np.isnan(standard_error(np.array([0.5, 0.1]), np.array([7.0, 0.0])))


def test_the_standard_error_of_a_model_that_diverged_is_no_number():
    assert np.isnan(standard_error(np.array([np.inf, np.inf, 0.1]), np.array([7.0, 7.0, 7.0])))


def test_the_standard_error_is_how_much_the_mean_varies_between_draws_of_clients():
    """Over 4,000 draws a standard deviation is known to 1/sqrt(8,000), 1.1 %: 10 % is nine of these."""
    rng = np.random.default_rng(0)
    means, found = [], []
    for _ in range(4000):
        sizes = rng.integers(1, 30, 200).astype(float)
        errors = (
            rng.binomial(sizes.astype(int), rng.beta(1, 3, 200) ** (1 + (sizes > 20))) / sizes
        )  # large ones err less
        means.append(errors @ sizes / sizes.sum())
        found.append(standard_error(errors, sizes))
    assert np.mean(found) == pytest.approx(np.std(means), rel=0.1)


def test_an_evaluation_that_fails_stops_the_run():
    with pytest.raises(RunStopped, match=r"^evaluation failed: clients 0 to 1: ValueError: no$"):
        flatten([[{"validation_error": 0.5}], Failure("clients 0 to 1: ValueError: no")])
