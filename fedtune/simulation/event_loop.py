"""The event loop of a study: it runs up to `parallel_jobs` of a tuner's jobs in virtual time.

The virtual duration of a job is known before any of it is computed. So jobs can be computed in any order, and are
delivered to the tuner in virtual order. A workload says what a job is: the training of a federation (`fedtune.runs`),
or a made-up duration and error.
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
    """One attempt at a job: when it finishes, and whether it fails then."""

    job: Job
    number: int  # of failed attempts at this job before this one
    finish_time: float
    failed: bool


Running = TypeVar("Running", bound=Attempt)


@runtime_checkable
class Workload(Protocol[Running]):
    """Runs the jobs of a study."""

    def start(self, job: Job, number: int, now: float) -> Running | None:
        """The running attempt, whose job may be shortened to what is left of the budget; None if nothing is left.

        In both cases no more jobs are asked for.
        """

    def ready(self, attempt: Running) -> bool:
        """Whether everything of the attempt is computed. If not, the loop yields and asks again."""

    def deliver(self, attempt: Running) -> float:
        """The error of a job that is done, which is reported to the tuner next."""

    def fail(self, attempt: Running, then: OnDrop) -> None:
        """Records that the attempt failed; `then` says what happens to its job."""


class EventLoop(Generic[Running]):
    """Asks a tuner for jobs, and reports their errors to it as they finish.

    `on_drop` says what happens to a job when an attempt at it fails. `retry`: it is attempted again, before a new job
    is asked for. `lose`: the job is forgotten, and nothing is reported. `worst`: the error NaN is reported. `lose`
    is the same as `worst` unless the tuner `forgets_jobs`: another tuner would wait for the job for ever. Nothing is
    reported for a shortened job.

    With `tells_first`, all jobs that finish at one moment are reported before new jobs are asked for. Without it, new
    jobs are asked for after each report.
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
        self._unpaid: Job | None = None  # the job that the budget could not pay for, or only in part

    @property
    def time(self) -> float:
        """The virtual time."""
        return self._clock.time

    def run(self) -> Iterator[None]:
        """Runs until no job is running and none can be started; yields whenever it waits for a job to be computed.

        It can be run again after an extension. Then the first job is the one that the budget could not pay for before.
        """
        if self._unpaid:
            self._retries.append((self._unpaid, 0))
            self._unpaid = None
        self._start_jobs()
        while self._clock:
            while not self._workload.ready(self._clock.peek()):
                yield
            self._end(self._clock.take())
            if not (self._tells_first and self._clock and self._clock.peek().finish_time == self._clock.time):
                self._start_jobs()

    def _start_jobs(self) -> None:
        while len(self._clock) < self._parallel_jobs:
            if self._retries:
                job, number = self._retries.popleft()
            elif self._unpaid or (asked := self._tuner.ask()) is None:
                return
            else:
                job, number = asked, 0
            attempt = self._workload.start(job, number, self._clock.time)
            if attempt is None or attempt.job != job:
                self._unpaid = job
            if attempt is not None:
                self._clock.schedule(attempt.finish_time, attempt)

    def _end(self, attempt: Running) -> None:
        error = float("nan")
        if not attempt.failed:
            error = self._workload.deliver(attempt)
        else:
            self._workload.fail(attempt, self._on_drop)
            if self._on_drop == "retry":
                self._retries.append((attempt.job, attempt.number + 1))
        if not attempt.job.shortened and (not attempt.failed or self._on_drop == "worst"):
            self._tuner.tell(attempt.job, error)
