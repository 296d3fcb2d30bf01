"""The file of a journal: what is appended is kept, and what somebody else does to it is noticed."""

import errno
import os

import pytest

from fedtune.errors import InputError
from fedtune.runs.appended_file import AppendedFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


@pytest.fixture
def file(path):
    """A file that holds a line."""
    file = AppendedFile(path, 0)
    file.append(b"one\n")
    yield file
    file.close()


def test_what_is_appended_is_in_the_file_at_once(path, file):
    assert path.read_bytes() == b"one\n"
    file.append(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


def test_bytes_behind_the_kept_ones_are_cut_off(path):
    path.write_bytes(b"one\ntorn")
    file = AppendedFile(path, 4)
    file.append(b"two\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\n"


def replace(path):
    """As an editor does that saves a file under a new name and renames it."""
    saved = path.with_name("saved")
    saved.write_bytes(path.read_bytes())
    saved.replace(path)


@pytest.mark.parametrize(
    ("touch", "said"),
    [
        (os.unlink, "none"),
        (replace, "another file in its place"),
        (lambda path: path.write_bytes(b""), "0 bytes instead of 4"),
        (lambda path: path.write_bytes(b"one\ntwo\n"), "8 bytes instead of 4"),
    ],
)
def test_a_file_that_somebody_touched_is_one_line_at_the_next_write(path, file, touch, said):
    touch(path)
    left = path.read_bytes() if path.exists() else None
    with pytest.raises(InputError) as caught:
        file.append(b"two\n")
    assert str(caught.value).startswith(f"{path} must stay as it is while the run goes on, got {said}: the run stops")
    assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.exists() else None) == left


def test_a_full_disk_is_an_os_error_that_names_the_file(path, file, monkeypatch):
    def refuse(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match=rf"^{path} cannot be written: No space left on device$"):
        file.append(b"two\n")


def test_a_link_is_not_followed(path, tmp_path):
    (tmp_path / "other").write_text("mine")
    path.symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match=str(path)):
        AppendedFile(path, 0)
    assert (tmp_path / "other").read_text() == "mine"
