"""A comparison: several studies, paired by seed, in one run folder. `train` and `tune` are comparisons of one tuner."""

import contextlib
import json
import shlex
import time
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedtune.client.tasks import Executor
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import ClientStopped, RunStopped
from fedtune.events import Listener
from fedtune.executors.choice import for_study, make_executor
from fedtune.executors.engine import Engine
from fedtune.files import make_folder, remove_unfinished
from fedtune.hyperparameters import Hyperparameters, not_searched
from fedtune.initial_weights import initial_weights
from fedtune.runs.environment import check_versions
from fedtune.runs.history import past_personalised
from fedtune.runs.journal import Journal
from fedtune.runs.journal_lines import pool_as_json
from fedtune.runs.ledger import Ledger
from fedtune.runs.lost_clients import LostClients, keep_lost_clients
from fedtune.runs.recorded import check_kernel, run_format
from fedtune.runs.result_files import write_frames
from fedtune.runs.results import StudyResult, round_rows, trial_rows
from fedtune.runs.run_folder import locked
from fedtune.runs.study import Study
from fedtune.runs.trained_jobs import Chosen, TrainedJobs
from fedtune.runs.training import TrainingSetup
from fedtune.runs.trial_store import TrialStore
from fedtune.settings import Settings
from fedtune.simulation.devices import Devices
from fedtune.simulation.evaluation import evaluation_clients
from fedtune.study_tuners import study_tuner
from fedtune.tuning.policy import Policy
from fedtune.tuning.trial import Trial
from fedtune.tuning.tuner_kind import TunerSettings

Key = tuple[str, int]  # a study: its tuner and its seed


@dataclass
class RunningStudy:
    """A study that is not finished: its steps, and the moment in real time at which it began."""

    steps: Generator[None, None, StudyResult]
    started: float


@dataclass(frozen=True)
class Comparison:
    """A run that is ready to start: its settings, data set, hyperparameters and tuners.

    The settings were checked against the data set, the model, the client program and the tuners that they name.
    """

    settings: Settings
    dataset: FederatedDataset
    hyperparameters: Hyperparameters
    tuners: Mapping[str, TunerSettings]
    engine: Engine  # in which clients train; `settings` name it
    warning: str | None = None  # what the check of the data set found, if it found anything

    def run(self, folder: Path, listener: Listener) -> None:
        """Runs every study, each tuner under each seed, in a folder from `claim_folder`, and writes the results there.

        A run that was stopped is resumed. If a client takes longer than `[watch]` allows, the run may go on without it:
        the studies are then resumed from their journals at once. Raises RunStopped, which says how to go on, if
        something else stops the run.
        """
        with locked(folder):
            remove_unfinished(folder)
            check_versions(folder, listener)
            check_kernel(self.settings, folder, self.engine.kernel)
            settings = self.settings
            ended = False
            while not ended:
                if settings.lost_clients:
                    keep_lost_clients(folder, settings.lost_clients)
                try:
                    replace(self, settings=settings)._run(folder, listener)
                    ended = True
                except RunStopped as stopped:
                    settings = go_on_without_client(stopped, settings, folder)
                    listener({"event": "warning", "message": f"{stopped}; the run goes on without this client"})

    def _run(self, folder: Path, listener: Listener) -> None:
        settings = self.settings
        plan = [
            {"tuner": name, "seed": seed, "total_rounds": settings.last_total_rounds} for name, seed in settings.studies
        ]
        listener({"event": "plan", "studies": plan})
        fixed = not_searched(settings, self.hyperparameters)
        if fixed and settings.tuners != ["manual"]:
            listener({"event": "space", "message": f"not searched: {fixed}"})
        if self.warning:
            listener({"event": "warning", "message": f"data set {settings.data['name']}: {self.warning}"})
        executor = make_executor(
            settings,
            self.dataset,
            lambda message, **fields: listener({"event": "warning", "message": message, **fields}),
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the server's sums too must not depend on the machine's cores
        try:
            results, seconds = self._run_studies(executor, folder, listener)
        finally:
            executor.close()
            torch.set_num_threads(threads)
        timings = [
            {"tuner": name, "seed": seed, "wall_seconds": seconds[name, seed]} for name, seed in settings.studies
        ]
        write_frames(folder, [results[study] for study in settings.studies], timings)

    def _run_studies(
        self, executor: Executor, folder: Path, listener: Listener
    ) -> tuple[dict[Key, StudyResult], dict[Key, float]]:
        """The result of each study and the seconds it took. `parallel_studies` of them run at a time."""
        journal_format = run_format(self.settings, folder)
        waiting = deque(self.settings.studies)
        running: dict[Key, RunningStudy] = {}
        results: dict[Key, StudyResult] = {}
        seconds: dict[Key, float] = {}
        said_where_clients_train = False
        while waiting or running:
            # Start as many studies as may run at once.
            while waiting and len(running) < self.settings.parallel_studies:
                name, seed = waiting.popleft()
                share = for_study(executor, self.settings, name)
                running[name, seed] = RunningStudy(
                    self._study(name, seed, share, folder, journal_format, listener), time.perf_counter()
                )
            # Let each study decide and submit until it waits for the executor.
            num_ended = 0
            for key, study in list(running.items()):
                try:
                    next(study.steps)
                except StopIteration as end:
                    results[key], seconds[key] = end.value, time.perf_counter() - study.started
                    del running[key]
                    num_ended += 1
            # If all of them wait, let the executor compute.
            if num_ended == 0:
                if not said_where_clients_train:  # not before: if the run can't be resumed, its error must come first
                    message = f"clients train {self.engine.describe(executor.describe())}"
                    listener({"event": "executor", "message": message})
                    said_where_clients_train = True
                executor.step()
        return results, seconds

    def _study(
        self, name: str, seed: int, executor: Executor, folder: Path, journal_format: int, listener: Listener
    ) -> Generator[None, None, StudyResult]:
        """Runs a study to its end. Yields whenever it waits for the executor."""

        def say(event: str, **fields: Any) -> None:
            listener({"event": event, "tuner": name, "seed": seed, **fields})

        tuner = self.tuners[name]
        study_folder = folder / f"{name}-seed{seed}"
        make_folder(study_folder, exist_ok=True)
        path, kernel = study_folder / "journal.jsonl", self.engine.kernel
        with contextlib.closing(Journal(path, new_format=journal_format, new_kernel=kernel)) as journal:
            ledger = Ledger(self.settings, format_3=journal.format == 3)
            ledger.personalised = past_personalised(journal)
            store = TrialStore(journal, study_folder / "checkpoints")
            lost_clients = LostClients(self.dataset.client_ids, self.settings.lost_clients, journal, store)
            setup = self._setup(tuner, seed, executor, lost_clients)
            jobs = TrainedJobs(tuner, setup, ledger, journal, store, say)
            made = study_tuner(tuner, seed, self.hyperparameters)
            study = Study(tuner, seed, made, self.settings, ledger, journal, jobs, say)
            yield from study.steps()
            assert ledger.best is not None
            chosen = yield from jobs.chosen(ledger.best)
            say("study_end")
            return StudyResult(
                round_rows(name, seed, ledger.trials, ledger.incumbents, searches=tuner.kind.searches),
                trial_rows(name, seed, ledger.trials),
                _result_row(name, seed, ledger, study.time, chosen),
            )

    def _setup(self, tuner: TunerSettings, seed: int, executor: Executor, lost_clients: LostClients) -> TrainingSetup:
        settings, dataset = self.settings, self.dataset

        def policy(trial: Trial) -> Policy:
            num_classes, domains = dataset.spec.num_classes, self.hyperparameters.space.client
            return tuner.policy.make_policy(trial, num_classes, domains, seed)

        weights = initial_weights(settings, dataset.spec, seed)
        return TrainingSetup(
            f"tuner {tuner.name}, seed {seed}",
            settings,
            seed,
            dataset,
            executor,
            weights,
            evaluation_clients(dataset.num_clients, settings.evaluation.clients, seed),
            Devices(settings, seed, dataset.num_examples("train"), weights.nbytes),
            policy,
            lost_clients,
        )


def go_on_without_client(stopped: RunStopped, settings: Settings, folder: Path) -> Settings:
    """The settings with which the run goes on without the client that stopped it.

    Raises RunStopped, in one line that says how to go on, unless the client took too long and `[watch]` says that it is
    lost then. A client that is lost already may still stop a run, if rounds from before its loss are trained again.
    """
    resume = f"fedtune resume {shlex.quote(str(folder))}"
    advice = f"to resume: {resume}"
    if isinstance(stopped, ClientStopped) and stopped.client not in (None, *settings.lost_clients):
        assert stopped.client is not None
        if stopped.at_limit and settings.watch.at_limit == "lose":
            return settings.model_copy(update={"lost_clients": [*settings.lost_clients, stopped.client]})
        advice += f", or without the client: {resume} --lose-client {shlex.quote(stopped.client)}"
    raise RunStopped(f"{stopped}; {advice}") from stopped


def _result_row(name: str, seed: int, ledger: Ledger, time: float, chosen: Chosen) -> dict[str, Any]:
    """The study's row of results.csv."""
    assert ledger.best is not None
    server = ledger.trials[ledger.best.trial].trial.server
    return {
        "tuner": name,
        "seed": seed,
        **ledger.result(time),
        "config": json.dumps({"server": dict(server), "client": dict(chosen.config)}),
        "theta": json.dumps([theta.tolist() for theta in chosen.theta]),
        "pool": json.dumps(pool_as_json(chosen.pool)),
    }
