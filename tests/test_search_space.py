"""What `fedtune space` prints is what a run with the same arguments searches."""

import json
import tomllib

import pytest
from test_layers import PROGRAM, TINY
from typer.testing import CliRunner

import fedtune
from fedtune import cli
from fedtune.cli_options import assigned
from fedtune.layers import layers_of
from fedtune.search_space import space_lines, space_rows
from fedtune.tuning.domains import parse_domain

TOML = {
    "shipped": '[data]\nname = "digits"\n',
    "own": '[data]\nname = "users.csv"\nclient = "user"\nlabel = "likes"\n',
}
FIXES = '[client]\nmomentum = 0.5\n\n[space.client]\ndropout = {choice = [0.1, 0.2]}\nepochs = "fixed"\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    rows = [f"user{number % 4},{number / 80},{number % 3},{number % 2}" for number in range(80)]
    (tmp_path / "users.csv").write_text("\n".join(["user,height,age,likes", *rows]))
    (tmp_path / "own.py").write_text(PROGRAM)
    for name, text in TOML.items():
        (tmp_path / f"{name}.toml").write_text(text)
        (tmp_path / f"{name}_fixes.toml").write_text(text + FIXES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("digits", []),
        ("digits", ["client.momentum=0.9", "server.learning_rate=0.5"]),
        ("digits", ["client.name=own.py"]),
        ("digits", ["client.name=own.py", "client.warmth=0.25", "space.client.learning_rate={choice=[0.1,0.2]}"]),
        ("shipped_fixes.toml", ["space.client.momentum={uniform=[0.0,0.5]}"]),
        ("own.toml", ['space.only=["client.dropout"]']),
        ("own.toml", ["client.name=own.py"]),
        ("own_fixes.toml", ["client.learning_rate=0.3"]),
    ],
)
def test_a_run_searches_what_is_printed(what, options, folder):
    rows = [row for row in space_rows(layers_of(what, assigned(options))) if row.value is not None]
    run = fedtune.run(
        fedtune.resolve_settings(what, *assigned(options), TINY), out="run", force=False, listener=lambda event: None
    )
    # The settings that the run resolved.
    space = tomllib.loads((folder / "run" / "settings.toml").read_text())["space"]
    domains = {f"{part}.{name}": domain for part in space for name, domain in space[part].items() if domain != "fixed"}
    assert {row.name: row.domain for row in rows if row.domain} == domains
    # The values that its trials had.
    for text in run.trials["config"]:
        trial = json.loads(text)
        ((config,),) = trial["pool"]
        values = {f"client.{name}": value for name, value in config.items()}
        values |= {f"server.{name}": value for name, value in trial["server"].items()}
        assert values.keys() == {row.name for row in rows}
        for row in rows:
            drawn = row.domain is not None and parse_domain(row.name, row.domain).contains(values[row.name])
            assert drawn or values[row.name] == row.value


def test_each_row_says_where_it_is_from():
    layers = assigned(["client.momentum=0.9", "client.name=own.py"])
    rows = {row.name: row for row in space_rows(layers_of("own_fixes.toml", layers[:1], "command line"))}
    assert rows["client.momentum"].value_origin == "command line"
    assert rows["client.momentum"].note == "not searched, because its value is set"
    assert rows["client.epochs"].note == "not searched, because of space.client.epochs (own_fixes.toml)"
    assert rows["client.dropout"].domain_origin == "own_fixes.toml"
    assert rows["client.learning_rate"].domain_origin == "client program local_sgd"
    assert rows["server.learning_rate"].value_origin == "default"
    rows = {row.name: row for row in space_rows(layers_of("digits", layers[1:], "command line"))}
    assert rows["client.learning_rate"].domain_origin == "data set digits"
    assert rows["client.warmth"].domain_origin == "client program own.py"
    assert rows["client.momentum"].value is None
    assert rows["client.momentum"].note == "client program own.py does not have it"


def test_the_command_prints_the_rows():
    done = CliRunner().invoke(cli.app, ["space", "digits", "--set", "client.momentum=0.9", "--set", "client.epochs=2"])
    assert done.exit_code == 0
    rows = fedtune.space("digits", client={"momentum": 0.9, "epochs": 2})
    lines = list(space_lines(rows))
    assert done.output.replace("command line", "arguments").splitlines() == lines
    searched, fixed = (lines.index(f"{title}:") for title in ("searched", "fixed"))
    assert "left out:" not in lines
    (rate,) = (number for number, line in enumerate(lines) if line.startswith("  client.learning_rate "))
    assert searched < rate < fixed
    assert "{log_uniform = [0.0001, 1.0]}" in lines[rate]
    for name, value in (("momentum", "0.9"), ("epochs", "2")):
        (number,) = (number for number, line in enumerate(lines) if line.startswith(f"  client.{name} "))
        assert number > fixed
        assert lines[number].split()[1] == value


@pytest.mark.parametrize(("tuner", "said"), [("random", ["not searched: client.momentum = 0.9"]), ("manual", [])])
def test_a_run_says_what_is_not_searched(tuner, said):
    heard = []
    fedtune.compare("digits", **TINY | {"tuners": [tuner]}, client={"momentum": 0.9}, out="run", listener=heard.append)
    assert [event["message"] for event in heard if event["event"] == "space"] == said
