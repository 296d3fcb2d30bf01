"""What differs from one operating system to another, and a run where there is no POSIX."""

import ast
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fedtune
from fedtune import operating_system
from fedtune.data.reading import check_memory
from fedtune.errors import InputError
from fedtune.operating_system import NO_WORKERS, FolderLock, memory, num_cores, sync
from fedtune_clients.kernel_library import LIBRARY

SETTINGS = {"max_rounds": 3, "total_rounds": 9, "cohort_size": 2, "model": {"name": "logistic"}}  # of without_posix.py

ROOT = Path(__file__).parent.parent
PACKAGES = [ROOT / "fedtune", ROOT / "clients" / "fedtune_clients", ROOT / "datasets" / "fedtune_datasets"]


@pytest.fixture
def without_workers(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])


@pytest.fixture(params=["folder", "file"])
def kind(request, monkeypatch):
    """What is locked in place of a folder: the folder itself, or a file if no folder can be opened."""
    monkeypatch.setattr(operating_system, "OPENS_FOLDERS", request.param == "folder")
    return request.param


def hold(folder, kind, connection):
    operating_system.OPENS_FOLDERS = kind == "folder"
    connection.send(FolderLock(folder).take())
    connection.recv()


def test_a_lock_ends_with_its_process(tmp_path, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(folder, kind, theirs))
    process.start()
    assert ours.recv() is True
    lock = FolderLock(folder)
    assert not lock.take()
    lock.release()  # which leaves the lock to the other process
    lock = FolderLock(folder)
    assert not lock.take()
    process.kill()
    process.join()
    assert lock.take()
    lock.release()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_lock_keeps_others_away_until_it_is_given_back(tmp_path, kind, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)
    first, second = FolderLock(folder), FolderLock(Path("."))  # the same folder
    assert first.take()
    assert not second.take()
    second.release()
    first.release()
    second = FolderLock(folder)
    assert second.take()
    assert list(folder.iterdir()) == []
    second.release()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_cannot_be_opened_is_not_brought_to_the_disk_and_its_files_are(tmp_path, monkeypatch):
    synced = []
    (tmp_path / "file").write_text("new")
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    sync(tmp_path)
    sync(tmp_path / "file")
    assert synced == [tmp_path.stat().st_ino, (tmp_path / "file").stat().st_ino]
    monkeypatch.setattr(operating_system, "OPENS_FOLDERS", False)
    sync(tmp_path)
    sync(tmp_path / "file")
    assert synced[2:] == [(tmp_path / "file").stat().st_ino]


def test_cores_are_counted_without_affinity_too(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert num_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cores() == 1


def test_a_system_that_does_not_tell_its_memory_refuses_nothing(monkeypatch):
    with pytest.raises(InputError, match=r"^it must fit into memory, "):
        check_memory("it", memory() + 1)
    check_memory("it", memory())
    monkeypatch.delattr(os, "sysconf")
    assert memory() is None
    check_memory("it", 2**70)


def test_the_terminal_and_the_system_can_stop_a_run():
    assert operating_system.STOP_SIGNALS == [signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"executor": "pool"}, "executor must be auto, serial or batched here, got 'pool'"),
        ({"watch": {"limit": 60.0}}, "watch.limit must not be set here, where no client can be ended, got 60"),
    ],
)
def test_worker_processes_that_the_system_lacks_are_one_line(tmp_path, without_workers, settings, said):
    with pytest.raises(InputError) as caught:
        fedtune.train("digits", rounds=1, out=tmp_path / "run", **settings)
    assert str(caught.value) == f"{said}: {NO_WORKERS}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_auto_is_serial_if_the_system_lacks_worker_processes(tmp_path, without_workers, workers):
    heard = []
    options = {"model": {"name": "logistic"}, "cohort_size": 2, "parallel_studies": 2}
    fedtune.train("digits", rounds=1, out=tmp_path / "run", workers=workers, listener=heard.append, **options)
    warnings = [event["message"] for event in heard if event["event"] == "warning"]
    said = f"executor auto is serial here: {NO_WORKERS}"
    assert warnings == ([said] if workers == 2 else [])
    (executor,) = (event["message"] for event in heard if event["event"] == "executor")
    assert executor.endswith("in this process")


# What Windows lacks, or has in another way. Only the modules of the pool, which is not there, may use it too.
PLATFORM = re.compile(
    r"\b(forkserver|resource_tracker|pthread_sigmask|signal\.SIG[A-Z]+|sys\.platform|platform\.system|os\.O_[A-Z]+"
    r"|sched_getaffinity|sysconf|memfd_create|os\.(fork|killpg|uname|geteuid|name)"
    r"|import (fcntl|msvcrt|resource|pwd|termios))\b"
)
OF_POOL = {"blame", "pool", "processes", "shared_memory", "worker", "workers"}


def test_what_depends_on_the_system_is_in_one_module():
    found = {}
    for path in (path for package in PACKAGES for path in package.rglob("*.py")):
        code = re.sub(r'""".*?"""|#[^\n]*|"[^"\n]*"', "", path.read_text(), flags=re.DOTALL)
        if used := PLATFORM.findall(code):
            found[path.relative_to(ROOT).as_posix()] = used
    allowed = {f"fedtune/executors/{name}.py" for name in OF_POOL} | {"fedtune/operating_system.py"}
    assert found.keys() <= allowed, found


def test_the_modules_of_the_pool_are_imported_when_there_is_a_pool():
    """That is, within functions. The modules of the pool themselves import each other at once."""
    pool = {f"fedtune.executors.{name}" for name in OF_POOL}
    importing = {
        path.relative_to(ROOT).as_posix()
        for path in (path for package in PACKAGES for path in package.rglob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module in pool
    }
    assert importing
    assert importing <= {f"fedtune/executors/{name}.py" for name in OF_POOL}


def calls(name):
    """(place, the first constant among the arguments, names of the keywords) of each call of a function or method."""
    for path in (path for package in PACKAGES for path in package.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if name == getattr(call.func, "attr", getattr(call.func, "id", None)):
                constant = next((argument.value for argument in call.args if isinstance(argument, ast.Constant)), None)
                yield f"{path.relative_to(ROOT)}:{call.lineno}", constant, {keyword.arg for keyword in call.keywords}


def test_text_files_do_not_have_the_encoding_and_the_ends_of_lines_of_the_system():
    read = list(calls("read_text"))
    written = [*calls("write_text"), *(call for call in calls("open") if call[1] in ("w", "a", "x"))]
    assert read
    assert written
    assert [place for place, _, given in read if "encoding" not in given] == []
    assert [place for place, _, given in written if not {"encoding", "newline"} <= given] == []
    assert [place for place, _, given in calls("to_csv") if "lineterminator" not in given] == []


@pytest.mark.slow
def test_a_run_without_posix_has_the_same_results(tmp_path):
    # With -X, Python says where the system's encoding is used: see without_posix.py.
    options = ["-X", "warn_default_encoding", "-W", "ignore::EncodingWarning"]
    command = [sys.executable, *options, Path(__file__).with_name("without_posix.py"), tmp_path]
    # There would be another kernel, and so other bits.
    environment = os.environ | {"FEDTUNE_KERNEL_LIBRARY": str(LIBRARY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    with_posix = fedtune.compare(
        "digits", tuners=["asha", "fedex"], executor="serial", out=tmp_path / "posix", **SETTINGS
    )
    # The same files, to the byte; only the real times and the executor differ.
    files = files_of(with_posix.folder)
    files["settings.toml"] = files["settings.toml"].replace(b'executor = "serial"', b'executor = "auto"')
    assert files_of(tmp_path / "run") == files
    assert seen["test_error"] == with_posix.results["test_error"].tolist()
    assert (tmp_path / "stopped" / "results.csv").read_bytes() == files["results.csv"]
    assert seen["replay"] == [True, True]
    # What it says.
    assert seen["compare"][1][0] == f"warning: executor auto is serial here: {NO_WORKERS}"
    assert [seen[name][0] for name in ("compare", "resume", "overwrite", "doctor")] == [0, 0, 0, 0]
    for name, said in (
        ("pool", "executor must be "),
        ("limit", "watch.limit must not be set here, "),
        ("locked", f"another process is using run folder {tmp_path / 'run'}"),
    ):
        code, (line,) = seen[name]
        assert code == 2
        assert line.startswith(f"fedtune: {said}")
    # What it leaves, and what it did not import.
    assert seen["files"] == ["older", "run", "stopped"]
    assert not [name for name in files if re.search(r'[<>:"\\|?*\x00-\x1f]|[. ]$', name)]  # not legal on Windows
    assert not {f"fedtune.executors.{name}" for name in OF_POOL} & set(seen["modules"])


def files_of(folder):
    """{name: content} of the files of a run, without its real times."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "timings.csv"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
