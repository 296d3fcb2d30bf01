"""A run whose operations on its files are recorded, and the checks of what every crash and power cut leaves of it.

`python tests/crashed_runs.py TUNER STEP` resumes the run after every crash between two operations, and after every
STEP-th crash within a write and power cut. It prints how many there were. Outside pytest no types are checked, so it is
faster there.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path

import pytest
from recorded_disk import Disk, Recorder, crash_states, distinct, power_cut_states, restore
from safetensors.numpy import load

import fedtune
from fedtune.errors import InputError
from fedtune.runs.journal import DamagedJournalError
from fedtune.runs.prepare import prepare
from fedtune.runs.recorded import check_begun_with
from fedtune.runs.repair import repair_run
from fedtune.runs.run_folder import claim_folder, settings_path

SETTINGS = {
    "max_rounds": 3,
    "cohort_size": 2,
    "executor": "serial",
    "model": {"name": "logistic"},
    "evaluation": {"every": 1, "clients": 3},
    "devices": {"straggler_std": 0.5, "drop_probability": 0.15},
}
TUNERS = {"asha": 9, "fedex": 9, "pbt": 15}  # and the rounds that each may spend
FILES = ("results.csv", "rounds.parquet", "trials.parquet")


def quiet(event):
    pass


@functools.cache
def comparison(tuner):
    return prepare(fedtune.resolve_settings("digits", {**SETTINGS, "tuners": [tuner], "total_rounds": TUNERS[tuner]}))


class Recorded:
    """A run of a tuner, all operations on its files, and what it wrote."""

    def __init__(self, tuner, root):
        self.tuner = tuner
        self.comparison = comparison(tuner)
        recorder = Recorder(root)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedtune.runs.trial_store.SECONDS_BETWEEN", 0.0)
            with recorder.recording(patch):
                claim_folder(root / "run", self.comparison.settings, force=False)
                self.comparison.run(root / "run", quiet)
        self.operations = recorder.operations
        self.written = written(root / "run")
        self.final = Disk.of(root).seen()


def written(folder):
    """What must be the same, whatever happened in between: the results, the checkpoints, and what the journals say.

    A journal may hold a round twice, if the run was stopped before the checkpoint after it.
    """
    files = [folder / name for name in FILES] + sorted(folder.glob("*/checkpoints/*"))
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    for path in folder.glob("*/journal.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            del line["check"]
        notes = {json.dumps(line) for line in lines if line["event"] in ("round", "checkpoint", "personalised", "lost")}
        decisions = [json.dumps(line) for line in lines if json.dumps(line) not in notes]
        found |= {f"{path.parent.name} decided": decisions, f"{path.parent.name} noted": notes}
    assert not list(folder.rglob("*.unfinished"))
    return found


def resumed(run, state, root, *, repair=False):
    """What a run has written that is resumed in this state; None if there is no run folder to resume yet."""
    restore(state, root)
    folder = root / "run"
    if not (folder / "settings.toml").is_file():
        with pytest.raises(InputError, match="is no run folder"):
            settings_path(folder)
        assert not list(folder.glob("*/journal.jsonl"))
        return None
    try:
        go_on(run, folder)
    except DamagedJournalError:
        if not repair:
            raise
        assert len(repair_run(folder, run.comparison.settings)) == 1
        go_on(run, folder)
    return written(folder)


def go_on(run, folder):
    """Resumes the run as `fedtune.resume` does, without its imports and figures."""
    check_begun_with(run.comparison.settings, folder)
    run.comparison.run(folder, quiet)


def check_crashes(run, states, root):
    """Resumes each state. Returns how many states had a run to resume."""
    count = 0
    for where, state in states:
        found = resumed(run, state, root)
        assert found is None or found == run.written, where
        count += found is not None
    return count


def check_power_cuts(run, states, root):
    """Resumes each state, with --repair if the error says so. Returns how many states had a run to resume."""
    count = 0
    for num_operations, where, state in states:
        check_what_is_kept(run.operations[:num_operations], dict(state[1]), where)
        found = resumed(run, state, root, repair=True)
        assert found is None or found == run.written, where
        count += found is not None
    return count


def lines_of(data):
    """The lines of a journal up to the first damaged one; they are whole lines of JSON."""
    found = []
    for text in data.split(b"\n")[:-1]:
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found


def check_what_is_kept(operations, files, where):
    """Checks that the state has what a power cut may not take.

    These are the settings of a run with a journal, each tell, and the latest checkpoint that the journal names.
    """
    appended = {}
    for operation in operations:
        if operation.path.endswith("journal.jsonl") and operation.kind == "write":
            appended[operation.path] = appended.get(operation.path, b"") + operation.data
    removed = {operation.path for operation in operations if operation.kind == "unlink"}
    for path, data in appended.items():
        assert files.get("run/settings.toml"), where
        assert files.get("run/environment.json"), where
        told, left = lines_of(data), lines_of(files.get(path, b""))
        if told[-1]["event"] != "tell":  # that last line is not on the disk yet
            assert tells(left) == tells(told), where
        latest, known = checkpoints(told), checkpoints(left)
        for trial, number in known.items():
            name = f"{Path(path).parent}/checkpoints/trial-{trial}-round-{number}.safetensors"
            if name in removed and number == latest[trial]:
                continue  # its trial has ended
            assert name in files, where
            assert load(files[name])["round"] == number, where


def tells(lines):
    return [line for line in lines if line["event"] == "tell"]


def checkpoints(lines):
    """The round of each trial's latest checkpoint."""
    return {line["trial"]: line["round"] for line in lines if line["event"] == "checkpoint"}


def check_crashes_of_resumed_runs(run, states, step, root):
    """Resumes each state while it is recorded, and then every `step`-th state of that resumed run."""
    count = 0
    for _, state in states:
        restore(state, root / "first")
        start = Disk.of(root / "first")
        recorder = Recorder(root / "first", contents=dict(start.seen()[1]))
        with pytest.MonkeyPatch.context() as patch, recorder.recording(patch):
            go_on(run, root / "first" / "run")
        again = crash_states(start, recorder.operations)
        count += check_crashes(run, again[step // 2 :: step], root / "second")
    return count


def main(tuner, step):
    """Makes the checks, some of every `step`-th state alone, and prints how many states were resumed."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedtune.runs.trial_store.SECONDS_BETWEEN", 0.0)
        run, root = Recorded(tuner, Path(folder)), Path(folder) / "states"
        crashes = crash_states(Disk(), run.operations)
        halves = [state for state in crashes if state[0].startswith("within")]
        between = [state for state in crashes if not state[0].startswith("within")]
        cuts = distinct(power_cut_states(Disk(), run.operations))
        print(f"{tuner}: {len(run.operations)} operations")
        for kind, states, resumed in (
            ("crashes between operations", between, check_crashes(run, between, root)),
            ("crashes within writes", halves, check_crashes(run, halves[::step], root)),
            ("crashes of resumed runs", crashes, check_crashes_of_resumed_runs(run, crashes[20::60], 40, root)),
            ("power cuts", cuts, check_power_cuts(run, cuts[::step], root)),
        ):
            print(f"{kind}: {resumed} runs resumed, of {len(states)} states")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
