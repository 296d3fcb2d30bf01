"""A run that ends between any two operations on its files and is resumed has the bytes of a run that was never stopped.

The operations of one run are recorded. The folder that each crash would have left is built from them, and resumed.
"""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from crashed_runs import TUNERS, Recorded, check_crashes, check_power_cuts
from recorded_disk import Disk, Recorder, crash_states, distinct, power_cut_states, restore

from fedtune.runs.extension import extend_run


@pytest.fixture(autouse=True)
def a_checkpoint_after_every_evaluation(monkeypatch):
    """As a large run has them."""
    monkeypatch.setattr("fedtune.runs.trial_store.SECONDS_BETWEEN", 0.0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """`recorded(tuner)`; each tuner runs once."""
    return functools.cache(lambda tuner: Recorded(tuner, tmp_path_factory.mktemp(tuner)))


@pytest.mark.parametrize("tuner", TUNERS)
def test_the_record_is_complete(recorded, tuner):
    """What was recorded makes exactly what is on the disk: no operation on the run's files went unseen."""
    run = recorded(tuner)
    assert crash_states(Disk(), run.operations)[-1][1] == run.final
    asked = [operation for operation in run.operations if b'"dropped": true' in operation.data]
    assert asked, "attempts must fail in this run, so that their lines are among the places where it is stopped"


@pytest.mark.parametrize("tuner", TUNERS)
def test_the_journal_is_on_the_disk_when_a_checkpoint_is_removed(recorded, tuner):
    """So a power cut can't bring back a journal that still needs the checkpoint."""
    on_disk, removed = True, 0
    for operation in recorded(tuner).operations:
        if operation.path.endswith("journal.jsonl") and operation.kind in ("write", "sync"):
            on_disk = operation.kind == "sync"
        elif operation.kind == "unlink" and operation.path.endswith(".safetensors"):
            assert on_disk
            removed += 1
    assert removed > 0


def test_killed_at_some_operations(recorded, tmp_path):
    run = recorded("asha")
    states = crash_states(Disk(), run.operations)
    assert check_crashes(run, states[5::25], tmp_path) > 4


def test_power_cuts_at_some_operations(recorded, tmp_path):
    run = recorded("asha")
    states = distinct(power_cut_states(Disk(), run.operations))
    assert check_power_cuts(run, states[7::60], tmp_path) > 4


def test_a_run_that_was_being_extended_never_looks_finished(recorded, tmp_path, monkeypatch):
    """Whatever a power cut takes: with the longer settings, the results of the shorter run are gone."""
    restore(recorded("asha").final, tmp_path)
    start = Disk.of(tmp_path)
    recorder = Recorder(tmp_path, contents=dict(start.seen()[1]))
    with recorder.recording(monkeypatch):
        extend_run(tmp_path / "run", None, 18)
    longer = [dict(files) for _, _, (_, files) in power_cut_states(start, recorder.operations)]
    longer = [files for files in longer if b"extensions = []" not in files["run/settings.toml"]]
    assert longer
    assert not any("run/results.csv" in files for files in longer)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", TUNERS)
def test_killed_at_every_operation_and_power_cuts_at_many(tuner):
    """In a process of its own, in which no types are checked: so it takes half the time."""
    script = Path(__file__).with_name("crashed_runs.py")
    done = subprocess.run([sys.executable, script, tuner, "32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resumed = dict(re.findall(r"^(.+): (\d+) runs resumed", done.stdout, re.MULTILINE))
    assert int(resumed["crashes between operations"]) > 60
    assert int(resumed["crashes within writes"]) > 0
    assert int(resumed["crashes of resumed runs"]) > 4
    assert int(resumed["power cuts"]) > 5
