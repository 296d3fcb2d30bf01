"""Text from outside, wherever it is printed, can't steer the terminal."""

import io
import json
import sys

import pandas as pd
import pytest
from rich.console import Console

from fedtune.cli import main
from fedtune.data.problems import Problem
from fedtune.printable import printable
from fedtune.report.live import LiveProgress
from fedtune.report.tables import problem_lines

EVIL = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202egnp\r\n\udc80"
SHOWN = r"\x1b[2J\x1b]0;owned\x07 \x9b31m \u202egnp\r\n\udc80"


def test_control_characters_are_shown_as_their_escapes():
    assert printable(EVIL) == SHOWN
    assert printable("learning rate é 学 θ × 10 %") == "learning rate é 学 θ × 10 %"


def command(monkeypatch, capsys, *arguments):
    """(exit code, output, error output) of a command."""
    monkeypatch.setattr(sys, "argv", ["fedtune", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capsys.readouterr()


def steering(text):
    """The characters of a text that steer a terminal."""
    return {character for character in text if not character.isprintable()} - {"\n"}


def test_the_reason_of_a_failed_client(tmp_path, monkeypatch, capsys):
    program = tmp_path / "program.py"
    program.write_text(
        "from fedtune_clients.local_sgd import HYPERPARAMETERS\n"
        "def train(model, weights, examples, config, rng):\n"
        "    if rng.random() < 0.5:\n"
        f"        raise ValueError({EVIL[:-1]!r})\n"
        "    return weights\n"
    )
    options = ["--rounds", "3", "--executor", "serial", "--set", f"client.name={program}", "--out", tmp_path / "run"]
    _, _, error = command(monkeypatch, capsys, "train", "digits", *options)
    assert r"a client failed: " in error
    assert r"\x1b[2J\x1b]0;owned\x07 \x9b31m \u202egnp" in error
    assert steering(error) == set()


@pytest.mark.parametrize("terminal", [False, True])
def test_every_line_of_the_live_view(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    with LiveProgress(console) as progress:
        progress({"event": "plan", "studies": [{"tuner": EVIL, "seed": 0, "total_rounds": 3}]})
        progress({"event": "warning", "message": EVIL})
        progress({"event": "executor", "message": EVIL})
        progress({"event": "lost", "tuner": EVIL, "seed": 0, "reasons": [EVIL]})
        progress._current = progress._study({"tuner": EVIL, "seed": 0})
        progress({"event": "study_end", "tuner": EVIL, "seed": 0})
    written = console.file.getvalue()
    assert written.count(SHOWN) >= 4
    for part in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e", "\udc80"):
        assert part not in written


def test_the_problems_of_a_data_set(tmp_path, monkeypatch, capsys):
    assert list(problem_lines([Problem(EVIL, "kind")], None)) == [f"error: {SHOWN}"]
    content = {"users": ["a"], "num_samples": [EVIL], "user_data": {"a": {"x": [[0.0]] * 20, "y": [0, 1] * 10}}}
    (tmp_path / "all_data").mkdir()
    (tmp_path / "all_data" / "all.json").write_text(json.dumps(content))
    code, output, error = command(monkeypatch, capsys, "data", "check", f"{tmp_path}/")
    assert (code, error) == (1, "")
    assert SHOWN in output
    assert steering(output) == set()


def test_an_error_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "users.csv"
    pd.DataFrame({f"{EVIL[:-3]}": [1], "b": [2]}).to_csv(path, index=False)
    options = ["--set", "data.client=user", "--set", "data.label=b"]
    code, _, error = command(monkeypatch, capsys, "data", "check", path, *options)
    assert code == 2
    assert error == f"fedtune: unknown column 'user'; known: {SHOWN[:-10]}, b\n"
