"""A comparison: several studies, paired by seed, in one run folder. `train` and `tune` are comparisons of one tuner."""

import time
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedtune.client.tasks import Executor
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.events import Listener
from fedtune.executors.choice import for_study, make_executor
from fedtune.hyperparameters import (
    Hyperparameters,
    initial_weights,
    study_tuner,
)
from fedtune.runs.environment import check_versions
from fedtune.runs.results import StudyResult, write_frames
from fedtune.runs.run_folder import locked
from fedtune.runs.study import Study
from fedtune.settings import Settings
from fedtune.tuning.policy import Policy
from fedtune.tuning.trial import Trial
from fedtune.tuning.tuner_kind import TunerSettings


@dataclass(frozen=True)
class Comparison:
    """Settings that were checked against the data set, the model, the client program and the tuners they name."""

    settings: Settings
    dataset: FederatedDataset
    hyperparameters: Hyperparameters
    tuners: Mapping[str, TunerSettings]
    warning: str | None = None  # what the check of the data set found, if it found anything

    def run(self, folder: Path, listener: Listener) -> None:
        """Runs every study, each tuner under each seed, in a folder from `claim_folder`; goes on with a stopped run."""
        with locked(folder):
            check_versions(folder, listener)
            self._run(folder, listener)

    def _run(self, folder: Path, listener: Listener) -> None:
        settings = self.settings
        studies = [
            (name, seed) for seed in range(settings.seed, settings.seed + settings.seeds) for name in settings.tuners
        ]
        plan = [{"tuner": name, "seed": seed, "total_rounds": settings.last_total_rounds} for name, seed in studies]
        listener({"event": "plan", "studies": plan})
        if self.warning:
            listener({"event": "warning", "message": f"data set {settings.data['name']}: {self.warning}"})
        executor = make_executor(
            settings, self.dataset, lambda message: listener({"event": "warning", "message": message})
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the server's sums too must not depend on the machine's cores
        try:
            ended = self._run_studies(studies, executor, folder, listener)
        finally:
            executor.close()
            torch.set_num_threads(threads)
        results = [ended[study][0] for study in studies]
        timings = [{"tuner": name, "seed": seed, "wall_seconds": ended[name, seed][1]} for name, seed in studies]
        write_frames(folder, results, timings)

    def _run_studies(
        self, studies: list[tuple[str, int]], executor: Executor, folder: Path, listener: Listener
    ) -> dict[tuple[str, int], tuple[StudyResult, float]]:
        """Each study's result and the seconds it took, `parallel_studies` of them at a time."""
        waiting = deque(studies)
        told = False
        running: dict[tuple[str, int], tuple[Generator[None, None, StudyResult], float]] = {}
        ended: dict[tuple[str, int], tuple[StudyResult, float]] = {}
        while waiting or running:
            while waiting and len(running) < self.settings.parallel_studies:
                name, seed = waiting.popleft()
                share = for_study(executor, self.settings, name)
                running[name, seed] = self._study(name, seed, share, folder, listener).steps(), time.perf_counter()
            before = len(ended)
            for study, (steps, started) in list(running.items()):
                try:
                    next(steps)
                except StopIteration as end:
                    ended[study] = end.value, time.perf_counter() - started
                    del running[study]
            if len(ended) == before:
                if not told:  # only now, for a run folder that can't be gone on with has its own line
                    listener({"event": "executor", "message": f"clients train {executor.describe()}"})
                    told = True
                executor.step()
        return ended

    def _study(self, name: str, seed: int, executor: Executor, folder: Path, listener: Listener) -> Study:
        settings, tuner = self.settings, self.tuners[name]

        def policy(trial: Trial) -> Policy:
            num_classes, domains = self.dataset.spec.num_classes, self.hyperparameters.space.client
            return tuner.policy.make_policy(trial, num_classes, domains, seed)

        return Study(
            tuner,
            seed,
            study_tuner(tuner, seed, self.hyperparameters),
            settings,
            policy,
            self.dataset,
            executor,
            initial_weights(settings, self.dataset.spec, seed),
            folder / f"{name}-seed{seed}",
            listener,
        )
