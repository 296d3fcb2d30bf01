"""A worker process of the pool: reads tasks, writes updates into shared memory, answers with metrics."""

import os
import signal
import threading
import time
from multiprocessing.connection import Connection

from fedtune.data.federated_dataset import DatasetSpec, FederatedDataset
from fedtune.simulation.executors.machine import Machine, MachineSettings
from fedtune.simulation.executors.shared_memory import SharedArray
from fedtune.tasks import Failure, Metrics, Result, Task, Update

NewBlock = int  # a block's number; its memory follows
Chunk = list[tuple[int, int, Task]]  # block, row for the update, task
Answer = list[Metrics | Failure | list[Metrics]]  # an Update's metrics; its weights lie in the row


def main(connection: Connection, lifeline: Connection, settings: MachineSettings, spec: DatasetSpec) -> None:
    """Serves until the connection or the parent is gone. The first message is "ready"."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, args=(lifeline,), daemon=True).start()
    x, y, ranges = (SharedArray.receive(connection) for _ in range(3))
    dataset = FederatedDataset("shared", spec, x.array, y.array, [""] * len(ranges.array), ranges.array)
    machine = Machine(settings, dataset)
    blocks: dict[int, SharedArray] = {}
    connection.send("ready")
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if isinstance(message, NewBlock):
            blocks[message] = SharedArray.receive(connection)
        else:
            started = time.perf_counter()
            answer = [_run(machine, blocks[block], row, task) for block, row, task in message]
            connection.send((time.perf_counter() - started, answer))


def _run(machine: Machine, block: SharedArray, row: int, task: Task) -> Metrics | Failure | list[Metrics]:
    rows = block.tensor()
    result: Result = machine.run(rows[0], task)
    if isinstance(result, Update):
        rows[row].copy_(result.weights)
        return result.metrics
    return result


def _exit_with_parent(lifeline: Connection) -> None:
    # Only the parent holds the other end, so this read ends when the parent does, however it died.
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os._exit(1)
