"""A study: one tuner over federations, on a virtual clock.

It is the workload of real federations in the event loop of `fedtune.simulation.event_loop`: the `parallel_trials` jobs
in flight are computed side by side, on any number of workers, and delivered to the tuner in virtual order.
"""

import contextlib
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int

from fedtune import rng
from fedtune.client.tasks import Executor
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.events import Listener
from fedtune.runs.history import TrialHistory, past_personalised
from fedtune.runs.journal import FORMAT, Journal
from fedtune.runs.ledger import MOST_ATTEMPTS, extend
from fedtune.runs.results import StudyResult, plan, pool_as_json, result_row, round_rows, trial_rows
from fedtune.runs.trial_store import TrialStore
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import ExtensionSettings, Settings, digest
from fedtune.simulation.devices import Devices
from fedtune.simulation.evaluation import Evaluation, evaluation_clients
from fedtune.simulation.event_loop import Attempt, EventLoop, OnDrop
from fedtune.simulation.federation import Federation
from fedtune.simulation.records import RoundRecord, record_as_row
from fedtune.simulation.stragglers import attempt_duration, dropped_after
from fedtune.tuning.policy import Policy
from fedtune.tuning.space import Config
from fedtune.tuning.trial import Job, Score, Trial, Tuner, incumbent
from fedtune.tuning.tuner_kind import TunerSettings

Made = TypeVar("Made")


@dataclass(eq=False)
class RunningJob(Attempt):
    """A job in flight; `training` yields the tickets it waits for."""

    history: TrialHistory
    training: Iterator[int]
    wasted: int  # rounds that a dropped attempt had done


class Study:
    """One tuner with one seed, from its first ask until the next job no longer fits into the budget."""

    def __init__(
        self,
        tuner_settings: TunerSettings,
        seed: int,
        tuner: Tuner,
        settings: Settings,
        make_policy: Callable[[Trial], Policy],
        dataset: FederatedDataset,
        executor: Executor,
        initial_weights: Float[torch.Tensor, "weight"],
        folder: Path,
        listener: Listener,
    ) -> None:
        one_federation = not tuner_settings.kind.searches
        self.name = tuner_settings.name
        self.seed = seed
        self._settings = settings
        self._make_policy = make_policy
        self._dataset = dataset
        self._executor = executor
        self._initial_weights = initial_weights
        self._evaluation_clients: Int[np.ndarray, client] = evaluation_clients(
            dataset.num_clients, settings.evaluation.clients, seed
        )
        folder.mkdir(exist_ok=True)
        self._journal = Journal(folder / "journal.jsonl")
        self._store = TrialStore(self._journal, folder / "checkpoints")
        self._listener = listener
        self._one_federation = one_federation
        self._tuner = tuner
        self._loop = EventLoop(
            tuner,
            self,
            settings.parallel_trials,
            "retry" if one_federation else settings.devices.on_drop,
            forgets_jobs=tuner_settings.kind.forgets_jobs,
        )
        self._devices = Devices(settings, seed, dataset.num_examples("train"), initial_weights.nbytes)
        self._tickets: dict[RunningJob, int] = {}  # that jobs in training wait for
        self._trials: dict[int, TrialHistory] = {}
        self._scores: list[Score] = []
        self._incumbents: list[tuple[float, int]] = []  # (virtual time, trial), from each tell on
        self._personalised = past_personalised(self._journal)
        self._total_rounds = settings.total_rounds
        self._spent = 0  # rounds of all jobs that were started
        self._dropped_jobs = 0
        self._wasted_rounds = 0
        self._ends_at_max_rounds = tuner_settings.ends_at_max_rounds
        self._ended: set[int] = set()  # trials that had all their rounds, and whose checkpoint is kept

    def steps(self) -> Generator[None, None, StudyResult]:
        """Runs the study to its end, or goes on with one that was stopped.

        Yields where it waits for the executor, which whoever runs it then lets compute.
        """
        with contextlib.closing(self._journal):
            self._journal.decide(
                "study", format=FORMAT, tuner=self.name, seed=self.seed, settings=digest(self._settings)
            )
            yield from self._loop.run()
            best = yield from self._end()
            for extension in self._settings.extensions:
                self._extend(extension)
                yield from self._loop.run()
                best = yield from self._end()
            return (yield from self._result(best))

    def start(self, job: Job, number: int, now: float) -> RunningJob | None:
        """The attempt in flight, journalled; None where the budget has too few rounds left for the job.

        A job is charged to the budget once, when it is first attempted. Of an attempt that will be dropped nothing is
        computed.
        """
        history = self._trials.get(job.trial.number) or self._new_history(job.trial)
        if number == 0:
            num_rounds = job.rounds - history.told
            if self._spent + num_rounds > self._total_rounds:
                return None
            self._spent += num_rounds
        elif number == MOST_ATTEMPTS:
            raise InputError(
                f"devices.drop_probability must let every job end, got {self._settings.devices.drop_probability}: "
                f"a job of {job.rounds - history.told} rounds was dropped {number:,} times"
            )
        self._trials[job.trial.number] = history
        drop_time, ends = self._fate(job, number, history.told)
        finishes = now + (float(ends[-1]) if drop_time is None else drop_time)
        self._journal.decide(
            "ask",
            trial=job.trial.number,
            rung=job.rung,
            rounds=job.rounds,
            attempt=number,
            started=now,
            finishes=finishes,
            dropped=drop_time is not None,
            **plan(job.trial),
        )
        self._say("ask", job, attempt=number, **plan(job.trial))
        if drop_time is not None:
            return RunningJob(job, number, finishes, True, history, iter(()), int((ends <= drop_time).sum()))
        training = self._train(job, history, (now + ends).tolist(), finishes)
        running = RunningJob(job, number, finishes, False, history, training, 0)
        self._train_on(running)
        return running

    def ready(self, attempt: RunningJob) -> bool:
        """Whether the job is trained, once every federation whose ticket is finished was moved on."""
        while attempt in self._tickets:
            finished = [running for running, ticket in self._tickets.items() if self._executor.finished(ticket)]
            if not finished:
                return False
            for running in finished:
                self._train_on(running)
        return True

    def deliver(self, attempt: RunningJob) -> float:
        """The score of the job's trial, journalled."""
        job, history = attempt.job, attempt.history
        number = job.trial.number
        score = history.scores[job.rounds] = history.tail("validation_error")
        self._journal.decide("tell", trial=number, rung=job.rung, rounds=job.rounds, time=self._loop.time, score=score)
        self._store.told(number, job.rounds)
        self._say("tell", job, score=score)
        self._scores.append(Score(number, job.rounds, score))
        best = incumbent(self._scores)
        assert best is not None
        self._incumbents.append((self._loop.time, best.trial))
        if self._ends_at_max_rounds and job.rounds == self._settings.max_rounds:
            self._ended.add(number)
            for dead in self._ended - {best.trial}:
                self._store.remove(dead)
            self._ended &= {best.trial}
        errors = {
            "validation_error": best.error,
            "test_error": self._trials[best.trial].tail("test_error", best.rounds),
        }
        self._listener({"event": "incumbent", "tuner": self.name, "seed": self.seed, "trial": best.trial, **errors})
        return score

    def drop(self, attempt: RunningJob, then: OnDrop) -> None:
        """Journals that the attempt was dropped."""
        job = attempt.job
        self._dropped_jobs += 1
        self._wasted_rounds += attempt.wasted
        self._journal.decide(
            "drop", trial=job.trial.number, rung=job.rung, rounds=job.rounds, time=self._loop.time, then=then
        )
        self._say("drop", job, then=then)

    def _say(self, event: str, job: Job, **fields: Any) -> None:
        about = {"tuner": self.name, "seed": self.seed, "trial": job.trial.number}
        self._listener({"event": event, **about, "rung": job.rung, "rounds": job.rounds, **fields})

    def _fate(self, job: Job, number: int, told: int) -> tuple[float | None, Float[np.ndarray, "round"]]:
        """When the attempt is dropped, None if it is not, and when each of its rounds ends, counted from its start."""
        draws = rng.stream(self.seed, "attempt", job.trial.number, job.rounds, number)
        slowdown = attempt_duration(1.0, self._settings.devices.straggler_std, draws)
        ends = slowdown * self._devices.ends(job.trial, told, job.rounds)
        return dropped_after(float(ends[-1]), self._settings.devices.drop_probability, draws), ends

    def _new_history(self, trial: Trial) -> TrialHistory:
        return TrialHistory(trial, start=0 if trial.parent is None else self._trials[trial.parent].told)

    def _train_on(self, running: RunningJob) -> None:
        """Moves the job's training on to the next ticket it waits for, or to its end."""
        ticket = next(running.training, None)
        if ticket is None:
            self._tickets.pop(running, None)
        else:
            self._tickets[running] = ticket

    def _train(self, job: Job, history: TrialHistory, times: list[float], finishes: float) -> Iterator[int]:
        """Brings the trial to the job's last round: from the journal as far as it knows, then by training.

        `times` are those at which its rounds end.
        """
        number, first = job.trial.number, history.told

        def on_round(record: RoundRecord) -> None:
            history.records.append(record)
            history.times.append(times[record.round - first - 1])
            self._listener(
                {"event": "round", "tuner": self.name, "seed": self.seed, "trial": number, **record_as_row(record)}
            )

        def on_new_round(federation: Federation, record: RoundRecord) -> None:
            self._store.write(federation, record)
            if reasons := federation.strategy.lost_reasons:
                self._journal.note("lost", trial=number, round=record.round, reasons=reasons)
                self._listener({"event": "lost", "tuner": self.name, "seed": self.seed, "reasons": reasons})
            on_round(record)

        if job.trial.parent is not None and not self._store.latest(number):
            source = yield from self._federation(self._trials[job.trial.parent].trial, first, finishes)
            self._store.inherit(source, number)
        known = min(self._store.latest(number), job.rounds)
        for record in self._store.past_records(number, first, known):
            on_round(record)
        if known < job.rounds:
            federation = yield from self._federation(job.trial, self._store.latest(number), finishes, on_new_round)
            yield from federation.advance(job.rounds, self._settings.evaluate_every)
        if self._one_federation and job.rounds == self._settings.max_rounds < self._settings.total_rounds:
            yield from self._personalise("at_max_rounds", job.trial, job.rounds, Federation.sampled_config)

    def _federation(
        self,
        trial: Trial,
        server_round: int,
        order: float,
        on_round: Callable[[Federation, RoundRecord], None] = lambda federation, record: None,
    ) -> Generator[int, None, Federation]:
        """The trial's federation after a round, from its checkpoint; `on_round` is called after every later round.

        Where the checkpoint is gone the trial is trained again, to the same weights.
        """
        federation = self._new_federation(
            trial, lambda federation, record: on_round(federation, record) if record.round > server_round else None
        )
        federation.grid.order = order
        if server_round and not self._restore(federation, server_round):
            history = self._trials[trial.number]
            if trial.parent is not None:
                parent = yield from self._federation(self._trials[trial.parent].trial, history.start, order)
                federation.restore(parent.heritage())
            yield from federation.advance(server_round, self._settings.evaluate_every)
            self._store.replace(federation)
        return federation

    def _restore(self, federation: Federation, server_round: int) -> bool:
        """Puts the federation into the state of its trial's checkpoint of that round; whether there is one, whole."""
        try:
            return self._store.restore(federation, server_round)
        except InputError as error:
            message = f"{error}; trial {federation.trial.number} is trained again"
            self._listener({"event": "warning", "message": message})
            return False

    def _new_federation(self, trial: Trial, on_round: Callable[[Federation, RoundRecord], None]) -> Federation:
        """The trial's federation before its first round."""
        strategy = FedTuneStrategy(
            trial,
            self._settings.server,
            self._make_policy(trial),
            cohort_size=self._settings.cohort_size,
            seed=self.seed,
            cohort_of=lambda server_round: self._devices.plan(trial, server_round).cohort,
        )
        return Federation(
            strategy,
            self._initial_weights,
            self._dataset,
            self._executor,
            self._evaluation_clients,
            lambda server_round: self._devices.plan(trial, server_round),
            on_round,
        )

    def _personalise(
        self, reading: str, trial: Trial, rounds: int, config_of: Callable[[Federation, int], Config]
    ) -> Generator[int, None, None]:
        """Evaluates the trial, which has had so many rounds, after local training on each evaluation client.

        Not where the journal has that reading.
        """
        if (reading, trial.number, rounds) in self._personalised:
            return
        federation = yield from self._federation(trial, rounds, self._loop.time)
        into: list[Evaluation] = []
        yield from federation.personalise(lambda client: config_of(federation, client), into)
        self._personalised[reading, trial.number, rounds] = into[0]
        self._journal.note("personalised", reading=reading, trial=trial.number, round=rounds, evaluation=list(into[0]))

    def _wait(self, work: Generator[int, None, Made]) -> Generator[None, None, Made]:
        """What `work` returns; yields until each of the tickets that it waits for is finished."""
        while True:
            try:
                ticket = next(work)
            except StopIteration as end:
                made: Made = end.value
                return made
            while not self._executor.finished(ticket):
                yield

    def _extend(self, extension: ExtensionSettings) -> None:
        """Gives the tuner more configurations, and a larger budget."""
        self._journal.decide("extend", **extension.model_dump())
        self._total_rounds = extension.total_rounds
        extend(self._tuner, extension)

    def _end(self) -> Generator[None, None, Score]:
        """Reads the incumbent's personalised errors, and journals the end."""
        best = incumbent(self._scores)
        if best is None:
            raise InputError(
                f"devices.drop_probability must let a job end, got {self._settings.devices.drop_probability}: "
                f"tuner {self.name}, seed {self.seed}, lost all of its {self._dropped_jobs} jobs"
            )
        trial, rounds = self._trials[best.trial].trial, best.rounds
        yield from self._wait(self._personalise("sampled", trial, rounds, Federation.sampled_config))
        if trial.num_configs > 1:
            argmax = self._personalise("argmax", trial, rounds, lambda federation, client: federation.best_config())
            yield from self._wait(argmax)
        self._journal.decide("end", incumbent=best.trial, time=self._loop.time)
        return best

    def _result(self, best: Score) -> Generator[None, None, StudyResult]:
        """The study's rows; of the checkpoints the incumbent's alone is kept."""
        history = self._trials[best.trial]
        federation = yield from self._wait(self._federation(history.trial, best.rounds, self._loop.time))
        self._store.keep_only(best.trial)
        self._listener({"event": "study_end", "tuner": self.name, "seed": self.seed})
        return StudyResult(
            round_rows(self.name, self.seed, self._trials, self._incumbents, one_federation=self._one_federation),
            trial_rows(self.name, self.seed, self._trials),
            {
                **{"tuner": self.name, "seed": self.seed, "trials": len(self._trials), "trial": best.trial},
                **{"max_rounds": self._settings.max_rounds, "virtual_time": self._loop.time},
                **{"dropped_jobs": self._dropped_jobs, "wasted_rounds": self._wasted_rounds},
                **result_row(self._trials, best, self._settings.max_rounds, self._personalised),
                "config": json.dumps({"server": dict(history.trial.server), "client": dict(federation.best_config())}),
                "theta": json.dumps([theta.tolist() for theta in federation.theta()]),
                "pool": json.dumps(pool_as_json(federation.pool())),
            },
        )
