import itertools
import subprocess
import sys

import pandas as pd
import pytest
from experiment_script import load_script, script_path

from fedtune import rng


@pytest.fixture(scope="module")
def experiment():
    return load_script("asha_stragglers")


@pytest.mark.parametrize(("resumes", "first", "trained"), [(False, 359, 33), (True, 272, 43)])
def test_synchronous_halving_without_noise(experiment, resumes, first, trained):
    """The exact values of section 3.3.3's workload, whatever the errors."""
    cell = experiment.Cell("retry", resumes, 0.0, 0.0, "sha")
    assert experiment.simulate(cell, 0) == (trained, first)


def test_two_processes_write_what_one_computes(experiment, tmp_path):
    grid = ["--on-drop", "retry", "--stds", "1.33", "--drops", "0.01", "--repeats", "2"]
    command = [sys.executable, str(script_path("asha_stragglers")), *grid, "--processes", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("figures/*")) == ["retry-afresh.png", "retry-resume.png"]
    table = pd.read_csv(tmp_path / "results.csv").set_index(["resumes", "tuner"])
    assert len(table) == 4
    outcomes = [experiment.simulate(experiment.Cell("retry", True, 1.33, 0.01, "asha"), seed) for seed in (0, 1)]
    for name, (one, other) in zip(("trained", "first"), zip(*outcomes, strict=True), strict=True):
        row = table.loc[True, "asha"]
        assert row[f"{name}_mean"] == pytest.approx((one + other) / 2, rel=1e-5)
        assert row[f"{name}_std"] == pytest.approx(abs(one - other) / 2**0.5, rel=1e-5)


TINY = {"MAX_ROUNDS": 2, "REDUCTION_FACTOR": 2, "NUM_CONFIGS": 2, "PARALLEL_JOBS": 1, "HORIZON": 8}
# Of the errors of configurations 0 to 3 the second is the least, then comes the first, the third, the fourth.
TINY_SEED = next(n for n in itertools.count() if rng.stream(n, "error").random(4).argsort().tolist() == [1, 0, 2, 3])


@pytest.mark.parametrize(
    ("tuner", "resumes", "dropped", "on_drop", "outcome"),
    [
        # Configuration 1 is dropped at 1.5, in the base rung. Retried, it is promoted at 2.5.
        ("asha", False, 1, "retry", (1, 4.5)),  # 0 is next, from 6.5 to 8.5, after 2 and 3
        # Lost, 2 is drawn instead: with it there are two in the rung, and 0 is promoted at 2.5.
        ("asha", False, 1, "lose", (1, 4.5)),
        # Worst of two, it lets 0 be promoted at once, and with 2 and 3 there are four, of which 2 is second: until 7.5.
        ("asha", False, 1, "worst", (2, 3.5)),
        ("sha", False, 1, "retry", (1, 4.5)),  # 1 is promoted at 2.5; of the next bracket, 2 is trained until 8.5
        *(("sha", False, 1, on_drop, (2, 3.5)) for on_drop in ("lose", "worst")),  # 0 is, at 1.5; 2 until 7.5
        # It is dropped at 2.5, once promoted. Retried, it starts over from round 0, or from its checkpoint of round 1.
        ("asha", False, 2, "retry", (1, 4.5)),
        ("asha", True, 2, "retry", (2, 3.5)),  # then 2 and 3, and 0 from 5.5 to 6.5
        # Else 0 is promoted once there are four in the rung, with 2 and 3 at 4.5; or 2, of the next bracket.
        *((tuner, False, 2, on_drop, (1, 6.5)) for tuner in ("sha", "asha") for on_drop in ("lose", "worst")),
    ],
)
def test_what_becomes_of_a_dropped_job(experiment, monkeypatch, tuner, resumes, dropped, on_drop, outcome):
    """By hand: one worker, rungs after 1 and 2 rounds, a reduction factor of 2, and brackets of two for SHA."""
    for name, value in TINY.items():
        monkeypatch.setattr(experiment, name, value)
    attempts = itertools.count()
    monkeypatch.setattr(experiment, "fails_after", lambda *_: 0.5 if next(attempts) == dropped else None)
    assert experiment.simulate(experiment.Cell(on_drop, resumes, 0.0, 0.5, tuner), TINY_SEED) == outcome
