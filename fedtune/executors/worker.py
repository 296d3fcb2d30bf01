"""A worker process of the pool: reads tasks, writes updates into shared memory, answers with metrics."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue

import numpy as np
import torch

from fedtune.client.tasks import Failure, Metrics, Task, Update
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.spec import DatasetSpec
from fedtune.executors.machine import Machine, MachineSettings
from fedtune.executors.shared_memory import receive

READY = "ready"  # the message of a worker that can work
NewBlock = int  # a block's number; its memory follows
Chunk = list[tuple[int, int, Task]]  # block, row for the update, task


@dataclass(frozen=True)
class Answer:
    """The results of a chunk. Only the metrics of an Update are here: its weights lie in the task's row."""

    seconds: float
    results: list[Metrics | Failure | list[Metrics]]


def main(
    connection: Connection,
    folder: str,
    settings: MachineSettings,
    spec: DatasetSpec,
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Does what the parent sends, in `folder`, until the parent is gone.

    The first message to the parent is READY, or a Failure that says why the machine can't be made.
    """
    blocks: dict[int, torch.Tensor] = {}
    chunks: SimpleQueue[Chunk] = SimpleQueue()
    threading.Thread(target=_read, args=(connection, blocks, chunks), daemon=True).start()
    try:
        os.chdir(folder)  # plug-ins may be named by a path relative to it
        machine = Machine(settings, FederatedDataset.from_shared(spec, arrays))
    except Exception as error:
        connection.send(Failure(f"{type(error).__name__}: {error}"))
        return
    connection.send(READY)
    while True:
        chunk = chunks.get()
        started = time.perf_counter()
        results = [_run(machine, blocks[block], row, task) for block, row, task in chunk]
        connection.send(Answer(time.perf_counter() - started, results))


def _read(connection: Connection, blocks: dict[int, torch.Tensor], chunks: "SimpleQueue[Chunk]") -> None:
    """Takes in what the parent sends, so that the parent never waits for the end of a task.

    Ends the process when the parent is gone.
    """
    try:
        while True:
            message = connection.recv()
            if isinstance(message, NewBlock):
                blocks[message] = torch.from_numpy(_receive(connection))
            else:
                chunks.put(message)
    finally:
        # This read ends however the parent died: no other process holds the other end.
        os._exit(1)


def _receive(connection: Connection) -> np.ndarray:
    """The block that the parent sends. If there is no memory for it, no client is to blame: the process is killed."""
    try:
        return receive(connection)
    except (MemoryError, OSError):
        signal.raise_signal(signal.SIGKILL)
        raise


def _run(machine: Machine, rows: torch.Tensor, row: int, task: Task) -> Metrics | Failure | list[Metrics]:
    """The task's result. An update's weights are written into its row of the block."""
    result = machine.run(rows[0], task)
    if isinstance(result, Update):
        rows[row].copy_(result.weights)
        return result.metrics
    return result
