"""Where arrays lie in files, and what processes get of them."""

import pickle

import numpy as np
import pytest

from fedtune.data.mapped import place_of
from fedtune.executors.shared_memory import MappedFile, SharedArray, share


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(60, dtype=np.float32).reshape(5, 4, 3))
    return np.load(tmp_path / "x.npy", mmap_mode="r")


@pytest.mark.parametrize(
    "view", [np.s_[:], np.s_[1:4], np.s_[2], np.s_[::2, 1], np.s_[:, :, 2], np.s_[4:, 3:, 2:], np.s_[1:2, None]]
)
def test_a_view_of_a_file_is_found_there_again(mapped, view):
    for array in (mapped[view], mapped[view].T, np.asarray(mapped)[view]):
        again = place_of(array).map()
        np.testing.assert_array_equal(again, array)
        assert not again.flags.writeable
        sent = share(array)
        assert isinstance(sent, MappedFile)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(sent)), array)


def test_what_is_in_no_file_is_copied(mapped):
    changed = np.load(mapped.filename, mmap_mode="c")
    changed[0] = 7
    for array in (np.array(mapped), mapped[::-1], mapped[:0], mapped[[1, 2]], mapped + 1, changed, changed[1:]):
        assert place_of(array) is None
        sent = share(array)
        assert isinstance(sent, SharedArray)
        np.testing.assert_array_equal(sent.array, array)
