"""The run folder of a stranger: what is read of it runs no code that its settings name."""

import json
import shutil
import sys
import zlib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import fedtune
from fedtune import plugins
from fedtune.cli import main
from fedtune.errors import InputError, UnknownNameError

PROGRAM = """
from fedtune.client import Hyperparameter

HYPERPARAMETERS = {"rate": Hyperparameter(0.5, low=0.0), "steps": Hyperparameter(2, low=1, integer=True)}


def train(model, weights, examples, config, rng):
    return weights - config["rate"] / config["steps"] * 0.01 * weights
"""
DATA = """
from fedtune_datasets import digits


def make():
    return digits.load(num_clients=4)
"""
MODEL = """
from torch import nn


def make(spec):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""
SPACE = {"client": {"rate": {"uniform": [0.1, 1.0]}}, "server": {"learning_rate": {"uniform": [0.5, 1.5]}}}


def is_run():
    raise AssertionError("code that the settings name was run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose data, model and client program are files; every file now fails when it is imported."""
    folder = tmp_path_factory.mktemp("strangers")
    files = {"data.py": DATA, "model.py": MODEL, "program.py": PROGRAM}
    for name, text in files.items():
        (folder / name).write_text(text)
    finished = fedtune.compare(
        f"{folder / 'data.py'}:make",
        model={"name": f"{folder / 'model.py'}:make"},
        client={"name": str(folder / "program.py"), "rate": 0.25},
        space=SPACE,
        tuners=["manual", "fedex", "elimination", "asha", "pbt", "random+fedex"],
        tuner={"elimination": {"num_configs": 3, "rounds_per_halving": 1}, "random+fedex": {"form": "product"}},
        max_rounds=3,
        total_rounds=15,
        cohort_size=1,
        executor="serial",
        out=folder / "run",
    )
    for name in files:
        (folder / name).write_text("raise SystemExit('code that the settings name was run')")
    return finished.folder


@pytest.fixture(autouse=True)
def _no_code(monkeypatch):
    """Nothing that was imported before is found again, and no installed plug-in can be loaded."""
    plugins._module.cache_clear()
    monkeypatch.setattr(EntryPoint, "load", lambda entry: is_run())


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def command(monkeypatch, capsys, *arguments):
    """(exit code, output, error output) of a command."""
    monkeypatch.setattr(sys, "argv", ["fedtune", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capsys.readouterr()


def seal(path, lines):
    """Writes a journal whose checksums are right."""
    checksum, text = 0, ""
    for line in map(json.dumps, lines):
        checksum = zlib.crc32(line.encode(), checksum)
        text += f'{line[:-1]}, "check": "{checksum:08x}"}}\n'
    path.write_text(text)


def lines_of(path):
    """The journal's lines without their checksums."""
    return [json.loads(line.rpartition(', "check": ')[0] + "}") for line in path.read_text().splitlines()]


def test_a_replay_runs_no_code(run):
    studies = fedtune.replay(run)
    assert [study.tuner for study in studies] == ["manual", "fedex", "elimination", "asha", "pbt", "random+fedex"]
    assert all(study.finished for study in studies)


def test_a_run_is_read_without_code(run):
    assert len(fedtune.read_run(run).results) == 6


def test_the_run_of_an_earlier_version_is_rebuilt_without_code():
    assert all(study.finished for study in fedtune.replay(Path(__file__).parent / "run_of_format_3"))


@pytest.mark.parametrize("name", ["rate", "steps"])
def test_a_hyperparameter_that_was_changed_is_found(copy, name):
    """The settings fix `rate`, the program's default is all that fixes `steps`."""
    path = copy / "manual-seed0" / "journal.jsonl"
    lines = lines_of(path)
    asks = [line for line in lines if line["event"] == "ask"]
    asks[-1 if name == "steps" else 0]["pool"][0][0][name] = 3
    if name == "rate":
        for line in asks:
            line["pool"][0][0][name] = 3.0
    seal(path, lines)
    with pytest.raises(InputError, match=rf"does not fit the tuner: expected ask, .*pool\.0\.0\.{name} "):
        fedtune.replay(copy)


@pytest.mark.parametrize(
    "pool", [[], [[]], [[{}]], [[{"steps": 2}]], [[{"rate": "fast", "steps": 2}]], [[{"rate": [1.0], "steps": None}]]]
)
def test_a_pool_without_the_searched_hyperparameters_is_one_line(copy, pool):
    path = copy / "fedex-seed0" / "journal.jsonl"
    lines = lines_of(path)
    for line in lines:
        if line["event"] == "ask":
            line["pool"] = pool
    seal(path, lines)
    settings = copy / "settings.toml"
    settings.write_text(settings.read_text().replace("rate = 0.25\n", ""))
    with pytest.raises(InputError, match=r"^[^\n]*journal\.jsonl[^\n]*$"):
        fedtune.replay(copy)


def test_resume_compares_the_settings_before_it_runs_code(copy):
    path = copy / "settings.toml"
    path.write_text(path.read_text().replace("cohort_size = 1", "cohort_size = 2"))
    with pytest.raises(
        InputError,
        match=r"settings\.toml must have .* got cohort_size = 2; .* has cohort_size = 1$",
    ):
        fedtune.resume(copy)
    path.write_text('tuners = ["asha"]\n' + path.read_text().partition("]\n")[2])
    with pytest.raises(
        InputError,
        match=r"settings\.toml must have .* got cohort_size = 2; .* has cohort_size = 1$",
    ):
        fedtune.extend(copy, total_rounds=18)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("name", ["asha-seed0", "asha-seed0/journal.jsonl", "asha-seed0/checkpoints", "figures"])
def test_resume_writes_and_removes_nothing_behind_a_link(copy, tmp_path, name, repair):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "journal.jsonl").write_text("somebody's file, without a line end")
    path = copy / name
    path.rename(copy / "moved")
    path.symlink_to(elsewhere / "journal.jsonl" if path.suffix else elsewhere)
    with pytest.raises(InputError, match=rf"{name} must not be a link, got a link to .*elsewhere"):
        fedtune.resume(copy, repair=repair)
    assert [file.read_text() for file in elsewhere.iterdir()] == ["somebody's file, without a line end"]


def test_the_name_of_a_tuner_does_not_lead_out_of_the_folder(copy, tmp_path):
    victim = tmp_path / "other-seed0" / "journal.jsonl"
    victim.parent.mkdir()
    victim.write_text("no line end")
    path = copy / "settings.toml"
    path.write_text('tuners = ["../other"]\n' + path.read_text().partition("]\n")[2])
    for repair in (False, True):
        with pytest.raises(UnknownNameError, match=r"unknown tuner '\.\./other'"):
            fedtune.resume(copy, repair=repair)
    assert victim.read_text() == "no line end"


def test_resume_reads_the_first_line_before_it_runs_code(copy):
    for path in copy.glob("*/journal.jsonl"):
        path.write_bytes(b"\0" + path.read_bytes()[1:])
    with pytest.raises(InputError, match=r"journal\.jsonl, line 1, is damaged or was edited"):
        fedtune.resume(copy)


@pytest.mark.parametrize("name", ["stats", "check", "export"])
@pytest.mark.parametrize("what", ["", "settings.toml"])
def test_the_data_of_a_run_folder_is_not_made_by_code_that_its_settings_name(
    run, monkeypatch, capsys, tmp_path, name, what
):
    out = ["--out", tmp_path / "leaf"] if name == "export" else []
    code, _, error = command(monkeypatch, capsys, "data", name, run / what, *out)
    assert code == 2
    data = run.parent / "data.py"
    assert error == (
        f"fedtune: {run / 'settings.toml'} names {data}:make as its data set, whose code would run: read {data}, "
        "then add --trust\n"
    )


def test_code_that_is_trusted_is_run(run, monkeypatch, capsys):
    (run.parent / "data.py").write_text(
        DATA.replace("import digits", "import digits as plug_in").replace("digits.load", "plug_in.load")
    )
    try:
        code, output, error = command(monkeypatch, capsys, "data", "stats", run, "--trust")
    finally:
        (run.parent / "data.py").write_text("raise SystemExit('code that the settings name was run')")
    assert (code, error) == (0, "")
    assert "clients" in output


def test_the_data_of_a_run_folder_needs_neither_its_model_nor_its_program(copy, monkeypatch, capsys):
    """The statistics of a table, whose path a run folder names."""
    table = copy.parent / "users.csv"
    rows = [f"{user},{number},{number % 2}" for user in "ab" for number in range(20)]
    table.write_text("\n".join(["user,size,likes", *rows]))
    settings = copy / "settings.toml"
    text = settings.read_text()
    start = text.index("[data]")
    end = text.index("[", start + 1)
    settings.write_text(f'{text[:start]}[data]\nname = "{table}"\nclient = "user"\nlabel = "likes"\n\n{text[end:]}')
    code, output, error = command(monkeypatch, capsys, "data", "stats", copy)
    assert (code, error) == (0, "")
    assert "clients          2\nexamples        40\n" in output
