"""Damaged journals are cut at their last good line, and the resumed run gets the same results."""

import os
import shutil
import sys

import pytest

import fedtune
from fedtune import cli
from fedtune.errors import InputError

SETTINGS = {
    "tuners": ["asha"],
    "max_rounds": 3,
    "total_rounds": 9,
    "executor": "serial",
    "cohort_size": 1,
    "seeds": 2,
    "model": {"name": "logistic"},
    "evaluation": {"clients": 3},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return fedtune.compare("digits", out=tmp_path_factory.mktemp("repair") / "run", **SETTINGS).folder


def contents(folder):
    files = [folder / name for name in ("results.csv", "rounds.parquet", "trials.parquet")]
    checkpoints = sorted(folder.glob("*/checkpoints/*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in [*files, *checkpoints]}


def zero(data, start):
    """Sectors that the disk had not written hold zeros."""
    return data[:start] + bytes(len(data) - start)


def garble(data, start):
    return data[:start] + os.urandom(len(data) - start - 1).replace(b"\n", b" ") + b"\n"


def lose_a_block(data, start):
    """A block in the middle was not written, and later ones were."""
    return data[:start] + bytes(300) + data[start + 300 :]


@pytest.mark.parametrize("damage", [zero, garble, lose_a_block])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_a_damaged_tail_is_cut_if_the_user_says_so(finished, tmp_path, damage, share):
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "asha-seed1" / "journal.jsonl"
    data = path.read_bytes()
    damaged = damage(data, int(share * len(data)))
    damaged = damaged if damaged.endswith(b"\n") else damaged + b"\n"
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=rf"line \d+, is damaged or was edited: .* fedtune resume {folder} --repair$"):
        fedtune.resume(folder, executor="serial")
    assert path.read_bytes() == damaged
    good = data[: data.rfind(b"\n", 0, int(share * len(data))) + 1]
    heard = []
    fedtune.resume(folder, executor="serial", repair=True, listener=heard.append)
    (warning,) = [event["message"] for event in heard if event["event"] == "warning"]
    first, last = good.count(b"\n") + 1, damaged.count(b"\n")
    assert warning == (
        f"{path} was damaged: cut off all from line {first} on ({last - first + 1} lines, {len(damaged) - len(good):,} "
        "bytes); study asha-seed1 computes again what was there"
    )
    assert path.read_bytes().startswith(good)
    assert contents(folder) == contents(finished)
    assert fedtune.replay(folder)[1].finished


def test_a_run_without_damage_is_left_as_it_is(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.glob("*/journal.jsonl")}
    heard = []
    fedtune.resume(folder, executor="serial", repair=True, listener=heard.append)
    assert [event for event in heard if event["event"] == "warning"] == []
    assert {path: path.read_bytes() for path in before} == before


def test_the_command_says_what_it_cut(finished, tmp_path, monkeypatch, capsys):
    def answer(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedtune", "resume", *arguments, "--executor", "serial"])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, error = capsys.readouterr()
        return done.value.code, out, error.strip()

    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "asha-seed0" / "journal.jsonl"
    os.truncate(path, path.stat().st_size - 10)
    with path.open("ab") as file:
        file.write(bytes(9) + b"\n")
    code, _, error = answer(str(folder))
    assert (code, error.splitlines()) == (2, [error])
    assert error.endswith(f"fedtune resume {folder} --repair")
    code, out, error = answer(str(folder), "--repair")
    assert code == 0
    assert "study asha-seed0 computes again what was there" in " ".join((out + error).split())
    assert contents(folder) == contents(finished)
