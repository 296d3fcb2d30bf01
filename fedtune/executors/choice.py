"""Which executor a run uses, and how studies that run at once share it."""

import functools

from fedtune.client.tasks import Executor
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.executors.batched import BatchedMachine
from fedtune.executors.machine import Machine, machine_settings
from fedtune.executors.pool import PoolExecutor
from fedtune.executors.processes import num_workers
from fedtune.executors.serial import SerialExecutor
from fedtune.executors.watch import Warn
from fedtune.settings import Settings


def make_executor(settings: Settings, dataset: FederatedDataset, warn: Warn) -> Executor:
    """The executor that the settings name. `warn` is called with each warning.

    `auto` is the pool on a CPU if there is more than one worker or a limit of `[watch]`, serial if there is one worker,
    and batched on another device.
    """
    machine = machine_settings(settings)
    workers = num_workers(settings.workers)
    several = workers > 1 or settings.watch.limit is not None
    if settings.executor == "pool" or (settings.executor == "auto" and several and settings.device == "cpu"):
        return PoolExecutor(machine, dataset, workers, settings.watch, warn)
    make_machine = functools.partial(BatchedMachine, say=warn) if settings.batches_clients else Machine
    return SerialExecutor(machine, dataset, make_machine, settings.watch, warn)


def for_study(executor: Executor, settings: Settings, tuner: str) -> Executor:
    """The executor for a study of this tuner. Studies that run at once share the pool's workers."""
    if isinstance(executor, PoolExecutor) and settings.parallel_studies > 1:
        return executor.for_study(settings.shares.get(tuner, 1.0))
    return executor
