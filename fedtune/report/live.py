"""The display of a run's progress while it runs."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from fedtune.errors import UnknownNameError
from fedtune.events import EVENTS
from fedtune.printable import printable
from fedtune.report.tables import describe_counts, duration, percent
from fedtune.simulation.records import FAULTS

REFRESHES_PER_SECOND = 5


@dataclass
class StudyProgress:
    """The progress of one study."""

    tuner: str
    seed: int
    total_rounds: int
    rounds: int = 0
    incumbent: Mapping[str, Any] | None = None
    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    started: float = field(default_factory=time.monotonic)

    def describe(self) -> str:
        """The study and its incumbent, in one line."""
        name = f"{self.tuner}, seed {self.seed}"
        if self.incumbent is None:
            return f"{name}: no incumbent yet"
        errors = [f"{part} error {percent(self.incumbent[f'{part}_error'])} %" for part in ("validation", "test")]
        return f"{name}: incumbent trial {self.incumbent['trial']}, {', '.join(errors)}"


class LiveProgress:
    """A listener that shows a run's progress: live on a terminal, elsewhere as one plain line for each finished study.

    It is called with each event, a mapping whose `event` is one of EVENTS:

        with LiveProgress() as progress:
            fedtune.compare("digits", listener=progress)

    A call only updates counts. A thread draws them a few times a second.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._studies: dict[tuple[str, int], StudyProgress] = {}
        self._current: StudyProgress | None = None
        self._failure_shown = False
        self._faults = dict.fromkeys(FAULTS, 0)
        self._rounds = self._total_rounds = self._ended = 0
        # Rich estimates the speed from the last 30 s. A round may take longer, and then no rate would be shown between
        # two rounds; so the speed is estimated from the last ten minutes.
        self._bar = Progress(
            TextColumn("rounds"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            auto_refresh=False,
            speed_estimate_period=600,
            expand=True,
        )
        self._task = self._bar.add_task("rounds", total=None, rate="")
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=REFRESHES_PER_SECOND
            )

    def __enter__(self) -> "LiveProgress":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes note of an event; what is worth a line of its own is printed."""
        match event["event"]:
            case "round":
                self._round(event)
            case "incumbent":
                self._study(event).incumbent = event
            case "warning":
                self._print(f"warning: {event['message']}")
            case "executor" | "space":
                self._print(event["message"])
            case "lost":
                self._lost(event)
            case "plan":
                self._plan(event)
            case "study_end":
                self._study_end(event)
            case "ask" | "tell" | "drop":
                pass
            case other:
                raise UnknownNameError("event", other, EVENTS)

    def _study(self, event: Mapping[str, Any]) -> StudyProgress:
        return self._studies[event["tuner"], event["seed"]]

    def _plan(self, event: Mapping[str, Any]) -> None:
        """Starts to count: a run that goes on without a client begins again, from its journals."""
        self._current, self._faults = None, dict.fromkeys(FAULTS, 0)
        self._rounds = self._total_rounds = self._ended = 0
        for planned in event["studies"]:
            self._studies[planned["tuner"], planned["seed"]] = StudyProgress(
                planned["tuner"], planned["seed"], planned["total_rounds"]
            )
            self._total_rounds += planned["total_rounds"]

    def _round(self, event: Mapping[str, Any]) -> None:
        study = self._current = self._study(event)
        if study.rounds == 0:
            study.started = time.monotonic()
        study.rounds += 1
        self._rounds += 1
        for fault in FAULTS:
            study.faults[fault] += event[fault]
            self._faults[fault] += event[fault]

    def _lost(self, event: Mapping[str, Any]) -> None:
        """Prints why the first failed client of the run failed; the journals hold the reasons of the others."""
        if not self._failure_shown:
            self._failure_shown = True
            self._print(f"a client failed: {event['reasons'][0]}")

    def _print(self, line: str) -> None:
        self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def _study_end(self, event: Mapping[str, Any]) -> None:
        study = self._study(event)
        self._ended += 1
        # A study stops when its tuner has no more jobs. The rounds that are left will never be run.
        self._total_rounds -= study.total_rounds - study.rounds
        if self._live is None:
            took = f"{study.rounds:,} rounds in {duration(time.monotonic() - study.started)}"
            parts = [
                f"study {self._ended}/{len(self._studies)}: {study.describe()}",
                took,
                describe_faults(study.faults),
            ]
            self._print("; ".join(filter(None, parts)))

    def _render(self) -> RenderableType:
        """The bar, the current study with its incumbent, and the faults if there are any."""
        self._bar.update(self._task, completed=self._rounds, total=self._total_rounds or None)
        speed = self._bar.tasks[0].finished_speed or self._bar.tasks[0].speed
        self._bar.update(self._task, rate=_rate(speed) if speed else "")
        lines = [self._current.describe() if self._current else "", describe_faults(self._faults)]
        return Group(self._bar, *(Text(printable(line)) for line in lines if line))


def _rate(speed: float) -> str:
    return f"{speed:,.0f} rounds/s" if speed >= 10 else f"{speed:.2g} rounds/s"


def describe_faults(faults: Mapping[str, int]) -> str:
    """The counts that are not zero, for example `faults: 3 dropped, 1 clipped`; an empty string if all are zero."""
    counts = describe_counts(faults, faults)
    return f"faults: {counts}" if counts else ""
