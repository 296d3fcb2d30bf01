import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fedtune import cli


def fedtune(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "fedtune", *arguments], capture_output=True, text=True, timeout=300, cwd=cwd
    )


def test_help_needs_neither_torch_nor_flower():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fedtune import cli\n"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'flwr', 'pandas', 'numpy', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


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
        (["train", "digits", "--executor", "ray"], "executor must be 'auto', 'serial', 'pool' or 'batched', got 'ray'"),
        (["train", "digits", "--rounds", "2", "--out", "/proc/run"], "--out must be a folder that can be made"),
        (["train", "digits", "--set", "data=3"], "data must be a table, got 3"),
        (["train", "missing.toml"], "settings file missing.toml cannot be read"),
        (["data", "prepare", "mnists"], "unknown data set 'mnists'; known: "),
        (["data", "stats", "digits", "--set", "data.partition=pathological"], "unknown partition 'pathological'"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing(arguments, message, tmp_path):
    done = fedtune(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fedtune: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_train_shows_a_table_and_writes_a_run(tmp_path):
    done = fedtune("train", "digits", "--rounds", "3", "--executor", "serial", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "manual" in done.stdout
    assert "run folder: run" in done.stdout
    assert (tmp_path / "run" / "results.csv").is_file()
    again = fedtune("train", "digits", "--rounds", "3", "--out", "run", cwd=tmp_path)
    assert again.returncode == 2
    assert "--out run exists; choose another, or give --force to overwrite it" in again.stderr


def test_data_stats_draws_a_figure(tmp_path):
    figure = tmp_path / "stats.png"
    shown = CliRunner().invoke(cli.app, ["data", "stats", "digits", "--figure", str(figure)])
    assert shown.exit_code == 0
    assert "1797" in shown.stdout.replace(",", "")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_data_prepare_says_when_there_is_nothing_to_do():
    assert "digits is ready" in CliRunner().invoke(cli.app, ["data", "prepare", "digits"]).stdout
