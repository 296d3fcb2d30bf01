"""The event loop of a study: a tuner's jobs on the virtual clock, so many at once.

A job's virtual duration is known before anything of it is computed. So what is computed, in whatever order, is
delivered to the tuner in virtual order. What a job is, a workload says: real federations (`fedtune.runs.study`),
or made-up durations and errors.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

from fedtune.simulation.clock import Clock
from fedtune.tuning.trial import Job, Tuner

OnDrop = Literal["retry", "lose", "worst"]


@dataclass(eq=False)
class Attempt:
    """One attempt at a job: when it ends, and whether by being dropped rather than done."""

    job: Job
    number: int  # of attempts at this job that were dropped before
    ends: float
    dropped: bool


Running = TypeVar("Running", bound=Attempt)


@runtime_checkable
class Workload(Protocol[Running]):
    """What the jobs of a study are."""

    def start(self, job: Job, number: int, now: float) -> Running | None:
        """The attempt, under way; None where the job no longer fits into the budget: then nothing more is asked for."""

    def ready(self, attempt: Running) -> bool:
        """Whether everything of the attempt is computed; if not, more of it is once the loop has yielded."""

    def deliver(self, attempt: Running) -> float:
        """The error of a job that is done, which the tuner is told next."""

    def drop(self, attempt: Running, then: OnDrop) -> None:
        """Takes note that the attempt was dropped, and of what becomes of its job."""


class EventLoop(Generic[Running]):
    """Asks a tuner for jobs, and tells it of them as they end.

    `on_drop` is what becomes of the job of a dropped attempt: `retry`, it is attempted again before anything new is
    asked for; `lose`, the tuner never hears of it; `worst`, the tuner is told NaN. `lose` means `worst` unless
    `forgets_jobs` is set: the tuner would wait for the job for ever.

    With `tells_first` all that ends at one moment is told before anything is asked for; else each tell is followed by
    asks.
    """

    def __init__(
        self,
        tuner: Tuner,
        workload: Workload[Running],
        parallel_jobs: int,
        on_drop: OnDrop = "retry",
        *,
        forgets_jobs: bool = False,
        tells_first: bool = False,
    ) -> None:
        self._tuner = tuner
        self._workload = workload
        self._parallel_jobs = parallel_jobs
        self._on_drop: OnDrop = "worst" if on_drop == "lose" and not forgets_jobs else on_drop
        self._tells_first = tells_first
        self._clock: Clock[Running] = Clock()
        self._retries: deque[tuple[Job, int]] = deque()
        self._refused: Job | None = None  # what no longer fitted into the budget

    @property
    def time(self) -> float:
        """The present."""
        return self._clock.time

    def run(self) -> Iterator[None]:
        """Runs until nothing is under way and nothing can be started; yields where it waits for what is computed.

        Run again, it goes on, with what the workload had refused first.
        """
        if self._refused:
            self._retries.append((self._refused, 0))
            self._refused = None
        self._start_jobs()
        while self._clock:
            while not self._workload.ready(self._clock.peek()):
                yield
            self._end(self._clock.take())
            if not (self._tells_first and self._clock and self._clock.peek().ends == self._clock.time):
                self._start_jobs()

    def _start_jobs(self) -> None:
        while len(self._clock) < self._parallel_jobs:
            if self._retries:
                job, number = self._retries.popleft()
            elif self._refused or (asked := self._tuner.ask()) is None:
                return
            else:
                job, number = asked, 0
            attempt = self._workload.start(job, number, self._clock.time)
            if attempt is None:
                self._refused = job
            else:
                self._clock.schedule(attempt.ends, attempt)

    def _end(self, attempt: Running) -> None:
        if not attempt.dropped:
            self._tuner.tell(attempt.job, self._workload.deliver(attempt))
            return
        self._workload.drop(attempt, self._on_drop)
        if self._on_drop == "retry":
            self._retries.append((attempt.job, attempt.number + 1))
        elif self._on_drop == "worst":
            self._tuner.tell(attempt.job, float("nan"))
