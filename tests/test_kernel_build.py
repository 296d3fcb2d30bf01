"""setup.py: the kernel's library in wheels and in the source folder, and the install without it."""

import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools.errors import CompileError

from fedtune_clients.kernel_library import LIBRARY, load_library

ROOT = Path(__file__).parent.parent
(ZIG,) = [
    requirement
    for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    if requirement.startswith("ziglang")
]
FUNCTIONS = ("kernel_built_from", "kernel_memory", "kernel_train", "kernel_measure")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]

# The package ziglang for tests: it copies its arguments to the library, or fails.
FAKE_ZIG = """
import pathlib, sys
if {fails}:
    sys.exit("kernel.c:1:1: error: no such thing")
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text(" ".join(sys.argv[1:]))
"""


def load_setup():
    spec = importlib.util.spec_from_file_location("kernel_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = load_setup()
HERE = SETUP.this_platform()
needs_platform = pytest.mark.skipif(HERE not in SETUP.PLATFORMS, reason=f"zig builds no kernel for {HERE} yet")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build needs."""
    folder = tmp_path / "checkout"
    without = shutil.ignore_patterns("__pycache__", "libkernel*")
    for name in ("fedtune", "clients", "datasets"):
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def fake_zig(folder, fails=False):
    """A folder to import the package ziglang from."""
    (folder / "zig" / "ziglang").mkdir(parents=True)
    (folder / "zig" / "ziglang" / "__main__.py").write_text(FAKE_ZIG.format(fails=fails))
    (folder / "zig" / "ziglang-9.9.dist-info").mkdir()
    (folder / "zig" / "ziglang-9.9.dist-info" / "METADATA").write_text("Name: ziglang\nVersion: 9.9\n")
    return folder / "zig"


def build(checkout, zig, *arguments, mode="try", **environment):
    command = [sys.executable, "setup.py", "--quiet", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(zig), "FEDTUNE_KERNEL": mode} | environment
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def wheel(checkout, zig, *arguments, **options):
    """The wheel, or None if the build fails, and what the build says."""
    done = build(checkout, zig, "bdist_wheel", "--dist-dir", checkout / "wheels", *arguments, **options)
    wheels = list((checkout / "wheels").glob("*.whl"))
    assert (done.returncode == 0) == (len(wheels) == 1), done.stderr
    return wheels[0] if wheels else None, done.stderr


def libraries(path):
    return [name for name in zipfile.ZipFile(path).namelist() if "libkernel" in name]


@needs_platform
def test_a_wheel_has_the_kernel_and_its_source_and_suits_every_python_of_its_platform(checkout, tmp_path):
    path, _ = wheel(checkout, fake_zig(tmp_path))
    assert path.name.endswith(f"-py3-none-{HERE}.whl")
    name = f"fedtune_clients/{LIBRARY.name}"
    assert libraries(path) == [name]
    with zipfile.ZipFile(path) as archive:
        source = (ROOT / SETUP.SOURCE).read_bytes()
        assert archive.read("fedtune_clients/kernel.c") == source
        to = SETUP.PLATFORMS[HERE]
        flags = " ".join([*SETUP.FLAGS, *to.flags])
        digest = hashlib.sha256(source).hexdigest()[:16]
        built_from = f'-DBUILT_FROM="{digest} zig 9.9 {to.target} {flags}"'
        expected = f"cc -target {to.target} {flags} kernel.c -o {to.library} {built_from} -lm"
        assert archive.read(name).decode() == expected


@needs_platform
def test_a_kernel_that_cannot_be_built_is_left_out(checkout, tmp_path):
    """And none of an earlier build takes its place."""
    zig = fake_zig(tmp_path)
    assert build(checkout, zig, "build").returncode == 0
    (zig / "ziglang" / "__main__.py").write_text(FAKE_ZIG.format(fails=True))
    path, said = wheel(checkout, zig)
    assert path.name.endswith("-py3-none-any.whl")
    assert libraries(path) == []
    assert "zig could not compile" in said
    assert "no such thing" in said


@needs_platform
@pytest.mark.parametrize("fails", [True, False])
def test_skip_does_not_try_and_require_fails(checkout, tmp_path, fails):
    path, said = wheel(checkout, fake_zig(tmp_path, fails), mode="require" if fails else "skip")
    if fails:
        assert path is None
        assert "no such thing" in said
    else:
        assert path.name.endswith("-py3-none-any.whl")
        assert libraries(path) == []


@needs_platform
def test_an_editable_install_has_the_kernel_in_the_source_folder(checkout, tmp_path):
    assert build(checkout, fake_zig(tmp_path), "build_ext", "--inplace", mode="require").returncode == 0
    assert (checkout / SETUP.SOURCE).with_name(LIBRARY.name).exists()


def test_a_mode_that_is_none(checkout):
    done = build(checkout, "", "--version", mode="maybe")
    assert (done.returncode, done.stderr) == (1, "FEDTUNE_KERNEL must be one of try, require, skip, got maybe\n")


def test_what_can_stand_in_the_way(monkeypatch, tmp_path):
    with pytest.raises(CompileError, match=r"^the platform must be one of .*, got Plan 9$"):
        SETUP.build_library("Plan 9", tmp_path / "library")

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(CompileError, match="needs the package ziglang"):
        SETUP.build_library("win_amd64", tmp_path / "library")


def test_make_wheels_builds_for_every_platform():
    (listed,) = re.findall(r"^PLATFORMS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed.split() == list(SETUP.PLATFORMS)


def test_one_version_of_zig_is_pinned():
    assert re.fullmatch(r"ziglang==[\d.]+", ZIG)


@pytest.mark.skipif(isinstance(load_library(), str), reason=str(load_library()))
def test_the_kernel_of_this_checkout_was_built_from_its_source():
    digest = hashlib.sha256((ROOT / SETUP.SOURCE).read_bytes()).hexdigest()
    assert load_library().built_from.startswith(f"{digest[:16]} ")


@pytest.fixture(scope="module")
def zig(tmp_path_factory):
    """A folder to import the pinned ziglang from."""
    folder = tmp_path_factory.mktemp("zig")
    subprocess.run([*PIP, "install", "--no-deps", "--no-compile", "--target", folder, ZIG], check=True)
    return folder


def kind(library):
    """The format and the processor of a shared library, as its first bytes say."""
    if library.startswith(b"\x7fELF"):
        return ("ELF", *struct.unpack_from("<HH", library, 16))  # ET_DYN is 3; EM_X86_64 is 62, EM_AARCH64 183
    if library.startswith(b"MZ"):
        (header,) = struct.unpack_from("<I", library, 0x3C)
        assert library[header : header + 4] == b"PE\0\0"
        machine, flags = struct.unpack_from("<H16xH", library, header + 4)
        return "PE", machine, flags & 0x2000  # a DLL; 0x8664 is x86-64
    return ("Mach-O", *struct.unpack_from("<II4xI", library))  # of 64 bits; ARM64 is 0x100000C; MH_DYLIB is 6


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("manylinux_2_28_aarch64", ("ELF", 3, 183)),
        ("macosx_11_0_arm64", ("Mach-O", 0xFEEDFACF, 0x100000C, 6)),
        ("win_amd64", ("PE", 0x8664, 0x2000)),
    ],
)
def test_wheels_are_built_for_other_platforms(checkout, zig, tag, expected):
    path, said = wheel(checkout, zig, "--plat-name", tag, mode="require")
    assert path, said
    assert path.name.endswith(f"-py3-none-{tag}.whl")
    (name,) = libraries(path)
    library = zipfile.ZipFile(path).read(name)
    assert kind(library) == expected
    for function in FUNCTIONS:
        assert re.search(rb"\b_?%b\0" % function.encode(), library)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(HERE != "manylinux_2_28_x86_64", reason="needs Linux on x86-64")
def test_a_wheel_of_this_platform_works_and_has_the_same_bytes_wherever_it_is_built(checkout, zig, tmp_path):
    path, said = wheel(checkout, zig, mode="require", HOME="/nowhere", CC="/nowhere/cc")
    assert path, said
    # Outside of the checkout the kernel is the wheel's, and it loads.
    site = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--no-compile", "--target", site, path], check=True)
    code = "from fedtune_clients import kernel_library as k; print(k.LIBRARY); print(k.load_library().built_from)"
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    installed, built_from = done.stdout.splitlines()
    assert Path(installed).is_relative_to(site), done.stderr
    # It needs no newer glibc than its tag says, and knows no folder of this machine.
    library = Path(installed).read_bytes()
    assert kind(library) == ("ELF", 3, 62)
    assert max(tuple(map(int, found)) for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)) <= (2, 28)
    assert str(tmp_path).encode() not in library
    # The checkout's own was built in another folder, with another home.
    own = load_library()
    if not isinstance(own, str) and own.built_from == built_from:
        assert library == LIBRARY.read_bytes()
