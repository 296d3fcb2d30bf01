"""A study: one tuner over federations, on a virtual clock.

The tuner's jobs run in virtual time, `parallel_trials` at once; a job's virtual duration is known before it is trained,
so the jobs in flight are really computed side by side, on any number of workers, and delivered to the tuner in virtual
order.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import Settings
from fedtune.simulation.clock import Clock
from fedtune.simulation.evaluation import Evaluation, evaluation_clients
from fedtune.simulation.federation import Federation, RoundRecord, record_as_row
from fedtune.simulation.journal import FORMAT, Journal
from fedtune.simulation.results import StudyResult, plan, result_row, round_rows, trial_rows
from fedtune.simulation.trial_store import TrialHistory, TrialStore
from fedtune.tasks import Executor
from fedtune.tuning.policy import Policy
from fedtune.tuning.space import Config
from fedtune.tuning.trial import Job, Score, Trial, Tuner, incumbent

ROUND_TIME = 1.0  # virtual time of a round

Listener = Callable[[dict[str, Any]], None]


@dataclass
class RunningJob:
    """A job in flight. `training` yields the tickets it waits for; `ticket` is the present one, None once trained."""

    job: Job
    history: TrialHistory
    training: Iterator[int]
    ticket: int | None = None


class Study:
    """One tuner with one seed, from its first ask until the next job no longer fits into `total_rounds`."""

    def __init__(
        self,
        name: str,
        seed: int,
        tuner: Tuner,
        settings: Settings,
        make_policy: Callable[[Trial], Policy],
        dataset: FederatedDataset,
        executor: Executor,
        initial_weights: Float[torch.Tensor, "weight"],
        folder: Path,
        listener: Listener,
        *,
        one_federation: bool,
    ) -> None:
        self.name = name
        self.seed = seed
        self._tuner = tuner
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
        self._clock: Clock[RunningJob] = Clock()
        self._running: list[RunningJob] = []
        self._trials: dict[int, TrialHistory] = {}
        self._scores: list[Score] = []
        self._incumbents: list[tuple[float, int]] = []  # (virtual time, trial), from each tell on
        self._personalised = {
            line["reading"]: Evaluation(*line["evaluation"]) for line in self._journal.notes("personalised")
        }  # by reading: at_max_rounds, sampled, argmax
        self._spent = 0  # rounds of all jobs that were started
        self._exhausted = False

    def run(self) -> StudyResult:
        """Runs the study to its end, or goes on with one that was stopped."""
        with contextlib.closing(self._journal):
            self._journal.decide(
                "study", format=FORMAT, tuner=self.name, seed=self.seed, settings=digest(self._settings)
            )
            self._start_jobs()
            while self._clock:
                while self._clock.peek().ticket is not None:
                    self._compute()
                self._deliver(self._clock.take())
                self._start_jobs()
            return self._finish()

    def _start_jobs(self) -> None:
        while len(self._clock) < self._settings.parallel_trials and not self._exhausted:
            job = self._tuner.ask()
            if job is None:
                return
            history = self._trials.get(job.trial.number) or self._new_history(job.trial)
            num_rounds = job.rounds - history.told
            if self._spent + num_rounds > self._settings.total_rounds:
                self._exhausted = True
                return
            self._spent += num_rounds
            self._trials[job.trial.number] = history
            self._start(job, num_rounds, history)

    def _new_history(self, trial: Trial) -> TrialHistory:
        return TrialHistory(trial, start=0 if trial.parent is None else self._trials[trial.parent].told)

    def _start(self, job: Job, num_rounds: int, history: TrialHistory) -> None:
        started, finishes = self._clock.time, self._clock.time + num_rounds * ROUND_TIME
        self._journal.decide(
            "ask",
            trial=job.trial.number,
            rung=job.rung,
            rounds=job.rounds,
            started=started,
            finishes=finishes,
            **plan(job.trial),
        )
        running = RunningJob(job, history, self._train(job, history, started, finishes))
        running.ticket = next(running.training, None)
        if running.ticket is not None:
            self._running.append(running)
        self._clock.schedule(finishes, running)

    def _train(self, job: Job, history: TrialHistory, started: float, finishes: float) -> Iterator[int]:
        """Brings the trial to the job's last round: from the journal as far as it knows, then by training."""
        number, first = job.trial.number, history.told

        def on_round(record: RoundRecord) -> None:
            history.records.append(record)
            history.times.append(started + (record.round - first) * ROUND_TIME)
            self._listener(
                {"event": "round", "tuner": self.name, "seed": self.seed, "trial": number, **record_as_row(record)}
            )

        def on_new_round(federation: Federation, record: RoundRecord) -> None:
            self._store.write(federation, record)
            if reasons := federation.strategy.lost_reasons:
                self._journal.note("lost", trial=number, round=record.round, reasons=reasons)
                self._listener({"event": "lost", "tuner": self.name, "seed": self.seed, "reasons": reasons})
            on_round(record)

        if job.trial.parent is not None and first == history.start:
            self._store.inherit(number, job.trial.parent)
        known = min(self._store.latest(number), job.rounds)
        for record in self._store.past_records(number, first, known):
            on_round(record)
        if known < job.rounds:
            federation = self._federation(job.trial, on_new_round)
            federation.grid.order = finishes
            yield from federation.advance(job.rounds, self._settings.evaluate_every)

    def _federation(self, trial: Trial, on_round: Callable[[Federation, RoundRecord], None]) -> Federation:
        """The trial's federation as its latest checkpoint left it, or before its first round."""
        strategy = FedTuneStrategy(
            trial,
            self._settings.server,
            self._make_policy(trial),
            cohort_size=self._settings.cohort_size,
            seed=self.seed,
        )
        federation = Federation(
            strategy, self._initial_weights, self._dataset, self._executor, self._evaluation_clients, on_round
        )
        if self._store.latest(trial.number):
            self._store.restore(federation)
        return federation

    def _compute(self) -> None:
        """Moves on every federation whose ticket is finished; if there is none, computes until there is."""
        ready = [
            running
            for running in self._running
            if running.ticket is not None and self._executor.finished(running.ticket)
        ]
        for running in ready:
            running.ticket = next(running.training, None)
            if running.ticket is None:
                self._running.remove(running)
        if not ready:
            self._executor.step()

    def _deliver(self, running: RunningJob) -> None:
        job, history = running.job, running.history
        number = job.trial.number
        score = history.scores[job.rounds] = history.tail("validation_error")
        self._journal.decide("tell", trial=number, rung=job.rung, rounds=job.rounds, time=self._clock.time, score=score)
        self._store.told(number, job.rounds)
        self._tuner.tell(job, score)
        self._scores.append(Score(number, job.rounds, score))
        best = incumbent(self._scores)
        assert best is not None
        self._incumbents.append((self._clock.time, best.trial))
        self._listener(
            {
                **{"event": "incumbent", "tuner": self.name, "seed": self.seed, "trial": best.trial},
                **{"validation_error": best.error, "test_error": self._trials[best.trial].last_test_error()},
            }
        )
        if self._one_federation and job.rounds == self._settings.max_rounds < self._settings.total_rounds:
            self._personalise("at_max_rounds", job.trial, Federation.sampled_config)

    def _personalise(self, reading: str, trial: Trial, config_of: Callable[[Federation, int], Config]) -> None:
        """Evaluates the trial after local training on each evaluation client, unless the journal has that reading."""
        if reading in self._personalised:
            return
        federation = self._federation(trial, lambda federation, record: None)
        into: list[Evaluation] = []
        for ticket in federation.personalise(lambda client: config_of(federation, client), into):
            while not self._executor.finished(ticket):
                self._executor.step()
        self._personalised[reading] = into[0]
        self._journal.note("personalised", reading=reading, trial=trial.number, evaluation=list(into[0]))

    def _finish(self) -> StudyResult:
        best = incumbent(self._scores)
        assert best is not None
        history = self._trials[best.trial]
        self._personalise("sampled", history.trial, Federation.sampled_config)
        if history.trial.num_configs > 1:
            self._personalise("argmax", history.trial, lambda federation, client: federation.best_config())
        self._journal.decide("end", incumbent=best.trial, time=self._clock.time)
        self._store.keep_only(best.trial)
        self._listener({"event": "study_end", "tuner": self.name, "seed": self.seed})
        federation = self._federation(history.trial, lambda federation, record: None)
        return StudyResult(
            round_rows(self.name, self.seed, self._trials, self._incumbents, one_federation=self._one_federation),
            trial_rows(self.name, self.seed, self._trials),
            {
                **{"tuner": self.name, "seed": self.seed, "trials": len(self._trials), "trial": best.trial},
                **{"max_rounds": self._settings.max_rounds, "virtual_time": self._clock.time},
                **result_row(self._trials, best.trial, self._settings.max_rounds, self._personalised),
                "config": json.dumps({"server": dict(history.trial.server), "client": dict(federation.best_config())}),
                "theta": json.dumps([theta.tolist() for theta in federation.theta()]),
            },
        )


def digest(settings: Settings) -> str:
    """A fingerprint of the settings that decide a study's numbers, other than its budget."""
    fields = settings.model_dump(
        mode="json", exclude={"tuners", "seeds", "seed", "workers", "executor", "total_rounds"}
    )
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
