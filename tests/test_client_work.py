import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedtune.client.examples import Examples
from fedtune.client.flat_model import EVALUATION_BATCH, FlatModel
from fedtune.client.measure import measure_alone
from fedtune.client.tasks import PersonaliseTask, TrainTask
from fedtune.client.work import evaluate_clients, train_and_measure
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune_clients import local_sgd
from fedtune_clients.models import logistic

SIZES = {"small": 10, "large": 5 * EVALUATION_BATCH, "medium": 60}
CONFIG = {"learning_rate": 0.3, "batch_size": 8, "epochs": 2}


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    clients = {name: (rng.integers(0, 256, (n, 5), dtype=np.uint8), rng.integers(0, 3, n)) for name, n in SIZES.items()}
    return FederatedDataset.from_clients(clients, name="made up", num_classes=3, scale=1 / 255)


@pytest.fixture
def model(dataset):
    torch.manual_seed(0)
    return FlatModel(logistic(dataset.spec))


def means(model, weights, dataset, client, part):
    """Error and loss by the definition, in float64."""
    weight, bias = model.slices(weights.double())
    x, y = dataset.examples(client, part)
    logits = torch.tensor(x / 255) @ weight.T + bias
    errors = [int(row.argmax()) != label for row, label in zip(logits, y, strict=True)]
    return {"error": sum(errors) / len(y), "loss": cross_entropy(logits, torch.tensor(y)).item()}


def no_training(model, weights, examples, config, rng):
    return weights


def do(model, weights, dataset, task, program=local_sgd.train):
    """The task's result."""
    return train_and_measure(program, model, weights, dataset, task)


@pytest.mark.parametrize("client", range(3))
def test_a_client_trains_on_the_train_part_and_measures_the_validation_part(model, dataset, client):
    weights = model.flat.clone()
    update = do(model, weights, dataset, TrainTask(client, CONFIG, seed=4, error_before=True))
    trained, metrics = update.weights.clone(), dict(update.metrics)
    x, y = dataset.examples(client, "train")
    examples = Examples(torch.tensor(x).float() * dataset.spec.scale, torch.tensor(y))
    rng = np.random.Generator(np.random.PCG64(4))
    torch.testing.assert_close(trained, local_sgd.train(model, weights, examples, CONFIG, rng))
    before = {f"{name}_before": value for name, value in means(model, weights, dataset, client, "validation").items()}
    expected = means(model, trained, dataset, client, "validation") | before
    assert metrics.pop("num_train") == len(y)
    assert metrics.pop("num_validation") == dataset.num_examples("validation")[client]
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_the_error_before_training_is_measured_only_where_it_is_asked_for(model, dataset):
    weights = model.flat.clone()
    silent = do(model, weights, dataset, TrainTask(0, CONFIG, seed=4))
    trained = silent.weights.clone()
    asked = do(model, weights, dataset, TrainTask(0, CONFIG, seed=4, error_before=True))
    assert torch.equal(trained, asked.weights)
    assert asked.metrics.keys() - silent.metrics.keys() == {"error_before", "loss_before"}
    assert asked.metrics | silent.metrics == asked.metrics


def test_a_client_program_gets_its_config_and_a_generator_of_its_seed(model, dataset):
    received = []

    def program(model, weights, examples, config, rng):
        received.append((len(examples.y), config, rng.random()))
        return weights + 1  # not the model's own tensor

    weights = model.flat.clone()
    trained = do(model, weights, dataset, TrainTask(2, {"any": 1}, seed=7), program).weights
    expected = np.random.Generator(np.random.PCG64(7)).random()
    assert received == [(dataset.num_examples("train")[2], {"any": 1}, expected)]
    assert torch.equal(trained, weights + 1)
    assert torch.equal(trained, model.flat)


def test_evaluate_clients_measures_validation_and_test_parts(model, dataset):
    weights = torch.randn(model.num_weights)
    results = evaluate_clients(model, weights, dataset, (2, 0, 1))
    for client, metrics in zip((2, 0, 1), results, strict=True):
        expected = {
            f"{part}_{name}": value
            for part in ("validation", "test")
            for name, value in means(model, weights, dataset, client, part).items()
        }
        assert metrics.pop("num_validation") == dataset.num_examples("validation")[client]
        assert metrics.pop("num_test") == dataset.num_examples("test")[client]
        assert metrics == pytest.approx(expected, rel=1e-5)


def test_the_clients_beside_it_do_not_matter_to_a_client(model, dataset):
    weights = torch.randn(model.num_weights)
    together = evaluate_clients(model, weights, dataset, [0, 1, 2])
    alone = [evaluate_clients(model, weights, dataset, [client])[0] for client in range(3)]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_outputs_are_measured_a_batch_at_a_time(model, dataset, monkeypatch):
    sizes = []
    measure_outputs = model.measure
    monkeypatch.setattr(model, "measure", lambda outputs, y: sizes.append(len(y)) or measure_outputs(outputs, y))
    monkeypatch.setattr("fedtune.client.measure.EVALUATION_BATCH", 20)
    weights, parts = model.flat.clone(), [(0, "train"), (2, "train")]
    measured = measure_alone(model, weights, dataset, parts)
    num = sum(dataset.num_examples("train")[[0, 2]].tolist())
    assert sizes == [20] * (num // 20) + [num % 20]
    for (client, part), (error, loss) in zip(parts, measured, strict=True):
        expected = means(model, weights, dataset, client, part)
        assert (error, loss) == pytest.approx((expected["error"], expected["loss"]), rel=1e-5)


def test_a_client_without_examples_cannot_be_measured(model, dataset):
    dataset.ranges[1, 1] = 0
    with pytest.raises(
        InputError, match=r"^to be measured, clients must have examples in \[\(1, 'validation'\)\], got none$"
    ):
        measure_alone(model, model.flat.clone(), dataset, [(1, "validation")])


def test_measuring_neither_drops_units_nor_moves_the_weights(dataset):
    model = FlatModel(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)))
    model.module.train()
    weights = model.flat.clone()
    first, second = (measure_alone(model, weights, dataset, [(1, "train")]) for _ in range(2))
    assert first == second
    assert torch.equal(model.flat, weights)


def test_a_client_that_is_personalised_trains_and_is_then_evaluated(model, dataset):
    weights = torch.randn(model.num_weights)
    task = PersonaliseTask(1, CONFIG, seed=3)
    metrics = do(model, weights, dataset, task)
    trained = do(model, weights, dataset, TrainTask(1, CONFIG, seed=3)).weights
    assert metrics == evaluate_clients(model, trained.clone(), dataset, [1])
    assert metrics != evaluate_clients(model, weights, dataset, [1])
    assert do(model, weights, dataset, task, no_training) == evaluate_clients(model, weights, dataset, [1])


def test_training_reads_neither_the_validation_nor_the_test_part(model, dataset):
    weights = model.flat.clone()
    tasks = [TrainTask(client, CONFIG, seed=1) for client in range(3)]
    trained = [do(model, weights, dataset, task).weights.clone() for task in tasks]
    for part in ("validation", "test"):
        for client in range(3):
            x, y = dataset.examples(client, part)
            x[:], y[:] = 0, 0
    again = [do(model, weights, dataset, task).weights.clone() for task in tasks]
    assert all(torch.equal(one, other) for one, other in zip(trained, again, strict=True))


def test_weights_that_are_nan_give_error_1_and_loss_nan(model, dataset):
    weights = torch.full_like(model.flat, torch.nan)
    metrics = do(model, weights, dataset, TrainTask(0, CONFIG, seed=1, error_before=True)).metrics
    assert metrics["error"] == metrics["error_before"] == 1
    assert np.isnan([metrics["loss"], metrics["loss_before"]]).all()
    (evaluated,) = evaluate_clients(model, weights, dataset, [0])
    assert evaluated["validation_error"] == evaluated["test_error"] == 1
