"""Trains the jobs of a study, many federations at a time, on one executor."""

from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from fedtune.client.tasks import Ticket
from fedtune.errors import InputError
from fedtune.runs.history import TrialHistory
from fedtune.runs.journal import Journal
from fedtune.runs.ledger import Ledger
from fedtune.runs.study import JobAttempt
from fedtune.runs.training import TrainingSetup, ignore, train
from fedtune.runs.trial_store import TrialStore
from fedtune.simulation.federation import Federation
from fedtune.simulation.records import RoundRecord, record_as_row
from fedtune.tuning.space import Config
from fedtune.tuning.trial import Job, Pool, Score, Trial
from fedtune.tuning.tuner_kind import TunerSettings

Made = TypeVar("Made")


class Chosen(NamedTuple):
    """The configuration, theta and pool of a finished study's incumbent at its end."""

    config: Config  # the client configuration of largest probability
    theta: tuple[Float[np.ndarray, "_"], ...]
    pool: Pool


class TrainedJobs:
    """Carries out the jobs of a study by training. See `fedtune.runs.study.Jobs`."""

    def __init__(
        self,
        tuner: TunerSettings,
        setup: TrainingSetup,
        ledger: Ledger,
        journal: Journal,
        store: TrialStore,
        say: Callable[..., None],
    ) -> None:
        self._tuner = tuner
        self._setup = setup
        self._settings = setup.settings
        self._ledger = ledger
        self._journal = journal
        self._store = store
        self._say = say
        self._ended: set[int] = set()  # trials that will not be trained on, and whose checkpoints are still there
        self._running: dict[JobAttempt, Generator[Ticket, None, None]] = {}
        self._tickets: dict[JobAttempt, Ticket] = {}  # the ticket that each running job waits for

    def attempt(self, job: Job, number: int, history: TrialHistory, now: float) -> JobAttempt:
        """The attempt that starts now. An attempt that will fail is never computed."""
        after = history.reported_rounds
        failure_time, round_ends = self._setup.devices.attempt_fate(job, number, after)
        failed = failure_time is not None
        lasts = failure_time if failure_time is not None else float(round_ends[-1])
        return JobAttempt(
            job,
            number,
            finish_time=now + lasts,
            failed=failed,
            history=history,
            round_times=(now + round_ends).tolist(),
            wasted_rounds=int((round_ends <= lasts).sum()) if failed else 0,
        )

    def start(self, attempt: JobAttempt) -> None:
        """Trains the job as far as it can go without waiting. Then the trials that the tuner gave up are removed."""
        if not attempt.failed:
            self._running[attempt] = self._train(attempt)
            self._train_on(attempt)
        if attempt.job.given_up:
            self._ended |= set(attempt.job.given_up)
            self._journal.sync()  # the copies' checkpoints must be in it when the checkpoints of their parents are gone
            self._remove_ended()

    def ready(self, attempt: JobAttempt) -> bool:
        """Whether the job is trained. Every federation whose ticket is finished is trained on first."""
        while attempt in self._running:
            finished = [running for running, ticket in self._tickets.items() if self._setup.executor.finished(ticket)]
            if not finished:
                return False
            for running in finished:
                self._train_on(running)
        return True

    def finish(self, attempt: JobAttempt) -> None:
        """Does nothing: each round entered the trial's history when it was trained."""

    def reported(self, job: Job, best: Score) -> None:
        """Removes the checkpoints of trials that are completely trained, except the incumbent's checkpoint."""
        self._store.report(job.trial.number, job.rounds)
        if self._tuner.ends_at_max_rounds and job.rounds == self._settings.max_rounds:
            self._ended.add(job.trial.number)
        self._remove_ended()

    def personalise(self, reading: str, trial: Trial, rounds: int) -> Generator[None, None, None]:
        """Enters the evaluation of the trial after local training into the ledger. See `Jobs.personalise`."""
        yield from self._waiting(self._personalise(reading, trial, rounds))

    def chosen(self, best: Score) -> Generator[None, None, Chosen]:
        """The incumbent's configuration, theta and pool. Its checkpoint is the only one that is kept."""
        trial = self._ledger.trials[best.trial].trial
        federation = yield from self._waiting(self._federation(trial, best.rounds, order=0.0))
        self._store.keep_only(best.trial, best.rounds)
        return Chosen(federation.best_config(), federation.theta(), federation.pool())

    def _remove_ended(self) -> None:
        """Removes the checkpoints of trials that will not be trained on, except the incumbent's checkpoint."""
        incumbent = set() if self._ledger.best is None else {self._ledger.best.trial}
        for trial in self._ended - incumbent:
            self._store.remove(trial)
        self._ended &= incumbent

    def _train_on(self, attempt: JobAttempt) -> None:
        """Trains the job on until it waits for another ticket, or to its end."""
        ticket = next(self._running[attempt], None)
        if ticket is None:
            del self._running[attempt]
            self._tickets.pop(attempt, None)
        else:
            self._tickets[attempt] = ticket

    def _train(self, attempt: JobAttempt) -> Generator[Ticket, None, None]:
        """Takes the rounds of the job that the journal has, and trains the other rounds."""
        job, history = attempt.job, attempt.history
        trial, first, order = job.trial, history.reported_rounds, attempt.finish_time

        def enter(record: RoundRecord) -> None:
            history.records.append(record)
            history.times.append(attempt.round_times[record.round - first - 1])
            self._say("round", trial=trial.number, **record_as_row(record))

        def on_round(federation: Federation, record: RoundRecord) -> None:
            self._write(federation, record, ends_job=record.round == job.rounds)
            enter(record)

        # A copy of a trial starts with the state that its parent had.
        if trial.parent is not None and not self._store.latest(trial.number):
            parent = yield from self._federation(self._ledger.trials[trial.parent].trial, first, order)
            self._store.inherit(trial.number, parent.round, parent.inherited_state())
        # A study that was stopped had trained some of the rounds already.
        latest = self._store.latest(trial.number)
        for record in self._store.past_rounds.of(trial.number, first, min(latest, job.rounds)):
            enter(record)
        if latest < job.rounds:
            checkpoint = yield from self._checkpoint(trial, latest, order)
            yield from train(self._setup, trial, checkpoint, job.rounds, order, on_round)
        both_readings = self._settings.max_rounds < self._settings.total_rounds
        if not self._tuner.kind.searches and both_readings and job.rounds == self._settings.max_rounds:
            yield from self._personalise("at_max_rounds", trial, job.rounds)

    def _write(self, federation: Federation, record: RoundRecord, *, ends_job: bool) -> None:
        """Writes a new round down, with the federation's state if the round was evaluated and a checkpoint is due.

        Raises InputError if every client failed in the first round of trial 0, and the user had given up none of them:
        then the client program is at fault.
        """
        trial = federation.trial.number
        outcome = federation.strategy.outcome
        reasons = outcome.failures if outcome is not None else []
        all_failed = 0 < record.cohort == record.failed
        if (trial, record.round) == (0, 1) and all_failed and not self._setup.lost_clients.in_round(trial, 1):
            raise InputError(f"every client failed in the first round, the first with: {reasons[0]}")
        saved = record.evaluation is not None and (ends_job or self._store.due(trial))
        self._store.write(trial, record, federation.arrays() if saved else None)
        if reasons:
            self._journal.note("lost", trial=trial, round=record.round, reasons=reasons)
            self._say("lost", reasons=reasons)

    def _federation(self, trial: Trial, server_round: int, order: float) -> Generator[Ticket, None, Federation]:
        """The trial's federation after a round."""
        checkpoint = yield from self._checkpoint(trial, server_round, order)
        return (yield from train(self._setup, trial, checkpoint, server_round, order, ignore))

    def _checkpoint(
        self, trial: Trial, server_round: int, order: float
    ) -> Generator[Ticket, None, Mapping[str, np.ndarray] | None]:
        """The trial's checkpoint of a round; None for round 0. If it is lost, it is trained again, to the same bits."""
        if server_round == 0:
            return None
        try:
            arrays = self._store.load(trial.number, server_round)
        except InputError as error:
            self._say("warning", message=f"{error}; trial {trial.number} is trained again")
            arrays = None
        if arrays is not None:
            return arrays
        start = None
        if trial.parent is not None:
            inherited_round = self._ledger.trials[trial.number].start
            parent = yield from self._federation(self._ledger.trials[trial.parent].trial, inherited_round, order)
            start = parent.inherited_state()
        federation = yield from train(self._setup, trial, start, server_round, order, ignore)
        arrays = federation.arrays()
        self._store.replace(trial.number, server_round, arrays)
        return arrays

    def _personalise(self, reading: str, trial: Trial, rounds: int) -> Generator[Ticket, None, None]:
        """Evaluates the trial after local training on each evaluation client, unless the ledger has that reading."""
        key = reading, trial.number, rounds
        if key in self._ledger.personalised:
            return
        federation = yield from self._federation(trial, rounds, order=0.0)
        best = federation.best_config()
        config_of = (lambda client: best) if reading == "argmax" else federation.sampled_config
        evaluation = yield from federation.personalise(config_of, self._setup.lost_clients.now())
        self._ledger.personalised[key] = evaluation
        self._journal.note(
            "personalised", reading=reading, trial=trial.number, round=rounds, evaluation=list(evaluation)
        )

    def _waiting(self, work: Generator[Ticket, None, Made]) -> Generator[None, None, Made]:
        """What `work` returns. Yields as long as a ticket that `work` waits for is not finished."""
        while True:
            try:
                ticket = next(work)
            except StopIteration as end:
                made: Made = end.value
                return made
            while not self._setup.executor.finished(ticket):
                yield
