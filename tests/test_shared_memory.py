import gc
import os
from multiprocessing import Pipe

import numpy as np
import pytest

from fedtune.executors.shared_memory import SharedArray, receive

ARRAYS = [
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.arange(4.0).reshape(2, 1, 2),
    np.zeros((0, 28, 28), np.uint8),
    np.arange(5, dtype=">i8"),
]


@pytest.fixture(scope="module", autouse=True)
def what_is_there_already():
    """Keeps the objects of other modules out of the garbage collections here, which are faster without them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["memfd", "file"], autouse=True)
def kind(request, monkeypatch):
    if request.param == "file":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memfd")


def send(shared):
    ours, theirs = Pipe()
    with ours, theirs:
        shared.send(ours)
        return receive(theirs)


def num_descriptors():
    gc.collect()
    return len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("array", ARRAYS)
def test_what_is_sent_is_the_same_memory(array):
    shared = SharedArray.copy_of(array)
    received = send(shared)
    assert received.dtype == array.dtype
    np.testing.assert_array_equal(received, array)
    received += 1
    np.testing.assert_array_equal(shared.array, array + 1)


def test_memory_is_zero_at_first():
    assert not SharedArray((3, 5), "<f4").array.any()


def test_a_copy_is_no_view():
    array = np.zeros(3)
    shared = SharedArray.copy_of(array)
    array[:] = 1
    assert not shared.array.any()


def test_memory_outlives_the_one_that_made_it():
    received = send(SharedArray.copy_of(np.arange(3)))
    gc.collect()
    assert received.tolist() == [0, 1, 2]


def test_descriptors_are_closed():
    before = num_descriptors()
    shared = SharedArray.copy_of(np.arange(3))
    assert num_descriptors() == before + 2  # one to send, one of the map
    received = send(shared)
    assert num_descriptors() == before + 3  # what is received is not sent on
    del shared
    assert num_descriptors() == before + 1
    del received
    assert num_descriptors() == before
