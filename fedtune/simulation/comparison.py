"""A comparison: several studies, paired by seed, in one run folder. `train` and `tune` are comparisons of one tuner."""

import functools
import json
import os
import platform
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fedtune import plugins
from fedtune.data.checks import errors_of, find_problems, first_of
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError, UnknownNameError
from fedtune.flat_model import FlatModel, StoredExamples
from fedtune.objectives import check_outputs
from fedtune.server.trials import (
    Hyperparameters,
    client_program,
    initial_weights,
    make_compose,
    make_draw,
    resolve_hyperparameters,
)
from fedtune.settings import Settings, write_settings
from fedtune.simulation.devices import check_jobs_can_end, quantities
from fedtune.simulation.executors import num_workers
from fedtune.simulation.executors.batched import BatchedMachine
from fedtune.simulation.executors.machine import MachineSettings
from fedtune.simulation.executors.pool import PoolExecutor
from fedtune.simulation.executors.serial import SerialExecutor
from fedtune.simulation.results import StudyResult
from fedtune.simulation.run_folder import locked, replacing
from fedtune.simulation.study import Listener, Study
from fedtune.tasks import Executor
from fedtune.tuning.policy import Policy
from fedtune.tuning.space import SearchSpace
from fedtune.tuning.trial import Trial, Tuner
from fedtune.tuning.tuners import checked_options, make_policy, make_tuner, within_one_federation

VERSIONED = ("fedtune", "torch", "numpy", "flwr", "pandas", "flwr-datasets")


@dataclass(frozen=True)
class Comparison:
    """Settings that were checked against the data set, the model, the client program and the tuners they name."""

    settings: Settings
    dataset: FederatedDataset
    hyperparameters: Hyperparameters
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
        executor = self.make_executor(lambda message: listener({"event": "warning", "message": message}))
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
                share = self._share(executor, name)
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

    def _share(self, executor: Executor, name: str) -> Executor:
        """The executor as a study of this tuner sees it: studies that run at once share the pool's workers."""
        if isinstance(executor, PoolExecutor) and self.settings.parallel_studies > 1:
            return executor.for_study(self.settings.shares.get(name, 1.0))
        return executor

    def make_executor(self, say: Callable[[str], None]) -> Executor:
        """The executor that the settings name; `auto` is the pool on a CPU of several cores, and batched elsewhere."""
        settings = self.settings
        machine = MachineSettings(settings.model, client_program(settings), settings.device, settings.precision)
        workers = num_workers(settings.workers)
        if settings.executor == "pool" or (settings.executor == "auto" and workers > 1 and settings.device == "cpu"):
            return PoolExecutor(machine, self.dataset, workers)
        if settings.batches_clients:
            return SerialExecutor(machine, self.dataset, functools.partial(BatchedMachine, say=say))
        return SerialExecutor(machine, self.dataset)

    def _study(self, name: str, seed: int, executor: Executor, folder: Path, listener: Listener) -> Study:
        settings, options = self.settings, self.settings.tuner.get(name, {})

        def policy(trial: Trial) -> Policy:
            return make_policy(
                name,
                options,
                trial,
                max_rounds=settings.max_rounds,
                num_classes=self.dataset.spec.num_classes,
                domains=self.hyperparameters.space.client,
                seed=seed,
            )

        return Study(
            name,
            seed,
            study_tuner(name, seed, settings, self.hyperparameters),
            settings,
            policy,
            self.dataset,
            executor,
            initial_weights(settings, self.dataset.spec, seed),
            folder / f"{name}-seed{seed}",
            listener,
            one_federation=within_one_federation(name),
        )


def study_tuner(name: str, seed: int, settings: Settings, hyperparameters: Hyperparameters) -> Tuner:
    """The tuner of a study, before its first ask."""
    options = settings.tuner.get(name, {})
    return make_tuner(
        name,
        make_draw(name, seed, hyperparameters, options),
        max_rounds=settings.max_rounds,
        total_rounds=settings.total_rounds,
        options=options,
        compose=make_compose(name, seed, hyperparameters, options),
        space=hyperparameters.space,
        seed=seed,
    )


def prepare(settings: Settings) -> Comparison:
    """The comparison, after every check that needs no training. Raises InputError, one line; writes nothing."""
    hyperparameters = resolve_hyperparameters(settings)
    check_device(settings)
    check_tuners(settings, hyperparameters.space)
    check_devices(settings)
    dataset = plugins.load_dataset(settings.data)
    problems = find_problems(dataset, quick=True)
    if errors := errors_of(problems):
        raise InputError(f"data set {settings.data['name']}: {first_of(errors)}")
    if settings.cohort_size > dataset.num_clients:
        raise InputError(
            f"cohort_size must be at most the number of clients, {dataset.num_clients}, got {settings.cohort_size}"
        )
    check_model(settings, dataset)
    return Comparison(settings, dataset, hyperparameters, first_of(problems) if problems else None)


def check_model(settings: Settings, dataset: FederatedDataset) -> None:
    """Raises InputError unless the model can be made, takes the data set's examples and returns what they need."""
    spec, name = dataset.spec, settings.model["name"]
    stored_x, stored_y = dataset.examples(0, "train")
    x, y = StoredExamples(stored_x[:2], stored_y[:2], spec, "cpu").all()
    weights = initial_weights(settings, spec, settings.seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = FlatModel(plugins.make_model(settings.model, spec), "cpu", spec.objective)
        model.module.eval()
        try:
            outputs = model.outputs(weights, x)
            check_outputs(spec.objective, outputs, y, spec.num_outputs)
        except InputError as error:
            raise InputError(f"model {name!r} does not fit data set {dataset.name!r}: {error}") from None
        except Exception as error:  # a model is anybody's code
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"model {name!r} can't take an example of data set {dataset.name!r}: {reason}") from None


def check_tuners(settings: Settings, space: SearchSpace) -> None:
    """Raises InputError unless every tuner can be made from its table and has something to search."""
    for name, options in settings.tuner.items():
        checked_options(name, options)  # a table of a tuner that is not run must be right all the same
    for name in settings.shares:
        if name not in settings.tuners:
            raise UnknownNameError("tuner in shares", name, settings.tuners)
    for name in settings.tuners:
        try:
            make_tuner(
                name,
                lambda number: Trial(number, {}, (({},),)),
                max_rounds=settings.max_rounds,
                total_rounds=settings.total_rounds,
                options=settings.tuner.get(name, {}),
                compose=lambda number, server, client: Trial(number, {}, (({},),)),
                space=space,
            )
        except UnknownNameError:
            raise
        except InputError as error:
            raise InputError(f"tuner {name}: {error}") from None
    searching = [name for name in settings.tuners if name != "manual"]
    if searching and not space.client and not space.server:
        raise InputError(f"[space.client] or [space.server] must name what {searching[0]} may search, got neither")


def check_devices(settings: Settings) -> None:
    """Raises InputError unless the table `[devices]` makes sense, and jobs that are tried until they end can end."""
    quantities(settings.devices)
    within = any(within_one_federation(name) for name in settings.tuners)
    if within:
        check_jobs_can_end(settings.devices, max(settings.max_rounds, settings.total_rounds - settings.max_rounds))
    elif settings.devices.on_drop == "retry":
        check_jobs_can_end(settings.devices, settings.max_rounds)


def check_device(settings: Settings) -> None:
    """Raises InputError unless torch can use the device."""
    try:
        torch.empty(1, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device must be one that torch can use here, got {settings.device!r}: {reason}") from None
    if settings.executor == "pool" and settings.device != "cpu":
        raise InputError(f"executor 'pool' must be used with device 'cpu', got device {settings.device!r}")


def claim_folder(folder: Path, settings: Settings, *, force: bool) -> None:
    """Makes a run folder with its settings; never overwrites one without `force`, nor anything that is no run."""
    if folder.exists():
        if not force:
            raise InputError(f"--out {folder} exists; choose another, or give --force to overwrite it")
        if not (folder / "settings.toml").is_file():
            raise InputError(f"--out {folder} exists and is not a run folder; it is not overwritten even with --force")
        with locked(folder):
            shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out must be a folder that can be made, got {folder}: {error.strerror}") from None
    with replacing(folder / "environment.json") as path:
        path.write_text(json.dumps(environment(), indent=2) + "\n")
    with replacing(folder / "settings.toml") as path:
        path.write_text(write_settings(settings))


def check_versions(folder: Path, listener: Listener) -> None:
    """Warns where a run was begun with other versions. Raises InputError where its environment.json is damaged."""
    path = folder / "environment.json"
    try:
        begun = json.loads(path.read_text())["versions"]
        different = [f"{name} {begun[name]}, now {now}" for name in VERSIONED if (now := version(name)) != begun[name]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} must say which versions the run was begun with, got {reason}") from None
    if different:
        message = f"the run was begun with {'; '.join(different)}: its numbers may not be those of either version"
        listener({"event": "warning", "message": message})


def environment() -> dict[str, Any]:
    """What a run was computed with."""
    return {
        "versions": {name: version(name) for name in VERSIONED},
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": {
            **{"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
            **{"torch": torch.backends.cpu.get_cpu_capability()},
        },
    }


def _commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def write_frames(folder: Path, results: list[StudyResult], timings: list[dict[str, Any]]) -> None:
    """Writes rounds.parquet, trials.parquet, results.csv and timings.csv, the last of which alone holds real times."""
    with replacing(folder / "rounds.parquet") as path:
        pd.DataFrame([row for result in results for row in result.rounds])[ROUND_COLUMNS].to_parquet(path)
    with replacing(folder / "trials.parquet") as path:
        pd.DataFrame([row for result in results for row in result.trials]).to_parquet(path)
    with replacing(folder / "timings.csv") as path:
        pd.DataFrame(timings).to_csv(path, index=False)
    with replacing(folder / "results.csv") as path:
        pd.DataFrame([result.result for result in results]).to_csv(path, index=False)


ROUND_COLUMNS = [
    *("tuner", "seed", "trial", "round", "virtual_time", "spent", "incumbent", "score"),
    *(
        "asked",
        "late",
        "left",
        "unavailable",
        "cohort",
        "lost",
        "dropped",
        "clipped",
        "client_updates",
        "bytes",
        "error",
        "loss",
        "entropy",
    ),
    *("validation_error", "validation_error_se", "validation_loss", "test_error", "test_loss"),
]
