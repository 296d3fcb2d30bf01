import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedtune.data.parts import PARTS
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError
from fedtune_datasets import mnist

pytestmark = pytest.mark.network  # the first time on a machine; afterwards the files are in the user's cache

# As published with the data set: how many of the 60,000 training images show each digit.
DIGITS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def label_counts(dataset):
    """(client, digit)"""
    labels = [np.concatenate([dataset.examples(c, part)[1] for part in PARTS]) for c in range(dataset.num_clients)]
    return np.array([np.bincount(y, minlength=10) for y in labels])


def test_the_clients_share_the_training_images():
    dataset = mnist.load()
    assert dataset.spec == DatasetSpec((28, 28), "real", 10, 1 / 255)
    assert (dataset.x.dtype, dataset.x.shape, dataset.num_clients) == (np.uint8, (60_000, 28, 28), 100)
    assert dataset.check() == []
    assert [dataset.num_examples(part).tolist() for part in PARTS] == [[480] * 100, [60] * 100, [60] * 100]
    assert label_counts(dataset).sum(0).tolist() == DIGITS
    # The mean and standard deviation with which PyTorch's examples normalise the training images.
    pixels = dataset.x.astype(np.float32) * dataset.spec.scale
    assert pixels.mean() == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std(dtype=np.float64) == pytest.approx(0.3081, abs=1e-4)


def test_labels_belong_to_their_images():
    """Nearest class mean, fitted to even examples, is right on about 82 % of the odd ones; wrong labels give 10 %."""
    dataset = mnist.load()
    x, y = dataset.x.reshape(60_000, 784)[:10_000].astype(np.float32), dataset.y[:10_000]
    means = np.array([x[::2][y[::2] == digit].mean(0) for digit in range(10)])
    distance = (means**2).sum(1) - 2 * x[1::2] @ means.T
    assert (distance.argmin(1) == y[1::2]).mean() > 0.7


def test_shards_of_the_first_published_experiment():
    counts = label_counts(mnist.load(partition="shards"))
    assert (counts.sum(1) == 600).all()
    assert (counts > 0).sum(1).max() <= 4
    assert np.median((counts > 0).sum(1)) == 2
    assert counts.sum(0).tolist() == DIGITS


def test_the_default_settings_load():
    arguments = {key: value for key, value in mnist.SETTINGS["data"].items() if key != "name"}
    dataset = mnist.load(**arguments)
    assert (dataset.num_clients, dataset.stats()["mean"], dataset.stats()["std"]) == (1000, 60, 0)
    assert dataset.check() == []


def test_some_of_the_images_can_be_used():
    first, again, other = (mnist.load(num_clients=20, examples_per_client=30, seed=seed) for seed in (0, 0, 1))
    assert first.x.shape == (600, 28, 28)
    assert (first.x == again.x).all()
    assert {image.tobytes() for image in first.x} != {image.tobytes() for image in other.x}


def test_the_seed_sets_how_a_client_splits_its_images():
    first, other = (mnist.load(num_clients=1, seed=seed) for seed in (0, 1))  # all images, whatever the partition draws
    assert (first.x != other.x).any()


def test_options_reach_the_partition():
    with pytest.raises(InputError, match="alpha must be left out"):
        mnist.load(alpha=0.5)
    sizes = mnist.load(partition="dirichlet", num_clients=10, alpha=0.5).stats()
    assert sizes["std"] > 0
    with pytest.raises(InputError, match="equal shards, got 700 for 60000 examples"):
        mnist.load(partition="shards", shards_per_client=7)


def test_prepare_gives_the_folder_of_the_files():
    folder = mnist.prepare()
    assert isinstance(folder, Path)
    assert {mnist.IMAGES, mnist.LABELS} <= {file.name for file in folder.iterdir()}
    assert not any(file.name.startswith(".download-") for file in folder.iterdir())


def test_settings_are_those_of_the_file_beside_the_module():
    with Path(mnist.__file__).with_name("mnist.toml").open("rb") as file:
        assert tomllib.load(file) == mnist.SETTINGS
