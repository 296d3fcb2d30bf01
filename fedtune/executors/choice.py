"""Which executor a run uses, and how studies that run at once share it."""

import functools
from typing import TYPE_CHECKING, cast

from fedtune.client.tasks import Executor
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.executors.batched import BatchedMachine
from fedtune.executors.machine import Machine, machine_settings
from fedtune.executors.serial import SerialExecutor
from fedtune.executors.watch import Warn
from fedtune.operating_system import NO_WORKERS, has_workers
from fedtune.settings import Settings

if TYPE_CHECKING:
    from fedtune.executors.pool import PoolExecutor  # it can't be imported if the system has no worker processes


def check_workers(settings: Settings) -> None:
    """Raises InputError if the settings ask for worker processes and the system has none."""
    if has_workers():
        return
    if settings.executor == "pool":
        raise InputError(f"executor must be auto, serial or batched here, got 'pool': {NO_WORKERS}")
    if settings.watch.limit is not None:
        limit = settings.watch.limit
        raise InputError(f"watch.limit must not be set here, where no client can be ended, got {limit:g}: {NO_WORKERS}")


def make_executor(settings: Settings, dataset: FederatedDataset, warn: Warn) -> Executor:
    """The executor that the settings name. `warn` is called with each warning.

    `auto` is the pool on a CPU if there is more than one worker or a limit of `[watch]`, serial if there is one worker,
    and batched on another device. If the system has no worker processes, `auto` is serial on a CPU, and a warning says
    so.
    """
    machine = machine_settings(settings)
    if uses_pool(settings):
        from fedtune.executors.pool import PoolExecutor
        from fedtune.executors.processes import num_workers

        return PoolExecutor(machine, dataset, num_workers(settings.workers), settings.watch, warn)
    if settings.executor == "auto" and settings.device == "cpu" and settings.workers != 1 and not has_workers():
        warn(f"executor auto is serial here: {NO_WORKERS}")
    make_machine = functools.partial(BatchedMachine, say=warn) if settings.batches_clients else Machine
    return SerialExecutor(machine, dataset, make_machine, settings.watch, warn)


def uses_pool(settings: Settings) -> bool:
    """Whether a run with these settings has worker processes."""
    if settings.executor != "auto" or settings.device != "cpu" or not has_workers():
        return settings.executor == "pool"
    from fedtune.executors.processes import num_workers

    return num_workers(settings.workers) > 1 or settings.watch.limit is not None


def for_study(executor: Executor, settings: Settings, tuner: str) -> Executor:
    """The executor for a study of this tuner. Studies that run at once share the pool's workers."""
    if settings.parallel_studies > 1 and uses_pool(settings):
        return cast("PoolExecutor", executor).for_study(settings.shares.get(tuner, 1.0))
    return executor
