"""The pool executor: persistent worker processes of one thread each, weights and updates in shared memory.

Work of all batches waits in one queue: smaller `order` first, then the longest task first. Short tasks travel in
chunks. A worker that dies is replaced and its tasks run again; a task that kills its worker twice is a failure of its
client.
"""

import heapq
import itertools
import multiprocessing
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

from torch import Tensor

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.simulation.executors import start_forkserver, worker
from fedtune.simulation.executors.machine import MachineSettings
from fedtune.simulation.executors.shared_memory import SharedArray
from fedtune.tasks import EvaluateTask, Failure, Result, Task, TrainTask, Update

CHUNK_SECONDS = 0.01  # shorter tasks are sent several at a time
STEP_COST = 16  # a step of local SGD costs about as much as this many examples


@dataclass
class Batch:
    """A submitted batch: row 0 of its block holds the weights, row i + 1 the update of task i."""

    tasks: Sequence[Task]
    block: int
    results: list[Result | None]
    num_missing: int


@dataclass
class Piece:
    """A task in the queue."""

    ticket: int
    index: int
    cost: float
    num_deaths: int = 0  # how many workers died while they had it


@dataclass
class Worker:
    """A worker process as the parent sees it."""

    process: BaseProcess
    connection: Connection
    lifeline: Connection
    ready: bool = False
    blocks: set[int] = field(default_factory=set)  # those that it has access to
    pieces: list[Piece] = field(default_factory=list)  # what it is computing


class PoolExecutor:
    """See `fedtune.tasks.Executor`."""

    def __init__(self, settings: MachineSettings, dataset: FederatedDataset, num_workers: int) -> None:
        start_forkserver()
        self._settings = settings
        self._dataset = dataset
        self._data = [SharedArray.copy_of(array) for array in (dataset.x, dataset.y, dataset.ranges)]
        self._queue: list[tuple[float, float, int, Piece]] = []
        self._sequence = itertools.count()
        self._batches: dict[int, Batch] = {}
        self._blocks: list[SharedArray] = []
        self._free_blocks: list[int] = []
        self._seconds_per_cost = 0.0
        self._deaths_before_ready = 0
        self._workers = [self._start_worker() for _ in range(num_workers)]

    def submit(self, weights: Tensor, tasks: Sequence[Task], order: float = 0.0) -> int:
        """A ticket for this batch."""
        num_rows = 1 + (len(tasks) if isinstance(tasks[0], TrainTask) else 0)
        ticket = next(self._sequence)
        block = self._take_block(num_rows, weights)
        self._batches[ticket] = Batch(tasks, block, [None] * len(tasks), len(tasks))
        for index, task in enumerate(tasks):
            self._enqueue(order, Piece(ticket, index, self._cost(task)))
        self._dispatch()
        return ticket

    def step(self) -> None:
        """Blocks until a worker has answered or died; does nothing when none is at work."""
        busy = [worker for worker in self._workers if worker.pieces or not worker.ready]
        if not busy:
            return
        events = wait([worker.connection for worker in busy] + [worker.process.sentinel for worker in busy])
        for worker_ in busy:
            if worker_.connection in events:
                self._receive(worker_)
            elif worker_.process.sentinel in events:  # only once its connection was drained
                self._replace(worker_)
        self._dispatch()

    def finished(self, ticket: int) -> bool:
        """True once all results of the ticket are there."""
        return self._batches[ticket].num_missing == 0

    def collect(self, ticket: int) -> list[Result]:
        """The results of a finished ticket, in the order of its tasks."""
        return cast(list[Result], self._batches[ticket].results)

    def release(self, ticket: int) -> None:
        """Gives back the memory of the ticket's updates."""
        self._free_blocks.append(self._batches.pop(ticket).block)

    def close(self) -> None:
        """Kills all workers."""
        for worker_ in self._workers:
            worker_.process.kill()
        for worker_ in self._workers:
            worker_.process.join()
            worker_.connection.close()
            worker_.lifeline.close()
        self._workers = []

    def _take_block(self, num_rows: int, weights: Tensor) -> int:
        for block in self._free_blocks:
            if self._blocks[block].array.shape[0] >= num_rows:
                self._free_blocks.remove(block)
                break
        else:
            block = len(self._blocks)
            self._blocks.append(SharedArray.empty((num_rows, weights.numel()), "<f4"))
        self._blocks[block].tensor()[0].copy_(weights)
        return block

    def _cost(self, task: Task) -> float:
        if isinstance(task, EvaluateTask):
            sizes = self._dataset.ranges[list(task.clients), 1:]
            return float((sizes[..., 1] - sizes[..., 0]).sum()) / 4
        start, stop = self._dataset.ranges[task.client, 0]
        num_train = int(stop - start)
        num_steps = -(-num_train // max(1, int(task.config.get("batch_size", num_train))))
        return float(task.config.get("epochs", 1) * (num_train + STEP_COST * num_steps))

    def _enqueue(self, order: float, piece: Piece) -> None:
        heapq.heappush(self._queue, (order, -piece.cost, next(self._sequence), piece))

    def _dispatch(self) -> None:
        idle = [worker for worker in self._workers if worker.ready and not worker.pieces]
        while idle and self._queue:
            worker_ = idle.pop()
            worker_.pieces = self._next_chunk()
            message: worker.Chunk = []
            for piece in worker_.pieces:
                batch = self._batches[piece.ticket]
                if batch.block not in worker_.blocks:
                    worker_.blocks.add(batch.block)
                    worker_.connection.send(batch.block)
                    self._blocks[batch.block].send(worker_.connection)
                message.append((batch.block, piece.index + 1, batch.tasks[piece.index]))
            worker_.connection.send(message)

    def _next_chunk(self) -> list[Piece]:
        chunk = [heapq.heappop(self._queue)[-1]]
        seconds = chunk[0].cost * self._seconds_per_cost
        # Never more than a fair share of what waits, so that no worker idles at the end; nothing beside a suspect.
        share = -(-(len(self._queue) + 1) // len(self._workers))
        while self._queue and len(chunk) < share and 0 < seconds < CHUNK_SECONDS and chunk[0].num_deaths == 0:
            if self._queue[0][-1].num_deaths > 0:
                break
            chunk.append(heapq.heappop(self._queue)[-1])
            seconds += chunk[-1].cost * self._seconds_per_cost
        return chunk

    def _receive(self, worker_: Worker) -> None:
        try:
            message = worker_.connection.recv()
        except (EOFError, ConnectionError):
            self._replace(worker_)
            return
        if message == "ready":
            worker_.ready, self._deaths_before_ready = True, 0
            return
        seconds, answer = message
        pieces, worker_.pieces = worker_.pieces, []
        self._seconds_per_cost = seconds / sum(piece.cost for piece in pieces)
        for piece, result in zip(pieces, answer, strict=True):
            batch = self._batches[piece.ticket]
            if isinstance(result, dict):
                result = Update(self._blocks[batch.block].tensor()[piece.index + 1], result)
            self._record(piece, result)

    def _record(self, piece: Piece, result: Result) -> None:
        batch = self._batches[piece.ticket]
        batch.results[piece.index] = result
        batch.num_missing -= 1

    def _replace(self, worker_: Worker) -> None:
        worker_.process.join()
        worker_.connection.close()
        worker_.lifeline.close()
        if not worker_.ready:
            self._deaths_before_ready += 1
            if self._deaths_before_ready > 1:
                raise RuntimeError(f"worker processes end before they are ready, exit code {worker_.process.exitcode}")
        for piece in worker_.pieces:
            piece.num_deaths += 1
            task = self._batches[piece.ticket].tasks[piece.index]
            if piece.num_deaths > 1:
                self._record(
                    piece, Failure(f"{task} ended its worker process twice, exit code {worker_.process.exitcode}")
                )
            else:
                self._enqueue(-float("inf"), piece)
        self._workers[self._workers.index(worker_)] = self._start_worker()

    def _start_worker(self) -> Worker:
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        their_lifeline, our_lifeline = context.Pipe(duplex=False)
        process = context.Process(
            target=worker.main, args=(theirs, their_lifeline, self._settings, self._dataset.spec), daemon=True
        )
        # A worker would import the user's script again, which fails without an `if __name__ == "__main__"` and on
        # stdin.
        main_module = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            process.start()
        finally:
            sys.modules["__main__"] = main_module
        theirs.close()
        their_lifeline.close()
        for array in self._data:
            array.send(ours)
        return Worker(process, ours, our_lifeline)
