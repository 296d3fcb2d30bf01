"""A study: one tuner over federations, on a virtual clock.

The tuner's jobs run in virtual time, `parallel_trials` at once; a job's virtual duration is known before it is trained,
so the jobs in flight are really computed side by side, on any number of workers, and delivered to the tuner in virtual
order.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import Settings
from fedtune.simulation import checkpoint
from fedtune.simulation.clock import Clock
from fedtune.simulation.evaluation import Evaluation, evaluation_clients
from fedtune.simulation.federation import Federation, RoundRecord, record_as_dict
from fedtune.simulation.journal import Journal
from fedtune.tasks import Executor
from fedtune.tuning.fedex import FedExSettings
from fedtune.tuning.trial import Job, Score, Trial, Tuner, incumbent

ROUND_TIME = 1.0  # virtual time of a round

Listener = Callable[[dict[str, Any]], None]


@dataclass
class RunningJob:
    """A job in flight: its federation, and the ticket that its training waits for (None once it is trained)."""

    job: Job
    started: float
    finishes: float
    federation: Federation
    training: Iterator[int]
    ticket: int | None = None


@dataclass
class TrialHistory:
    """What is kept of a trial between its jobs; its weights lie in the checkpoint."""

    trial: Trial
    records: list[RoundRecord] = field(default_factory=list)
    rounds: int = 0  # of its jobs that were started
    score: float = float("nan")
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class StudyResult:
    """A study's rows of rounds.parquet, trials.parquet and results.csv."""

    rounds: list[dict[str, Any]]
    trials: list[dict[str, Any]]
    result: dict[str, Any]


class Study:
    """One tuner with one seed, from its first ask until the next job no longer fits into `total_rounds`."""

    def __init__(
        self,
        name: str,
        seed: int,
        tuner: Tuner,
        settings: Settings,
        fedex_settings: FedExSettings,
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
        self._fedex_settings = fedex_settings
        self._dataset = dataset
        self._executor = executor
        self._initial_weights = initial_weights
        self._evaluation_clients: Int[np.ndarray, client] = evaluation_clients(
            dataset.num_clients, settings.evaluation.clients, seed
        )
        self._checkpoints = folder / "checkpoints"
        self._checkpoints.mkdir(parents=True)
        self._journal = Journal(folder / "journal.jsonl")
        self._listener = listener
        self._one_federation = one_federation
        self._clock: Clock[RunningJob] = Clock()
        self._running: list[RunningJob] = []
        self._trials: dict[int, TrialHistory] = {}
        self._scores: list[Score] = []
        self._incumbents: list[tuple[float, int]] = []  # (virtual time, trial), from each tell on
        self._personalised: dict[str, Evaluation] = {}  # by reading: at_max_rounds, sampled, argmax
        self._spent = 0  # rounds of all jobs that were started
        self._exhausted = False

    def run(self) -> StudyResult:
        """Runs the study to its end."""
        self._journal.write("study", tuner=self.name, seed=self.seed)
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
            history = self._trials.setdefault(job.trial.number, TrialHistory(job.trial))
            num_rounds = job.rounds - history.rounds
            if self._spent + num_rounds > self._settings.total_rounds:
                self._exhausted = True
                return
            self._spent += num_rounds
            history.rounds = job.rounds
            self._start(job, num_rounds, history)

    def _start(self, job: Job, num_rounds: int, history: TrialHistory) -> None:
        started, finishes = self._clock.time, self._clock.time + num_rounds * ROUND_TIME
        self._journal.write(
            "ask",
            trial=job.trial.number,
            rung=job.rung,
            rounds=job.rounds,
            started=started,
            finishes=finishes,
            **_plan(job.trial),
        )
        federation = self._federation(history, started)
        federation.grid.order = finishes
        training = federation.advance(job.rounds, self._settings.evaluate_every)
        running = RunningJob(job, started, finishes, federation, training)
        running.ticket = next(training)
        self._running.append(running)
        self._clock.schedule(finishes, running)

    def _federation(self, history: TrialHistory, started: float) -> Federation:
        strategy = FedTuneStrategy(
            history.trial,
            self._settings.server,
            self._fedex_settings,
            cohort_size=self._settings.cohort_size,
            num_classes=self._dataset.spec.num_classes,
            seed=self.seed,
        )
        rounds_before = len(history.records)

        def on_round(trial: Trial, record: RoundRecord) -> None:
            time = started + (record.round - rounds_before) * ROUND_TIME
            row = {"trial": trial.number, "virtual_time": time, **record_as_dict(record)}
            history.rows.append(row)
            self._journal.write("round", **row)
            self._listener({"event": "round", "tuner": self.name, "seed": self.seed, **row})

        federation = Federation(
            strategy, self._initial_weights, self._dataset, self._executor, self._evaluation_clients, on_round
        )
        if rounds_before:
            federation.restore(checkpoint.load(self._checkpoint(history.trial)), history.records)
        else:
            federation.records = history.records
        return federation

    def _compute(self) -> None:
        """Moves every federation on whose ticket is finished; if there is none, computes until something is."""
        ready = [
            running
            for running in self._running
            if running.ticket is not None and self._executor.finished(running.ticket)
        ]
        for running in ready:
            running.ticket = next(running.training, None)
            if running.ticket is None:
                self._running.remove(running)
                checkpoint.save(self._checkpoint(running.job.trial), running.federation.arrays())
        if not ready:
            self._executor.step()

    def _deliver(self, running: RunningJob) -> None:
        job, federation = running.job, running.federation
        history = self._trials[job.trial.number]
        history.score = federation.tail("validation_error")
        history.rows[-1]["score"] = history.score
        self._journal.write(
            "tell", trial=job.trial.number, rung=job.rung, rounds=job.rounds, time=self._clock.time, score=history.score
        )
        self._tuner.tell(job, history.score)
        self._scores.append(Score(job.trial.number, job.rounds, history.score))
        best = incumbent(self._scores)
        assert best is not None
        self._incumbents.append((self._clock.time, best.trial))
        self._listener(
            {
                **{"event": "incumbent", "tuner": self.name, "seed": self.seed, "trial": best.trial},
                **{"validation_error": best.error, "test_error": _last_test_error(self._trials[best.trial].records)},
            }
        )
        if self._one_federation and job.rounds == self._settings.max_rounds < self._settings.total_rounds:
            self._personalised["at_max_rounds"] = self._personalise(federation, federation.sampled_config)

    def _personalise(self, federation: Federation, config_of: Callable[[int], Any]) -> Evaluation:
        into: list[Evaluation] = []
        for ticket in federation.personalise(config_of, into):
            while not self._executor.finished(ticket):
                self._executor.step()
        return into[0]

    def _finish(self) -> StudyResult:
        best = incumbent(self._scores)
        assert best is not None
        federation = self._federation(self._trials[best.trial], self._clock.time)
        self._personalised["sampled"] = self._personalise(federation, federation.sampled_config)
        self._personalised["argmax"] = (
            self._personalise(federation, lambda client: federation.best_config())
            if federation.trial.num_configs > 1
            else self._personalised["sampled"]
        )
        for history in self._trials.values():
            if history.trial.number != best.trial:
                self._checkpoint(history.trial).unlink(missing_ok=True)
        self._journal.write("end", incumbent=best.trial, time=self._clock.time)
        self._journal.close()
        self._listener({"event": "study_end", "tuner": self.name, "seed": self.seed})
        rounds = self._round_rows()
        return StudyResult(rounds, self._trial_rows(), self._result_row(federation, best, rounds))

    def _round_rows(self) -> list[dict[str, Any]]:
        rows = sorted(
            (row for history in self._trials.values() for row in history.rows),
            key=lambda row: (row["virtual_time"], row["trial"]),
        )
        tells = iter([*self._incumbents, (float("inf"), -1)])
        time, trial = next(tells)
        current = 0 if self._one_federation else -1
        for spent, row in enumerate(rows, start=1):
            while time <= row["virtual_time"]:
                current = trial
                time, trial = next(tells)
            row |= {"tuner": self.name, "seed": self.seed, "spent": spent, "incumbent": current}
            row.setdefault("score", float("nan"))
        return rows

    def _trial_rows(self) -> list[dict[str, Any]]:
        return [
            {
                **{"tuner": self.name, "seed": self.seed, "trial": number, "rounds": history.rounds},
                **{"score": history.score, "test_error": _last_test_error(history.records)},
                "config": json.dumps(_plan(history.trial)),
            }
            for number, history in sorted(self._trials.items())
        ]

    def _result_row(self, federation: Federation, best: Score, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        max_rounds = self._settings.max_rounds
        at_max_rounds = self._personalised.get("at_max_rounds", self._personalised["sampled"])
        totals = {
            name: sum(row[name] for row in rounds) for name in ("client_updates", "bytes", "lost", "dropped", "clipped")
        }
        return {
            **{"tuner": self.name, "seed": self.seed, "trials": len(self._trials), "trial": best.trial},
            **{
                "rounds": len(rounds),
                "max_rounds": max_rounds,
                "rounds_of_trial": best.rounds,
                "virtual_time": self._clock.time,
                **totals,
            },
            "validation_error": federation.tail("validation_error"),
            "test_error": federation.tail("test_error"),
            "test_error_last": _last_test_error(federation.records),
            "test_error_personalised": self._personalised["sampled"].test_error,
            "test_error_personalised_argmax": self._personalised["argmax"].test_error,
            "test_error_at_max_rounds": federation.tail("test_error", max_rounds),
            "test_error_personalised_at_max_rounds": at_max_rounds.test_error,
            "config": json.dumps({"server": dict(federation.trial.server), "client": dict(federation.best_config())}),
            "theta": json.dumps([theta.tolist() for theta in federation.theta()]),
        }

    def _checkpoint(self, trial: Trial) -> Path:
        return self._checkpoints / f"trial-{trial.number}.safetensors"


def _plan(trial: Trial) -> dict[str, Any]:
    return {"server": dict(trial.server), "pool": [[dict(config) for config in factor] for factor in trial.pool]}


def _last_test_error(records: list[RoundRecord]) -> float:
    evaluations = [record.evaluation for record in records if record.evaluation is not None]
    return evaluations[-1].test_error if evaluations else float("nan")
