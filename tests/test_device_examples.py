import numpy as np
import pytest
import torch

from fedtune.client import device_examples
from fedtune.client.device_examples import DeviceExamples
from fedtune.data.federated_dataset import FederatedDataset

PARTS = [(2, "train"), (0, "validation"), (2, "train"), (1, "test")]


def images(dtype=np.uint8, **keywords):
    rng = np.random.default_rng(0)
    return FederatedDataset.from_clients(
        {str(n): (rng.integers(0, 256, (n, 3, 2)).astype(dtype), rng.integers(0, 3, n)) for n in (12, 31, 20)},
        name="made up",
        num_classes=3,
        scale=1 / 255,
        **keywords,
    )


def text():
    letters = np.random.default_rng(0).integers(0, 9, 120).astype(np.uint8)
    bounds = np.cumsum([0, *[11] * 9]).repeat(2)[1:-1]  # three parts for each of three clients
    return FederatedDataset.from_text(
        letters, ["a", "b", "c"], bounds.reshape(3, 3, 2), name="made up", window=5, num_classes=9
    )


@pytest.fixture
def memory(monkeypatch):
    """Sets the memory that the device says it has."""
    return lambda size: monkeypatch.setattr(device_examples, "_memory", lambda device: size)


@pytest.mark.parametrize(
    "make",
    [images, lambda: images(np.float32), lambda: images(np.int16), text],
    ids=["bytes", "floats", "ints", "text"],
)
def test_examples_that_lie_on_the_device_are_the_same_as_those_that_are_sent(make, memory):
    dataset = make()
    sent = DeviceExamples(dataset, "cpu")
    memory(4 * (dataset.x if dataset.text is None else dataset.text).nbytes + 4 * dataset.y.nbytes)
    lying = DeviceExamples(dataset, "cpu")
    assert sent._stored is None
    assert lying._stored is not None
    for own, other in zip(lying.take(PARTS), sent.take(PARTS), strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own, other)
    assert lying.sizes(PARTS) == sent.sizes(PARTS) == [len(dataset.examples(*part)[1]) for part in PARTS]


def test_a_text_lies_there_once_not_its_windows(memory):
    memory(2**20)
    stored = DeviceExamples(text(), "cpu")._stored
    assert stored.x.shape == (115, 5)
    assert stored.x.untyped_storage().nbytes() == 120


def test_a_data_set_that_is_too_large_or_can_not_be_indexed_is_sent_when_it_is_needed(memory):
    dataset = images()
    memory(4 * (dataset.x.nbytes + dataset.y.nbytes) - 1)
    assert DeviceExamples(dataset, "cpu")._stored is None
    memory(2**20)
    assert DeviceExamples(images(np.uint16), "cpu")._stored is None
