import math

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.client.objectives import OBJECTIVES
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.spec import IGNORED, DatasetSpec
from fedtune.errors import InputError, UnknownNameError
from fedtune_clients.models import mlp


def test_a_position_that_is_ignored_counts_neither_in_the_loss_nor_in_the_measures():
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [1.0, 0.0]], [[3.0, 0.0], [1.0, 0.0]]])
    y = torch.tensor([[0, 1], [1, IGNORED], [1, IGNORED]])
    # Of the positions that count.
    one = [math.log(2), math.log(1 + math.exp(2)), math.log(1 + math.exp(-3)), math.log(1 + math.exp(3))]
    loss, measure = OBJECTIVES["next_token"]
    assert loss(logits, y).item() == pytest.approx(np.mean(one))
    losses, errors = measure(logits, y)
    assert losses.tolist() == pytest.approx([np.mean(one[:2]), one[2], one[3]])
    assert errors.tolist() == [0.5, 0.0, 1.0]


@pytest.mark.parametrize("label", [0, 1])
def test_nan_among_the_logits_is_an_error(label):
    """Also if it stands at the label: argmax takes NaN for the largest."""
    logits = torch.tensor([[[float("nan"), 1.0], [2.0, 0.0]]])
    assert OBJECTIVES["next_token"].measure(logits, torch.tensor([[label, 0]])).error.tolist() == [0.5]
    assert OBJECTIVES["classification"].measure(logits[:, 0], torch.tensor([label])).error.tolist() == [1.0]


@pytest.mark.parametrize(("y_shape", "outputs_shape"), [((4,), (4, 1)), ((4,), (4,)), ((4, 3), (4, 3))])
def test_regression_is_the_squared_error(y_shape, outputs_shape):
    generator = torch.Generator().manual_seed(0)
    y, outputs = torch.randn(y_shape, generator=generator), torch.randn(outputs_shape, generator=generator)
    expected = ((outputs.reshape(4, -1) - y.reshape(4, -1)) ** 2).mean(1)
    loss, measure = OBJECTIVES["regression"]
    assert torch.allclose(loss(outputs, y), expected.mean())
    assert torch.allclose(measure(outputs, y).error, expected)


def test_outputs_that_would_broadcast_are_refused():
    with pytest.raises(InputError, match=r"a regression model must return \(4,\) outputs, got \(4, 2\)"):
        OBJECTIVES["regression"].loss(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(InputError, match=r"must return logits of shape \(4, 3, 'class'\), got \(4, 5\)"):
        OBJECTIVES["next_token"].loss(torch.zeros(4, 5), torch.zeros(4, 3, dtype=torch.int64))


def test_the_spec_knows_how_many_outputs():
    assert DatasetSpec((3,), "real", 7).num_outputs == 7
    assert DatasetSpec((3,), "real", 0, objective="regression").num_outputs == 1
    spec = DatasetSpec((3,), "real", 0, objective="regression", target_shape=(2, 2))
    assert spec.num_outputs == 4
    assert isinstance(mlp(spec)[-1], nn.Linear)
    assert mlp(spec)(torch.zeros(5, 3)).shape == (5, 4)
    with pytest.raises(UnknownNameError, match="unknown objective 'ranking'"):
        DatasetSpec((3,), "real", 7, objective="ranking")
    with pytest.raises(InputError, match="num_classes must be 0 with objective 'regression', got 7"):
        DatasetSpec((3,), "real", 7, objective="regression")
    with pytest.raises(InputError, match="must have 1 axes with objective 'next_token'"):
        DatasetSpec((3,), "token", 7, objective="next_token")


def test_targets_of_a_regression_have_mean_0_and_variance_1_in_train():
    draws = np.random.default_rng(0)
    given = {name: (draws.normal(size=(30, 2)), draws.normal(5, 100, (30, 2))) for name in "abc"}
    dataset = FederatedDataset.from_clients(given, name="r", objective="regression")
    train = np.concatenate([dataset.examples(client, "train")[1] for client in range(3)])
    assert train.mean(0) == pytest.approx([0, 0], abs=1e-5)
    assert train.std(0) == pytest.approx([1, 1], abs=1e-5)
    back = dataset.y * dataset.spec.target_std + dataset.spec.target_mean
    assert sorted(back[:, 0]) == pytest.approx(sorted(np.concatenate([y for _, y in given.values()])[:, 0]), abs=1e-3)
