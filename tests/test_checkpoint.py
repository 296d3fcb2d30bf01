import resource

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedtune.errors import InputError
from fedtune.runs import checkpoint


def test_what_was_saved_is_loaded_to_the_bit(tmp_path):
    arrays = {
        "round": np.array(7),
        "weights": np.array([0.1, -0.0, np.nan, np.inf], np.float32),
        "fedex.log_theta": np.log(np.full(3, 1 / 3)),
        "strided": np.arange(6.0)[::2],
    }
    checkpoint.save(tmp_path / "trial-0.safetensors", arrays)
    loaded = checkpoint.load(tmp_path / "trial-0.safetensors")
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (loaded[name].shape, loaded[name].dtype) == (array.shape, array.dtype)
        assert loaded[name].tobytes() == array.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["trial-0.safetensors"]


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "trial-0.safetensors"
    checkpoint.save(path, {"round": np.array(1)})
    with pytest.raises(Exception, match=r"complex|dtype"):
        checkpoint.save(path, {"round": np.array(1j)})
    assert checkpoint.load(path)["round"] == 1


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "trial-0.safetensors"
    checkpoint.save(path, {"round": np.array(1)})
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match=rf"^checkpoint {path} is damaged: [^\n]+$"):
        checkpoint.load(path)


def test_a_checkpoint_that_cannot_be_written_is_an_os_error(tmp_path):
    """No file may grow beyond ten bytes, as if there the disk were full; the command line shows it as one line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=r"^.*trial-0.safetensors cannot be written: [^\n]+$"):
            checkpoint.save(tmp_path / "trial-0.safetensors", {"round": np.array(1)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [8, 40, -1])
def test_any_byte_that_changed_is_damage(tmp_path, place):
    """In the header's first bytes, in the checksum's name, in the last array."""
    path = tmp_path / "trial-0.safetensors"
    checkpoint.save(path, {"round": np.array(1), "weights": np.arange(9.0)})
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"^checkpoint {path} is damaged: [^\n]+$"):
        checkpoint.load(path)


def test_a_safetensors_file_of_somebody_else_is_no_checkpoint(tmp_path):
    path = tmp_path / "trial-0.safetensors"
    save_file({"round": np.array(1)}, path)
    with pytest.raises(InputError, match=r"is damaged: its checksum does not fit$"):
        checkpoint.load(path)


def test_an_array_of_another_name_is_damage(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, {"one": np.zeros(3), "two": np.ones(3)})
    path.write_bytes(path.read_bytes().replace(b'"two"', b'"twi"'))
    with pytest.raises(InputError, match="is damaged: its checksum does not fit"):
        checkpoint.load(path)
