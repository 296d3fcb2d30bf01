"""A run folder that another process uses, or whose disk is full, or whose files were lost."""

import contextlib
import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

import fedtune
from fedtune.errors import InputError
from fedtune.runs.run_folder import claim_folder, locked
from fedtune.settings import resolve
from fedtune.settings_text import read_settings

SETTINGS = {
    **{"tuners": ["random"], "max_rounds": 3, "total_rounds": 9, "executor": "serial", "cohort_size": 1},
    "evaluation": {"every": 3, "clients": 3},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return fedtune.compare("digits", out=tmp_path_factory.mktemp("folder") / "run", **SETTINGS).folder


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hold(folder, connection):
    with locked(folder):
        connection.send("locked")
        connection.recv()


@pytest.fixture
def in_use(finished):
    """The folder, which another process has locked; and that process."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(finished, theirs))
    process.start()
    assert ours.recv() == "locked"
    yield finished, process
    process.kill()
    process.join()


def test_a_run_that_another_process_goes_on_with_is_left_alone(in_use):
    folder, process = in_use
    before = everything(folder)
    for use in (
        lambda: fedtune.resume(folder),
        lambda: fedtune.extend(folder, num_configs=9),
        lambda: fedtune.compare("digits", out=folder, force=True, **SETTINGS),
    ):
        with pytest.raises(InputError) as caught:
            use()
        assert str(caught.value) == f"another process is using run folder {folder}"
    assert everything(folder) == before
    assert fedtune.replay(folder)[0].finished  # which only reads
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    fedtune.resume(folder, executor="serial")
    results = [name for name in before if name.suffix in (".csv", ".parquet") and name.stem != "timings"]
    assert {name: name.read_bytes() for name in results} == {name: before[name] for name in results}


@contextlib.contextmanager
def dying_after(number, monkeypatch):
    """Within it, this process ends in place of the operation on files after so many of them."""

    def until_it_dies(function):
        def called(*arguments, **keywords):
            nonlocal number
            if number == 0:
                raise SystemExit
            number -= 1
            return function(*arguments, **keywords)

        return called

    with monkeypatch.context() as patched:
        for name in ("unlink", "rmdir", "mkdir", "replace"):
            patched.setattr(os, name, until_it_dies(getattr(os, name)))
        yield


def test_a_run_folder_can_be_overwritten_after_a_process_died_while_it_overwrote_it(finished, tmp_path, monkeypatch):
    settings = resolve([read_settings(finished / "settings.toml")])
    dead = 0
    while True:
        folder = shutil.copytree(finished, tmp_path / f"run {dead}")
        try:
            with dying_after(dead, monkeypatch):
                claim_folder(folder, settings, force=True)
        except SystemExit:
            dead += 1
        else:
            break
        claim_folder(folder, settings, force=folder.exists())
        assert {path.name for path in folder.iterdir()} == {"settings.toml", "environment.json"}
    assert dead > len(list(finished.rglob("*")))  # each file and folder was removed, and then others were made


@pytest.mark.parametrize("limit", [600, 3000, 6000])
def test_a_run_on_a_full_disk_is_one_line_and_goes_on_later(finished, tmp_path, limit):
    """No file may grow beyond so many bytes, as if there the disk were full."""
    folder = tmp_path / "run"
    command = ["compare", str(finished / "settings.toml"), "--out", str(folder)]
    ended = subprocess.run(
        [sys.executable, "-m", "fedtune", *command],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    message = ended.stderr.splitlines()[-1]
    assert message.startswith("fedtune: ")
    assert str(folder) in message
    assert "Traceback" not in ended.stderr
    if limit > 600:  # then its settings could be written
        resumed = fedtune.resume(folder, executor="serial").folder
        assert (resumed / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()


@pytest.mark.parametrize("tuner", ["random", "asha", "hyperband", "pbt", "fedex"])
def test_disk_use_is_two_checkpoints_a_trial_that_may_go_on(tmp_path, monkeypatch, tuner):
    """At every moment; of the trials that had all their rounds, the best one's alone is kept."""
    monkeypatch.setattr("fedtune.runs.trial_store.SECONDS_BETWEEN", 0.0)
    folder, ended, live, most = tmp_path / "run", set(), set(), 0

    def look(event):
        nonlocal most
        if event["event"] == "ask":
            live.add(event["trial"])
        elif event["event"] == "incumbent":
            ended.update(live if tuner == "fedex" else ())
            sizes = [path.stat().st_size for path in folder.glob("*/checkpoints/*")]
            most = max(most, len(sizes))
            assert len(sizes) <= 2 * len(live - ended) + 2
            assert max(sizes) <= 3 * 4 * 650 + 1500  # 64 pixels and a bias to 10 classes; the header, theta
        elif event["event"] == "tell" and event["rounds"] == 9:
            ended.add(event["trial"])

    settings = {**SETTINGS, "tuners": [tuner], "max_rounds": 9, "total_rounds": 90 if tuner == "pbt" else 45}
    settings["server"] = {"optimizer": "yogi"}
    settings["model"] = {"name": "logistic"}
    fedtune.compare("digits", out=folder, listener=look, **settings)
    assert most > 0
    assert len(list(folder.glob("*/checkpoints/*"))) <= 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSONDecodeError: "),
        ("[]", "TypeError: "),
        ("{}", "KeyError: 'versions'"),
        ('{"versions": {"torch": "2.0"}}', "KeyError: 'fedtune'"),
    ],
)
def test_an_environment_that_was_damaged_is_one_line(finished, tmp_path, text, said):
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "environment.json"
    path.write_text(text)
    before = everything(folder)
    with pytest.raises(InputError) as caught:
        fedtune.resume(folder, executor="serial")
    assert str(caught.value).startswith(f"{path} must say which versions the run was begun with, got {said}")
    assert str(caught.value).endswith("; if it can't be restored, remove it")
    assert "\n" not in str(caught.value)
    assert everything(folder) == before


def test_an_environment_that_was_lost_is_a_warning(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    path, heard = folder / "environment.json", []
    written = path.read_text()
    path.unlink()
    fedtune.resume(folder, executor="serial", listener=heard.append)
    (warning,) = (event["message"] for event in heard if event["event"] == "warning")
    assert warning == (
        f"{path} was lost, with the versions that the run was begun with: it holds the present ones from now on"
    )
    assert path.read_text() == written
    fedtune.resume(folder, executor="serial", listener=heard.append)
    assert sum(event["event"] == "warning" for event in heard) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line(finished, tmp_path, monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(InputError) as caught:
        fedtune.resume(finished, executor="serial")
    assert str(caught.value) == (
        f"run folder {finished} must be on a file system that can lock a folder (flock), got {os.strerror(number)}"
    )
    with pytest.raises(InputError, match=r"must be on a file system that can lock a folder"):
        fedtune.compare("digits", out=tmp_path / "run", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_torch_is_gone_on_with_and_says_so(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "environment.json"
    text = path.read_text()
    now = text.partition('"torch": "')[2].partition('"')[0]
    path.write_text(text.replace(f'"torch": "{now}"', '"torch": "1.0"', 1))
    heard = []
    fedtune.resume(folder, executor="serial", listener=heard.append)
    (warning,) = (event["message"] for event in heard if event["event"] == "warning")
    assert warning == (
        f"the run was begun with torch 1.0, now {now}: its results may differ from a run with either set of versions"
    )
