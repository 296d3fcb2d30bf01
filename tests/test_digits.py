import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedtune.data.parts import PARTS
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError
from fedtune_datasets import digits, mnist


def images_and_labels(dataset):
    """Every example as (pixels, label), sorted."""
    return sorted((x.tobytes(), int(y)) for x, y in zip(dataset.x, dataset.y, strict=True))


def test_the_clients_share_the_images_of_scikit_learn():
    dataset = digits.load()
    assert dataset.spec == DatasetSpec((8, 8), "real", 10, 1 / 16)
    assert (dataset.x.dtype, dataset.num_clients) == (np.uint8, 30)
    assert dataset.check() == []
    source = load_digits()
    expected = zip(source.images.astype(np.uint8), source.target, strict=True)
    assert images_and_labels(dataset) == sorted((x.tobytes(), int(y)) for x, y in expected)
    assert (source.images * dataset.spec.scale).max() == 1
    assert sum(dataset.num_examples(part).sum() for part in PARTS) == 1797


def test_the_seed_sets_which_images_are_used_and_how_each_client_splits_them():
    used = [images_and_labels(digits.load(num_clients=20, examples_per_client=40, seed=seed)) for seed in (0, 0, 1)]
    assert used[0] == used[1] != used[2]
    alone = [digits.load(num_clients=1, seed=seed) for seed in (0, 1)]  # all images, whatever the partition draws
    assert images_and_labels(alone[0]) == images_and_labels(alone[1])
    assert (alone[0].x != alone[1].x).any()


def test_the_partition_and_its_options_matter():
    arguments = {"num_clients": 20, "examples_per_client": 40, "partition": "shards"}
    first = digits.load(**arguments)
    assert first.stats()["label_skew"] > 0.6 > digits.load(num_clients=20).stats()["label_skew"]
    one_shard = digits.load(**arguments, shards_per_client=1)
    assert one_shard.stats()["label_skew"] > first.stats()["label_skew"]
    assert digits.load(partition="dirichlet", alpha=0.5, num_clients=5).stats()["std"] > 0


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match="alpha must be left out"):
        digits.load(alpha=0.5)
    with pytest.raises(InputError, match="num_clients must be 1 to 599"):
        digits.load(num_clients=600)


def test_the_default_settings_load_and_search_the_spaces_of_mnist():
    arguments = {key: value for key, value in digits.SETTINGS["data"].items() if key != "name"}
    assert digits.load(**arguments).num_clients == 30
    assert digits.SETTINGS["space"] == mnist.SETTINGS["space"]
    assert digits.SETTINGS["client"] == mnist.SETTINGS["client"]


def test_there_is_nothing_to_prepare():
    assert digits.prepare() is None
