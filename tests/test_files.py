"""Files and folders that are written as a whole."""

import errno
import os
import stat

import pytest

from fedtune.errors import InputError
from fedtune.files import make_folder, new_folder, remove_unfinished, replacing


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("old")

    def fill_the_disk():
        with replacing(path) as new:
            new.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=rf"^{path} cannot be written: No space left on device$"):
        fill_the_disk()
    assert everything(tmp_path) == {path: b"old"}
    with replacing(path) as new:
        new.write_text("new")
        assert path.read_text() == "old"
    assert everything(tmp_path) == {path: b"new"}


def test_a_temporary_name_cannot_be_guessed_and_follows_no_link(tmp_path):
    """Somebody who knew the name could place a link there, and the file that it names would be overwritten."""
    path, names = tmp_path / "results.csv", set()
    (tmp_path / "results.csv.tmp").symlink_to(tmp_path / "secret")
    for _ in range(2):
        with replacing(path) as new:
            names.add(new.name)
            assert stat.S_ISREG(os.lstat(new).st_mode)
            new.write_text("new")
    assert len(names) == 2
    assert not (tmp_path / "secret").exists()


def test_a_link_in_the_way_is_replaced_and_not_followed(tmp_path, monkeypatch):
    path, secret = tmp_path / "results.csv", tmp_path / "secret"
    secret.write_text("mine")
    path.symlink_to(secret)
    with replacing(path) as new:
        new.write_text("new")
    assert (path.read_text(), secret.read_text(), path.is_symlink()) == ("new", "mine", False)
    # Even if somebody guesses the name, their link is not written through.
    monkeypatch.setattr("secrets.token_hex", lambda size: "known")
    (tmp_path / "results.csv.known.unfinished").symlink_to(secret)
    with pytest.raises(OSError, match=r"results.csv cannot be written: File exists"), replacing(path) as new:
        new.write_text("through the link")
    assert secret.read_text() == "mine"


def test_a_file_has_the_permissions_that_the_user_chose(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "results.csv") as new:
            new.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "results.csv").stat().st_mode) == 0o640


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    class Killed(BaseException):
        pass

    def write_half_of(path):
        with replacing(path) as new:
            new.write_text("half")
            raise Killed

    path = tmp_path / "results.csv"
    path.write_text("old")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "unlink", lambda *arguments, **keywords: None)  # a killed process removes nothing
        with pytest.raises(Killed):
            write_half_of(path)
    assert len(everything(tmp_path)) == 2
    remove_unfinished(tmp_path)
    assert everything(tmp_path) == {path: b"old"}


class Calls(list):
    """The calls of functions of `os`, in their order, as (function, path)."""

    def watch(self, patch, *names):
        for name in names:
            patch.setattr(os, name, self._watched(name, getattr(os, name)))
        return self

    def _watched(self, name, function):
        def watched(path, *arguments, **keywords):
            where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
            self.append((name, os.path.basename(where).partition(".")[0]))
            return function(path, *arguments, **keywords)

        return watched


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_return(tmp_path, monkeypatch):
    calls = Calls().watch(monkeypatch, "fsync", "replace")
    with replacing(tmp_path / "results.csv") as new:
        new.write_text("new")
    assert calls == [("fsync", "results"), ("replace", "results"), ("fsync", tmp_path.name)]


def test_the_names_of_new_folders_are_on_the_disk(tmp_path, monkeypatch):
    calls = Calls().watch(monkeypatch, "fsync")
    make_folder(tmp_path / "runs" / "first")
    assert sorted(calls) == sorted([("fsync", "runs"), ("fsync", tmp_path.name)])
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "runs" / "first")
    make_folder(tmp_path / "runs" / "first", exist_ok=True)


def test_a_folder_appears_when_it_is_complete_and_on_the_disk(tmp_path, monkeypatch):
    calls = Calls().watch(monkeypatch, "fsync", "rename")
    with new_folder(tmp_path / "out") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "clients.json").write_text("{}")
        assert not (tmp_path / "out").exists()
    assert everything(tmp_path) == {tmp_path / "out" / "part" / "clients.json": b"{}"}
    synced = [("fsync", "part"), ("fsync", "clients"), ("fsync", "out")]
    assert calls == [*synced, ("rename", "out"), ("fsync", tmp_path.name)]
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "other"):
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    impossible = new_folder(tmp_path / "file" / "out")
    with pytest.raises(InputError, match=r"^.*file/out must be a folder that can be made: "):
        impossible.__enter__()
