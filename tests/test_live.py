"""Progress on terminals and in logs."""

import io
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console, RenderableType

from fedtune.errors import UnknownNameError
from fedtune.report.live import LiveProgress, describe_faults
from fedtune.simulation.records import FAULTS

STUDIES = [("asha", 0), ("fedex", 1)]
ROUNDS = 5


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)


def printed(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def rendered(progress: LiveProgress) -> str:
    """What the display would show now, as plain text."""
    out = console(terminal=False)
    out.print(progress._render())
    return printed(out)


def plan() -> dict[str, Any]:
    return {
        "event": "plan",
        "studies": [{"tuner": tuner, "seed": seed, "total_rounds": ROUNDS} for tuner, seed in STUDIES],
    }


def a_round(tuner: str, seed: int, **faults: int) -> dict[str, Any]:
    counts = dict.fromkeys(FAULTS, 0) | faults
    return {"event": "round", "tuner": tuner, "seed": seed, "trial": 4, "round": 1, **counts}


def incumbent(tuner: str, seed: int) -> dict[str, Any]:
    errors = {"validation_error": 0.125, "test_error": float("nan")}
    return {"event": "incumbent", "tuner": tuner, "seed": seed, "trial": 4, **errors}


def a_run() -> Iterator[dict[str, Any]]:
    """The first study runs one round less than it might."""
    yield plan()
    for tuner, seed in STUDIES:
        for number in range(ROUNDS - (tuner == "asha")):
            yield a_round(tuner, seed, dropped=number)
        yield incumbent(tuner, seed)
        yield {"event": "study_end", "tuner": tuner, "seed": seed}


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def test_without_a_terminal_a_plain_line_a_finished_study() -> None:
    out = console(terminal=False)
    with LiveProgress(out) as progress:
        for event in a_run():
            progress(event)
    lines = printed(out).splitlines()
    assert re.fullmatch(
        r"study 1/2: asha, seed 0: incumbent trial 4, validation error 12.50 %, test error – %; "
        rf"4 rounds in 0:00:0\d; faults: {0 + 1 + 2 + 3} dropped",
        lines[0],
    )
    assert lines[1].startswith("study 2/2: fedex, seed 1:")
    assert lines[1].endswith(f"faults: {0 + 1 + 2 + 3 + 4} dropped")
    assert len(lines) == len(STUDIES)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", printed(out))


def test_a_dumb_terminal_gets_plain_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = console(terminal=True)
    with LiveProgress(out) as progress:
        for event in a_run():
            progress(event)
    assert len(printed(out).splitlines()) == len(STUDIES)


def test_on_a_terminal_the_display_ends_complete() -> None:
    out = console(terminal=True)
    with LiveProgress(out) as progress:
        for event in a_run():
            progress(event)
    last = printed(out).split("\x1b[1A")[-1]
    assert f"{2 * ROUNDS - 1}/{2 * ROUNDS - 1}" in last  # the round that asha never ran is no longer waited for
    assert "fedex, seed 1: incumbent trial 4, validation error 12.50 %" in last
    assert "study 1/2" not in printed(out)


def test_display_shows_done_total_current_study_and_faults_only_if_any() -> None:
    progress = LiveProgress(console(terminal=True))
    progress(plan())
    progress(a_round("asha", 0))
    assert f"1/{2 * ROUNDS}" in rendered(progress)
    assert "asha, seed 0: no incumbent yet" in rendered(progress)
    assert "faults" not in rendered(progress)
    progress(incumbent("asha", 0))
    assert "incumbent trial 4, validation error 12.50 %" in rendered(progress)
    progress(a_round("fedex", 1, clipped=2, lost=1))
    progress(a_round("fedex", 1, clipped=1))
    assert "fedex, seed 1: no incumbent yet" in rendered(progress)
    assert "faults: 3 clipped, 1 lost" in rendered(progress)
    assert max(len(line) for line in rendered(progress).splitlines()) <= 80


def test_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = LiveProgress(console(terminal=True))
    progress._bar.get_time = lambda: now
    progress(plan() | {"studies": [{"tuner": "asha", "seed": 0, "total_rounds": 1000}]})
    for second in range(10):
        now = 40.0 * second  # a round every 40 s: longer than rich's own window of 30 s
        progress(a_round("asha", 0))
        progress._render()
    seconds = 40 * (1000 - 10)
    assert f"{1 / 40:.2g} rounds/s {seconds // 3600}:{seconds % 3600 // 60:02}:{seconds % 60:02} left" in rendered(
        progress
    )


def test_what_is_not_searched_is_a_line() -> None:
    out, message = console(terminal=False), "not searched: client.momentum = 0.9, client.epochs = 1"
    LiveProgress(out)({"event": "space", "message": message})
    assert printed(out) == message + "\n"


def test_unknown_event_is_refused() -> None:
    known = "ask, drop, executor, incumbent, lost, plan, round, space, study_end, tell, warning"
    with pytest.raises(UnknownNameError, match=f"unknown event 'rond'; known: {known}"):
        LiveProgress(console(terminal=False))({"event": "rond"})


def test_faults_in_words() -> None:
    assert describe_faults({"dropped": 1200, "clipped": 0, "lost": 1}) == "faults: 1,200 dropped, 1 lost"
    assert describe_faults({"dropped": 0, "clipped": 0, "lost": 0}) == ""


def test_events_are_cheap_and_refreshes_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    renders = []
    render = LiveProgress._render

    def counted(self: LiveProgress) -> RenderableType:
        renders.append(time.monotonic())
        return render(self)

    monkeypatch.setattr(LiveProgress, "_render", counted)
    event, costs = a_round("asha", 0), []
    start = time.monotonic()
    with LiveProgress(console(terminal=True)) as progress:
        progress(plan())
        while time.monotonic() - start < 1:
            began = time.perf_counter()
            for _ in range(1000):
                progress(event)
            costs.append((time.perf_counter() - began) / 1000)
    assert min(costs) < 50e-6
    assert 2 <= len(renders) <= 10 + 3  # ten a second, and one each at start and end


def test_only_the_first_failed_client_is_shown() -> None:
    out = console(terminal=False)
    with LiveProgress(out) as progress:
        progress(plan())
        for client in (3, 4):
            progress({"event": "lost", "tuner": "asha", "seed": 0, "reasons": [f"client {client}: [no] battery"]})
    assert printed(out) == "a client failed: client 3: [no] battery\n"


def test_a_run_that_begins_again_without_a_client_counts_from_the_start() -> None:
    progress = LiveProgress(console(terminal=True))
    for event in [*list(a_run())[:6], plan(), a_round("asha", 0, lost=1)]:
        progress(event)
    assert f"1/{2 * ROUNDS}" in rendered(progress)
    assert "faults: 1 lost" in rendered(progress)
