"""Which executor a run uses, and how studies that run at once share it."""

import functools
from collections.abc import Callable

from fedtune.client.tasks import Executor
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.executors.batched import BatchedMachine
from fedtune.executors.machine import MachineSettings
from fedtune.executors.pool import PoolExecutor
from fedtune.executors.processes import num_workers
from fedtune.executors.serial import SerialExecutor
from fedtune.settings import Settings, client_program_name


def make_executor(settings: Settings, dataset: FederatedDataset, say: Callable[[str], None]) -> Executor:
    """The executor that the settings name.

    `auto` is the pool on a CPU if there is more than one worker, serial if there is one, and batched on another device.
    """
    machine = MachineSettings(settings.model, client_program_name(settings), settings.device, settings.precision)
    workers = num_workers(settings.workers)
    if settings.executor == "pool" or (settings.executor == "auto" and workers > 1 and settings.device == "cpu"):
        return PoolExecutor(machine, dataset, workers)
    if settings.batches_clients:
        return SerialExecutor(machine, dataset, functools.partial(BatchedMachine, say=say))
    return SerialExecutor(machine, dataset)


def for_study(executor: Executor, settings: Settings, tuner: str) -> Executor:
    """The executor for a study of this tuner. Studies that run at once share the pool's workers."""
    if isinstance(executor, PoolExecutor) and settings.parallel_studies > 1:
        return executor.for_study(settings.shares.get(tuner, 1.0))
    return executor
