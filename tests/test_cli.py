import csv
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fedtune import cli
from fedtune.cli_options import ARGUMENT_HELP
from fedtune.errors import RunStopped
from fedtune.runs.comparison import Comparison

ROOT = Path(__file__).parent.parent


def fedtune(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "fedtune", *arguments], capture_output=True, text=True, timeout=300, cwd=cwd
    )


@pytest.fixture
def answer(monkeypatch, capsys):
    """What the command says in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedtune", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, *capsys.readouterr()

    return run


def test_help_needs_neither_torch_nor_flower():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fedtune import cli\n"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'flwr', 'pandas', 'numpy', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def commands(group, words=()):
    """Every command of the program by its words, such as `data stats`."""
    found = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, (*words, name))
        else:
            found[" ".join([*words, name])] = command
    return found


COMMANDS = commands(get_command(cli.app))
PAGES = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def examples(command):
    """The lines of a command's help that can be typed."""
    return [line.strip() for line in command.help.splitlines() if line.strip().startswith("fedtune ")]


def test_the_program_has_these_commands():
    """So that the tests of all commands, below, can't pass because they found none."""
    assert {"train", "tune", "compare", "resume", "extend", "replay", "list", "data stats"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_help_text_and_an_example_that_it_understands(name):
    command = COMMANDS[name]
    assert command.help.partition("\n\nExample:\n")[0].endswith(".")
    (example,) = examples(command)
    words = shlex.split(example.removeprefix("fedtune "))
    assert words[: len(name.split())] == name.split()
    # Parsing checks the arguments, the options and their types; the command itself is not called.
    command.make_context(name, words[len(name.split()) :])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_and_option_is_explained_in_the_shown_help(name):
    shown = CliRunner().invoke(cli.app, [*name.split(), "--help"], env={"COLUMNS": "300"}).stdout
    parameters = COMMANDS[name].params
    for parameter in parameters:
        assert parameter.help, parameter.name
        assert parameter.help in shown
    assert examples(COMMANDS[name])[0] in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_mentioned_in_the_docs(name):
    assert re.search(rf"\bfedtune {name}\b", PAGES)


def test_no_help_is_written_for_an_argument_that_no_command_has():
    arguments = {p.name for command in COMMANDS.values() for p in command.params if p.param_type_name == "argument"}
    assert arguments == set(ARGUMENT_HELP)


def test_the_version_is_that_of_the_installed_distribution():
    shown = CliRunner().invoke(cli.app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"fedtune {importlib.metadata.version('fedtune')}\n")


@pytest.mark.parametrize("old", [["tune", "--extend", "x"], ["tune", "--extend=x"]])
def test_the_first_spelling_of_extend_is_understood(answer, monkeypatch, old):
    asked = []
    monkeypatch.setattr("fedtune.extend", lambda run, **options: asked.append((run, options["num_configs"])))
    monkeypatch.setattr(cli, "_show", lambda run: None)
    assert answer(*old, "--num-configs", 4)[0] == 0
    assert answer("extend", "x", "--num-configs", 4)[0] == 0
    assert asked == [(Path("x"), 4)] * 2


def test_list_names_what_is_installed():
    shown = CliRunner().invoke(cli.app, ["list"]).stdout
    for name in ("digits", "mnist", "cnn", "logistic", "mlp", "local_sgd", "asha+fedex", "manual"):
        assert name in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "digits", "--tuners", "asha,ashe"], "unknown tuner 'ashe'; known: "),
        (["compare", "digitz"], "unknown data set 'digitz'; known: "),
        (["train", "digits", "--set", "model.name=resnet"], "unknown model 'resnet'; known: "),
        (["train", "digits", "--set", "client.lr=1"], "unknown client hyperparameter 'client.lr'; known: "),
        (["train", "digits", "--set", "client.batch_size=0"], "client.batch_size must be a whole number >= 1, got 0"),
        (
            ["train", "digits", "--set", "cohort_size=31"],
            "cohort_size must be at most the number of clients, 30, got 31",
        ),
        (
            ["tune", "digits", "--max-rounds", "27", "--total-rounds", "26"],
            "total_rounds must be at least max_rounds (27)",
        ),
        (["train", "digits", "--rounds", "0"], "max_rounds must be greater than or equal to 1, got 0"),
        (["train", "digits", "--set", "rounds=3"], "unknown setting 'rounds'; known: "),
        (["train", "digits", "--set", "rounds"], "--set must be key=value"),
        (["train", "digits", "--set", "max_round=3"], "; did you mean max_rounds?"),
        (["train", "digits", "--set", "client.learning_rat=1"], "; did you mean client.learning_rate?"),
        (["train", ""], "a data set must have a name, got ''"),
        (
            ["train", "digits", "--set", "data.name=mnist"],
            "data.name must be 'digits', the data set that is asked for, got 'mnist'",
        ),
        (["train", "digits", "--set", "data.seed=-1"], "seed must be a whole number >= 0, got -1"),
        (
            ["train", "digits", "--set", f"client.batch_size={'9' * 20}"],
            f"client.batch_size must be at most 9.0071993e+15, got {'9' * 20}",
        ),
        (
            ["train", "digits", "--set", "client.learning_rate=1e300"],
            "client.learning_rate must be at most 3.4e+38, got 1e+300",
        ),
        (
            ["train", "digits", "--set", "server.learning_rate=1e300"],
            "server.learning_rate must be at most 3.4e+38, got 1e+300",
        ),
        (["train", "digits", "--executor", "ray"], "executor must be 'auto', 'serial', 'pool' or 'batched', got 'ray'"),
        (["train", "digits", "--rounds", "2", "--out", "/proc/run"], "--out must be a folder that can be made"),
        (["train", "digits", "--set", "data=3"], "data must be a table, got 3"),
        (["train", "digits", "--set", "devices=3"], "devices must be a table, got 3"),
        (["train", "missing.toml"], "settings file missing.toml cannot be read"),
        (["train", "digits", "--set", "client=3"], "client must be a table, got 3"),
        (["train", "digits", "--set", "client.name=3"], "client must have a name that is text, if it has one"),
        (["train", "digits", "--seed", "9" * 23], f"seed must be less than {2**62}, got {'9' * 23}"),
        (["train", "digits", "--seeds", "9" * 11], "seeds must be less than or equal to 10000, got 99999999999"),
        (["train", "digits", "--workers", "100000"], "workers must be less than or equal to 1024, got 100000"),
        (
            ["train", "digits", "--model", "mlp", "--set", "model.hidden=[100000000000]"],
            "the model 'mlp' can't be made with these settings",
        ),
        (["data", "stats", "digits", "--figure", "x.txt"], "a figure must be a file that ends in .png, got x.txt"),
        (["data", "prepare", "mnists"], "unknown data set 'mnists'; known: "),
        (["data", "stats", "digits", "--set", "data.partition=pathological"], "unknown partition 'pathological'"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing(answer, monkeypatch, arguments, message, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, shown, error = answer(*arguments)
    assert (code, shown) == (2, "")
    assert error.startswith("fedtune: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_settings_file_may_begin_with_a_byte_order_mark(answer, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('max_rounds = 0\ndata = {name = "digits"}', encoding="utf-8-sig")
    code, shown, error = answer("compare", path)
    assert (code, shown) == (2, "")
    assert "max_rounds must be greater than or equal to 1, got 0" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('data = "digits"', "data must be a table, got 'digits'"),
        ('client = "local_sgd"\ndata = {name = "digits"}', "client must be a table, got 'local_sgd'"),
        ('client = {name = 3}\ndata = {name = "digits"}', "client must have a name that is text, if it has one"),
    ],
)
def test_a_settings_file_with_something_else_for_a_table_is_one_line(answer, tmp_path, text, message):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    code, shown, error = answer("compare", path, "--out", tmp_path / "run")
    assert (code, shown, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"fedtune: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tuner", "options", "message"),
    [
        (
            tuner,
            {"min_rounds": 2},
            "max_rounds must be min_rounds (2) times a power of reduction_factor (3), got 27; 18 and 54 are allowed",
        )
        for tuner in ("sha", "asha", "hyperband", "async_hyperband", "bohb")
    ]
    + [
        *(
            (tuner, {"num_configs": 26}, f"num_configs must be a whole number >= {3**3}, got 26")
            for tuner in ("sha", "asha")
        ),
        (
            "async_hyperband",
            {"num_configs": 37},
            "num_configs must be >= 38 for each of 2 brackets to train one to max_rounds, got 37; "
            "a larger min_rounds needs fewer",
        ),
    ],
)
def test_rungs_that_do_not_lead_to_the_top_are_found_before_the_run(answer, tmp_path, tuner, options, message):
    options = {"reduction_factor": 3, **options}
    given = [text for name, value in options.items() for text in ("--set", f"tuner.{tuner}.{name}={value}")]
    budget = ["--max-rounds", 27, "--total-rounds", 135]
    told = answer("tune", "digits", "--tuner", tuner, *budget, *given, "--out", tmp_path / "run")
    assert told == (2, "", f"fedtune: tuner {tuner}: {message}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_a_signal_stops_says_how_to_resume(answer, tmp_path, monkeypatch, number):
    def stopped(*_):
        os.kill(os.getpid(), number)
        time.sleep(60)

    before = signal.getsignal(number)
    monkeypatch.setattr(Comparison, "run", stopped)
    monkeypatch.chdir(tmp_path)
    code, _, error = answer("train", "digits", "--rounds", 1, "--executor", "serial")
    (folder,) = (tmp_path / "runs").iterdir()  # a name that nobody gave
    assert (code, error.strip()) == (130, f"stopped; to resume: fedtune resume runs/{folder.name}")
    code, _, error = answer("resume", folder, "--executor", "serial")
    assert (code, error.strip()) == (130, f"stopped; to resume: fedtune resume {folder}")
    assert signal.getsignal(number) is before


def test_a_run_that_something_else_stops_is_one_line_with_exit_code_1(answer, tmp_path, monkeypatch):
    def stopped(*_):
        raise RunStopped("a worker was killed; to resume: fedtune resume run")

    monkeypatch.setattr(Comparison, "run", stopped)
    told = answer("train", "digits", "--rounds", 1, "--executor", "serial", "--out", tmp_path / "run")
    assert told == (1, "", "fedtune: a worker was killed; to resume: fedtune resume run\n")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    budget = ["--max-rounds", "3", "--total-rounds", "9"]
    done = fedtune("tune", "digits", "--tuner", "asha", *budget, "--executor", "serial", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_replay_says_what_it_rebuilt(answer, searched):
    tells = [line for line in (searched / "asha-seed0" / "journal.jsonl").read_text().splitlines() if '"tell"' in line]
    (row,) = csv.DictReader((searched / "results.csv").read_text().splitlines())
    code, shown, errors = answer("replay", searched)
    assert (code, errors) == (0, "")
    assert shown == (
        f"asha-seed0: {len(tells)} jobs, {row['trials']} trials, {row['rounds']} rounds, "
        f"incumbent {row['trial']} at {float(row['validation_error']):.4f}: as journalled\n"
    )


def test_a_run_folder_of_journal_format_3_is_replayed(answer):
    folder = Path(__file__).parent / "run_of_format_3"
    code, shown, errors = answer("replay", folder)
    assert (code, errors) == (0, "")
    rows = csv.DictReader((folder / "results.csv").read_text().splitlines())
    for line, row in zip(shown.splitlines(), rows, strict=True):
        assert line.startswith(f"{row['tuner']}-seed1: ")
        assert f"{row['trials']} trials, {row['rounds']} rounds, incumbent {row['trial']} at " in line
        assert line.endswith(f"{float(row['validation_error']):.4f}: as journalled")


@pytest.mark.parametrize("command", ["resume", "replay"])
def test_a_journal_that_was_edited_is_one_line(answer, searched, tmp_path, command):
    folder = shutil.copytree(searched, tmp_path / "run")
    path = folder / "asha-seed0" / "journal.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"score": 0.', '"score": 1.', 1))
    number = text[: text.index('"score": 0.')].count("\n") + 1
    code, shown, errors = answer(command, folder)
    assert (code, shown) == (2, "")
    damaged = f"fedtune: {path}, line {number}, is damaged or was edited: its checksum does not fit; "
    assert errors == f"{damaged}to go on from the line before it: fedtune resume {folder} --repair\n"


@pytest.mark.parametrize("command", ["resume", "replay"])
def test_a_run_of_another_version_is_one_line(answer, searched, tmp_path, command):
    folder = shutil.copytree(searched, tmp_path / "run")
    path = folder / "asha-seed0" / "journal.jsonl"
    line = json.dumps({"event": "study", "format": 2, "tuner": "asha"})
    path.write_text(f'{line[:-1]}, "check": "{zlib.crc32(line.encode()):08x}"}}\n')
    code, shown, errors = answer(command, folder)
    assert (code, shown) == (2, "")
    said = f"{path}, line 1, must have format 3 or 4, got 2: another version of fedtune wrote it"
    assert errors == f"fedtune: {said}\n"


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ("nobody", "a lost client must be the id of a client of digits, got 'nobody'"),
        ("3", "a client can be lost only in a run that is not finished, got "),
    ],
)
def test_a_client_that_cannot_be_lost_is_one_line(answer, searched, client, message):
    settings = (searched / "settings.toml").read_text()
    code, shown, errors = answer("resume", searched, "--lose-client", client)
    assert (code, shown, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"fedtune: {message}")
    assert (searched / "settings.toml").read_text() == settings


@pytest.mark.parametrize("command", ["resume", "replay"])
def test_a_folder_that_is_no_run_is_one_line(answer, tmp_path, command):
    code, shown, errors = answer(command, tmp_path)
    assert (code, shown) == (2, "")
    assert errors.startswith("fedtune: ")
    assert str(tmp_path) in errors
    assert "settings.toml" in errors
    assert errors.count("\n") == 1


def test_train_shows_a_table_and_writes_a_run(tmp_path):
    done = fedtune("train", "digits", "--rounds", "3", "--executor", "serial", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "manual" in done.stdout
    assert "run folder: run" in done.stdout
    assert (tmp_path / "run" / "results.csv").is_file()
    again = fedtune("train", "digits", "--rounds", "3", "--out", "run", cwd=tmp_path)
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (2, "", 1)
    assert "--out run exists; choose another, or give --force to overwrite it" in again.stderr


@pytest.mark.parametrize("width", [40, 120])
def test_a_narrow_terminal_hides_no_column(answer, searched, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, shown, _ = answer("resume", searched, "--executor", "serial")
    assert code == 0
    headings, row = shown.splitlines()[1:3], next(line for line in shown.splitlines() if line.startswith("asha"))
    assert " ".join(headings).split()[:2] == ["personalised", "test"]
    assert "…" not in shown
    assert len(row.split()) == 7


def test_a_study_whose_every_trial_failed_has_exit_code_1(answer, tmp_path):
    budget = ["--max-rounds", "2", "--total-rounds", "2", "--executor", "serial", "--out", tmp_path / "run"]
    code, shown, error = answer(
        *("compare", "digits", "--tuners", "manual,fedex", *budget, "--set", "client.learning_rate=3e38"),
        *("--set", "space.client.learning_rate={log_uniform=[1e-4,1.0]}"),  # what fedex draws is in this range
    )
    assert code == 1
    assert "run folder:" in shown
    assert error.splitlines()[-1] == "fedtune: manual, seed 0: every trial failed: no client's update could be used"
    assert "fedex, seed 0: every" not in error
    assert answer("resume", tmp_path / "run")[0] == 1


def test_data_stats_draws_a_figure(tmp_path):
    figure = tmp_path / "stats.png"
    shown = CliRunner().invoke(cli.app, ["data", "stats", "digits", "--figure", str(figure)])
    assert shown.exit_code == 0
    assert "1797" in shown.stdout.replace(",", "")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_characters_that_the_encoding_of_the_output_lacks_are_escaped(monkeypatch):
    """As in a file on Windows, and not as in a terminal."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    monkeypatch.setattr(sys, "argv", ["fedtune", "data", "stats", "digits"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue().decode("cp1252")
    assert done.value.code == 0
    assert r"\u2588" in shown  # a bar of the histogram


def test_data_prepare_says_when_there_is_nothing_to_do():
    assert "digits is ready" in CliRunner().invoke(cli.app, ["data", "prepare", "digits"]).stdout
