"""The attacks of experiments/byzantine; the script itself runs in test_experiments.py."""

import numpy as np
import pytest
import torch
from experiment_script import script_path

from fedtune import plugins
from fedtune.client.examples import Examples
from fedtune.client.flat_model import FlatModel
from fedtune.data.federated_dataset import FederatedDataset
from fedtune_clients import local_sgd

ATTACKS = plugins.load_client_program(str(script_path("byzantine").with_name("attacks.py")))
CONFIG = {"learning_rate": 0.1, "batch_size": 5, "epochs": 1}


@pytest.fixture(scope="module")
def dataset():
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (40, 28, 28)).astype(np.uint8)
    x[:, 0, 0] = 0
    y = np.arange(40) % 10
    return FederatedDataset.from_clients({"a": (x[:20], y[:20]), "b": (x[20:], y[20:])}, name="made up", num_classes=10)


def trained(dataset, program, mark):
    """What a client with that mark in its images returns, and the weights that it was sent."""
    torch.manual_seed(0)
    model = FlatModel(plugins.make_model({"name": "logistic"}, dataset.spec))
    weights = model.flat.clone()
    x, y = dataset.examples(0, "train")
    examples = Examples(torch.from_numpy(x).float() / 255, torch.from_numpy(y).long())
    examples.x[:, 0, 0] = mark / 255
    return program.train(model, weights.clone(), examples, CONFIG, np.random.default_rng(1)).clone(), weights


def test_an_attacker_trains_as_an_honest_client_and_returns_what_its_attack_says(dataset):
    honest, weights = trained(dataset, local_sgd, 0)
    change = honest - weights
    assert change.norm() > 0
    for attack, factor in (("none", 1.0), ("sign_flip", -1.0), ("times_10", 10.0)):
        returned, _ = trained(dataset, ATTACKS, ATTACKS.ATTACKS.index(attack))
        torch.testing.assert_close(returned, weights + factor * change)


def test_colluders_return_the_same_weights(dataset, monkeypatch):
    x, y = dataset.examples(1, "train")
    shared = Examples(torch.from_numpy(x).float() / 255, 9 - torch.from_numpy(y).long())
    monkeypatch.setattr(ATTACKS, "shared_examples", lambda: shared)
    honest, _ = trained(dataset, local_sgd, 0)
    returned, _ = trained(dataset, ATTACKS, ATTACKS.ATTACKS.index("collude"))
    again, _ = trained(dataset, ATTACKS, ATTACKS.ATTACKS.index("collude"))
    assert torch.equal(returned, again)
    assert not torch.equal(returned, honest)
