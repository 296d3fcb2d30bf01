"""A study: one tuner with one seed, from its first ask until no further job can be started.

No further job can be started if the budget is spent, or if the tuner has no more jobs. The last job may be shortened to
what is left of the budget (`fedtune.runs.ledger`). A study may be extended after that.

A study is the workload of the event loop (`fedtune.simulation.event_loop`). It writes each decision into the journal
before it acts on it, and keeps a ledger. It does not carry out the jobs itself: `fedtune.runs.trained_jobs` trains
them, and `fedtune.runs.replay` reads their outcomes from the journal.

A generator here yields, without a value, whenever it waits for the executor. Its caller then lets the executor compute.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fedtune.runs.history import TrialHistory
from fedtune.runs.journal import Journal
from fedtune.runs.journal_lines import trial_as_json
from fedtune.runs.ledger import AttemptsFailed, Ledger
from fedtune.settings import ExtensionSettings, Settings
from fedtune.simulation.event_loop import Attempt, EventLoop, OnDrop
from fedtune.tuning.trial import Job, Score, Trial, Tuner
from fedtune.tuning.tuner_kind import TunerSettings


@dataclass(eq=False)
class JobAttempt(Attempt):
    """An attempt at a job of a study."""

    history: TrialHistory
    round_times: list[float]  # the virtual times at which the rounds of the job end, unless the attempt fails before
    wasted_rounds: int  # rounds that a failed attempt had done


@runtime_checkable
class Jobs(Protocol):
    """Carries out the jobs of a study."""

    def attempt(self, job: Job, number: int, history: TrialHistory, now: float) -> JobAttempt:
        """The attempt that starts now, with its finish time and whether it will fail. Nothing is computed yet."""

    def start(self, attempt: JobAttempt) -> None:
        """Starts to compute the attempt, once the journal holds it."""

    def ready(self, attempt: JobAttempt) -> bool:
        """Whether everything of the attempt is computed."""

    def finish(self, attempt: JobAttempt) -> None:
        """Adds all rounds of the job to the trial's history, unless they are there, so that the job can be scored."""

    def reported(self, job: Job, best: Score) -> None:
        """Called when the score of a whole job is in the journal; `best` is the score of the incumbent now."""

    def personalise(self, reading: str, trial: Trial, rounds: int) -> Generator[None, None, None]:
        """Enters the evaluation of the trial after local training into the ledger, unless the ledger has it.

        `reading` says how clients choose their configuration: "sampled" from theta, or "argmax".
        """


class Study:
    """The loop of a study over a ledger, a journal and the jobs of a tuner."""

    def __init__(
        self,
        tuner_settings: TunerSettings,
        seed: int,
        tuner: Tuner,
        settings: Settings,
        ledger: Ledger,
        journal: Journal,
        jobs: Jobs,
        say: Callable[..., None],
    ) -> None:
        self.name = tuner_settings.name
        self.seed = seed
        self._tuner = tuner
        self._settings = settings
        self._ledger = ledger
        self._journal = journal
        self._jobs = jobs
        self._say = say
        kind = tuner_settings.kind
        # With one federation a failed job that is not retried would end the study.
        on_drop: OnDrop = settings.devices.on_drop if kind.searches else "retry"
        self._loop = EventLoop(tuner, self, settings.parallel_trials, on_drop, forgets_jobs=kind.forgets_jobs)

    @property
    def time(self) -> float:
        """The virtual time."""
        return self._loop.time

    def steps(self) -> Generator[None, None, None]:
        """Runs the study to its end, and then through each extension. A study that was stopped is resumed."""
        self._journal.begin(self.name, self.seed, self._settings)
        yield from self._loop.run()
        yield from self._end()
        for extension in self._settings.extensions:
            self._extend(extension)
            yield from self._loop.run()
            yield from self._end()
        self._journal.check_that_it_ends_here()

    def start(self, job: Job, number: int, now: float) -> JobAttempt | None:
        """The attempt, which is in the journal; its job may be shortened. None if the budget has no rounds left."""
        charged = self._ledger.charge(job, number)
        if charged is None:
            return None
        job, history = charged
        attempt = self._jobs.attempt(job, number, history, now)
        self._journal.decide(
            "ask",
            trial=job.trial.number,
            rung=job.rung,
            rounds=job.rounds,
            attempt=number,
            started=now,
            finishes=attempt.finish_time,
            dropped=attempt.failed,
            **trial_as_json(job.trial),
        )
        self._ledger.started_attempts += 1
        self._announce("ask", job, attempt=number, **trial_as_json(job.trial))
        self._jobs.start(attempt)
        return attempt

    def ready(self, attempt: JobAttempt) -> bool:
        """Whether everything of the attempt is computed."""
        return self._jobs.ready(attempt)

    def deliver(self, attempt: JobAttempt) -> float:
        """The score of the job's trial, which is in the journal."""
        job = attempt.job
        self._jobs.finish(attempt)
        score = self._ledger.score(job, self.time)
        self._journal.decide(
            "tell", trial=job.trial.number, rung=job.rung, rounds=job.rounds, time=self.time, score=score
        )
        best = self._best()
        if not job.shortened:  # the incumbent may be the same trial before its shortened job: both states are kept
            self._jobs.reported(job, best)
        self._announce("tell", job, score=score)
        test_error = self._ledger.trials[best.trial].tail("test_error", best.rounds)
        self._say("incumbent", trial=best.trial, validation_error=best.error, test_error=test_error)
        return score

    def fail(self, attempt: JobAttempt, then: OnDrop) -> None:
        """Writes into the journal that the attempt failed."""
        job = attempt.job
        self._journal.decide(
            "drop", trial=job.trial.number, rung=job.rung, rounds=job.rounds, time=self.time, then=then
        )
        self._ledger.failed_attempts += 1
        self._ledger.wasted_rounds += attempt.wasted_rounds
        self._announce("drop", job, then=then)

    def _extend(self, extension: ExtensionSettings) -> None:
        self._journal.decide("extend", **extension.model_dump())
        self._ledger.extend(self._tuner, extension)

    def _end(self) -> Generator[None, None, None]:
        """Evaluates the incumbent after local training, and writes the end into the journal."""
        best = self._best()
        trial = self._ledger.trials[best.trial].trial
        yield from self._jobs.personalise("sampled", trial, best.rounds)
        if trial.num_configs > 1:
            yield from self._jobs.personalise("argmax", trial, best.rounds)
        self._journal.decide("end", incumbent=best.trial, time=self.time)

    def _best(self) -> Score:
        if self._ledger.best is None:
            raise AttemptsFailed(
                f"devices.drop_probability must let a job end, got {self._settings.devices.drop_probability}: "
                f"all {self._ledger.failed_attempts} jobs of tuner {self.name}, seed {self.seed}, failed"
            )
        return self._ledger.best

    def _announce(self, event: str, job: Job, **fields: Any) -> None:
        self._say(event, trial=job.trial.number, rung=job.rung, rounds=job.rounds, **fields)
