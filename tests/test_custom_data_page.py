"""docs/custom-data.md: every file on it is written, and every command typed, in one folder, as a reader would."""

import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedtune
from fedtune.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "custom-data.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {text.split("\n")[0].removeprefix("# "): text for language, text in BLOCKS if language}
COMMANDS = [line for language, text in BLOCKS if not language for line in text.splitlines()]


def install(package, site):
    """What pip leaves of a package with one module: the module, and its entry points beside its name."""
    project = tomllib.loads((package / "pyproject.toml").read_text())
    (module,) = project["tool"]["setuptools"]["py-modules"]
    name, version = project["project"]["name"], project["project"]["version"]
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text((package / f"{module}.py").read_text())
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["project"]["entry-points"].items()
    lines = [line for group, names in groups for line in [f"[{group}]", *(f"{a} = {b}" for a, b in names.items())]]
    (info / "entry_points.txt").write_text("\n".join(lines))


def type_in(line, monkeypatch, extra):
    """Runs the command in this process; `extra` goes behind a command that trains."""
    command, *arguments = shlex.split(line)
    if command == "fedtune":
        trains = arguments[0] in ("train", "compare")
        done = CliRunner().invoke(app, [*arguments, *(extra if trains else [])])
        assert done.exit_code == 0, (line, done.output, done.exception)
        assert "warning:" not in done.output, (line, done.output)
    elif command == "python":
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    else:
        assert (command, arguments[0]) == ("pip", "install")
        install(Path(arguments[1]), Path("site"))
        monkeypatch.syspath_prepend(str(Path("site").resolve()))


def test_each_example_has_ten_lines_at_most():
    assert len(FILES) > 10
    for name, text in FILES.items():
        assert sum(map(bool, text.splitlines()[1:])) <= 10, name
        assert max(map(len, text.splitlines())) <= 120, name


def test_each_example_is_used():
    for name in FILES:
        used = name if "/" not in name else name.partition("/")[0]
        assert any(used in text for text in [*COMMANDS, *(FILES[other] for other in FILES if other != name)]), name


def type_all(commands, folder, monkeypatch, extra=()):
    monkeypatch.chdir(folder)
    for name, text in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    for number, line in enumerate(commands):
        type_in(line, monkeypatch, ["--out", f"run{number}", *extra])


def test_the_page_works(tmp_path, monkeypatch):
    """With as little training as there can be."""
    monkeypatch.setattr(fedtune, "_draw", fedtune.read_run)  # no figures of runs
    commands = [re.sub(r"rounds \d+", "rounds 3", line) for line in COMMANDS]
    extra = ["--executor", "serial", "--set", "cohort_size=1", "--set", "evaluation.clients=1"]
    type_all(commands, tmp_path, monkeypatch, extra)


@pytest.mark.slow
def test_the_page_works_as_it_stands(tmp_path, monkeypatch):
    type_all(COMMANDS, tmp_path, monkeypatch)
