"""The build of the compiled kernel. All else about the package stands in pyproject.toml.

pip calls this file when it makes a wheel or an editable install. The kernel is compiled by zig, a C compiler that the
build requirement `ziglang` brings along. It also builds for platforms other than its own:

    pip wheel . --no-deps --config-settings=--build-option=--plat-name=win_amd64

The environment variable FEDTUNE_KERNEL says what happens if the kernel can't be built. With `try`, the default, the
package is installed without it, and clients train in torch. With `require` the install fails. With `skip` the kernel is
not built at all.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE = Path("clients/fedtune_clients/kernel.c")
MODES = ("try", "require", "skip")
FLAGS = (
    "-std=c11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-s",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
)


class Platform(NamedTuple):
    """What a library is built for."""

    system: str  # as Python names it
    machine: str
    library: str  # the name of the file
    target: str  # as zig names it
    flags: tuple[str, ...] = ()


# By the tag of their wheels. x86_64_v3 means processors with AVX2.
PLATFORMS = {
    "manylinux_2_28_x86_64": Platform("Linux", "x86_64", "libkernel.so", "x86_64-linux-gnu.2.28", ("-mcpu=x86_64_v3",)),
    "manylinux_2_28_aarch64": Platform("Linux", "aarch64", "libkernel.so", "aarch64-linux-gnu.2.28"),
    "macosx_11_0_arm64": Platform("Darwin", "arm64", "libkernel.dylib", "aarch64-macos.11.0"),
    # Without Windows' C runtime, which zig would take a minute to build: the kernel needs little, and zig has it.
    "win_amd64": Platform("Windows", "AMD64", "libkernel.dll", "x86_64-windows-gnu", ("-mcpu=x86_64_v3", "-nostdlib")),
}


def build_library(tag: str, path: Path) -> None:
    """Builds the library for the platform of a tag. Raises CompileError if it can't be built.

    The same source, zig and flags give the same bytes, since zig sees no path and no cache of this machine.
    """
    if tag not in PLATFORMS:
        raise CompileError(f"the platform must be one of {', '.join(PLATFORMS)}, got {tag}")
    to = PLATFORMS[tag]
    try:
        zig = importlib.metadata.version("ziglang")
    except ModuleNotFoundError:
        raise CompileError("the build needs the package ziglang, and it is not installed") from None
    flags = [*FLAGS, *to.flags]
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built_from = " ".join([digest, "zig", zig, to.target, *flags])
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SOURCE, folder)
        command = [sys.executable, "-m", "ziglang", "cc", "-target", to.target, *flags, SOURCE.name, "-o", to.library]
        # Without a C runtime zig does not look for its headers by itself.
        rest = ["-isystem", windows_headers()] if to.system == "Windows" else ["-lm"]
        done = subprocess.run(
            [*command, f'-DBUILT_FROM="{built_from}"', *rest],
            cwd=folder,
            env=os.environ | {f"ZIG_{cache}_CACHE_DIR": os.path.join(folder, cache) for cache in ("GLOBAL", "LOCAL")},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise CompileError(f"zig could not compile {SOURCE}:\n{done.stderr}")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(folder, to.library), path)


def windows_headers() -> str:
    """The folder of the C headers for Windows that zig brings along."""
    spec = importlib.util.find_spec("ziglang")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "lib" / "libc" / "include" / "any-windows-any")


def this_platform() -> str:
    """The tag of this machine's platform, or its name if it has none."""
    here = (platform.system(), platform.machine())
    tags = {(to.system, to.machine): tag for tag, to in PLATFORMS.items()}
    return tags.get(here, " ".join(here))


class BuildKernel(build_ext):
    """Builds the kernel in place of an extension module: so setuptools puts it where it puts those."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's path below the folder of all packages. It is no module, so it has no suffix of Python's."""
        to = PLATFORMS.get(self.tag())
        *packages, name = fullname.split(".")
        return os.path.join(*packages, to.library if to else name)

    def build_extension(self, ext: Extension) -> None:
        """Builds the library. No wheel gets that of an earlier build, or of another platform."""
        path = Path(self.get_ext_fullpath(ext.name))
        for earlier in path.parent.glob("libkernel*"):
            earlier.unlink()
        build_library(self.tag(), path)

    def tag(self) -> str:
        """The tag of the platform that is built for: `--plat-name`, or this machine's."""
        wheel = self.get_finalized_command("bdist_wheel")
        return wheel.plat_name if wheel.plat_name_supplied else this_platform()


class KernelWheel(bdist_wheel):
    """A wheel for every Python, since the kernel uses nothing of Python: py3-none and the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag; without a kernel the wheel is for any platform."""
        build = self.get_finalized_command("build_ext")
        built = any(os.path.exists(path) for path in build.get_outputs())
        return "py3", "none", build.tag() if built else "any"


def main() -> None:
    """Calls setuptools."""
    mode = os.environ.get("FEDTUNE_KERNEL", "try")
    if mode not in MODES:
        sys.exit(f"FEDTUNE_KERNEL must be one of {', '.join(MODES)}, got {mode}")
    kernel = Extension("fedtune_clients.libkernel", [SOURCE.as_posix()], optional=mode == "try")
    setup(
        ext_modules=[] if mode == "skip" else [kernel],
        cmdclass={"build_ext": BuildKernel, "bdist_wheel": KernelWheel},
    )


if __name__ == "__main__":
    main()
