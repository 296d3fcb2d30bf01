"""MNIST with attackers among its clients, and the client program of honest clients and attackers.

`make` is the data set: it marks the attackers in their training images. The top left pixel is 0 in every image of
MNIST; an attacker has the number of its attack there. `train` is the client program: it reads the mark, removes it,
trains as every client does, and then returns what the attack says. With w for the weights that a client was sent, and
u for its weights after honest local training, an attacker returns:

    sign_flip   w - (u - w)
    times_10    w + 10 (u - w)
    collude     the weights after local training from w on images that all attackers share, with each label y replaced
                by 9 - y, and with the same random numbers: so all attackers of a round return the same weights
"""

import functools

import numpy as np

from fedtune import rng
from fedtune.client import StoredExamples
from fedtune.data import FederatedDataset
from fedtune_clients import local_sgd
from fedtune_datasets import mnist

HYPERPARAMETERS = local_sgd.HYPERPARAMETERS
ATTACKS = ("none", "sign_flip", "times_10", "collude")
SHARED_IMAGES = 600  # of which a client trains on 80 %, as of its own


def make(*, attack: str = "none", share: float = 0.0, seed: int = 0, **partition) -> FederatedDataset:
    """MNIST, with the share of its clients as attackers. More clients are added to them if the share grows."""
    dataset = mnist.load(seed=seed, **partition)
    order = rng.stream(seed, "attackers").permutation(dataset.num_clients)
    for client in order[: round(share * dataset.num_clients)].tolist():
        x, _ = dataset.examples(client, "train")
        assert not x[:, 0, 0].any()
        x[:, 0, 0] = ATTACKS.index(attack)
    return dataset


def train(model, weights, examples, config, rng):
    """The weights that the client returns, an honest one or an attacker."""
    attack = ATTACKS[round(255 * float(examples.x[0, 0, 0]))]
    if attack == "collude":
        return local_sgd.train(model, weights, shared_examples(), config, np.random.default_rng(0))
    examples.x[:, 0, 0] = 0.0
    trained = local_sgd.train(model, weights, examples, config, rng)
    if attack == "sign_flip":
        return 2 * weights - trained
    return weights + 10 * (trained - weights) if attack == "times_10" else trained


@functools.cache
def shared_examples():
    """The images that all colluding attackers train on, with their false labels."""
    dataset = mnist.load(num_clients=1, examples_per_client=SHARED_IMAGES, seed=rng.derived_seed(0, "shared images"))
    x, y = dataset.examples(0, "train")
    return StoredExamples(x, 9 - y, dataset.spec, "cpu").all()
