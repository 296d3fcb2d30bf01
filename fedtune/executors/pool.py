"""The pool executor: persistent worker processes of one thread each, weights and updates in shared memory.

`fedtune.executors.schedule` decides which tasks a worker gets; this module sends them, receives the answers and keeps
the workers alive. A worker that dies is replaced and its tasks run again; a task that ends its worker twice is a
failure of its client. If two workers die before they are ready, and no worker became ready in between, the run ends
with an error.
"""

import itertools
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

import torch
from torch import Tensor

from fedtune.client.tasks import Failure, Result, Task, Ticket, TrainTask, Update, describe
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.executors.machine import MachineSettings, side_by_side
from fedtune.executors.processes import end_process, start_forkserver, start_process
from fedtune.executors.schedule import Load, Piece, Schedule, task_cost
from fedtune.executors.shared_memory import SharedArray, share
from fedtune.executors.worker import Answer, Chunk, main


@dataclass
class Batch:
    """A submitted batch: row 0 of its block holds the weights, row i + 1 the update of task i."""

    tasks: Sequence[Task]
    block: int
    rows: Sequence[Tensor]  # of the block
    results: list[Result | None]
    num_missing: int


@dataclass
class Worker:
    """A worker process as the parent sees it."""

    process: BaseProcess
    connection: Connection
    ready: bool = False
    blocks: set[int] = field(default_factory=set)  # the blocks that it has access to
    load: Load = field(default_factory=deque)


class PoolExecutor:
    """See `fedtune.client.tasks.Executor`. Workers work in the folder in which the executor was made."""

    def __init__(self, settings: MachineSettings, dataset: FederatedDataset, num_workers: int) -> None:
        start_forkserver()
        self._settings = settings
        self._dataset = dataset
        self._folder = os.getcwd()
        self._data = {name: share(array) for name, array in dataset.shared().items()}
        self._schedule = Schedule()
        self._schedule.add_study(1.0)  # study 0: tasks that are submitted to the pool itself
        self._tickets = itertools.count()
        self._batches: dict[int, Batch] = {}
        self._blocks: list[SharedArray] = []
        self._free_blocks: list[int] = []
        self._deaths_before_ready = 0
        self._num_together: int | None = None  # clients that a worker trains at a time; known once one is ready
        self._workers = [self._start_worker() for _ in range(num_workers)]

    def describe(self) -> str:
        """Where clients train. It waits until a worker is ready: only a ready worker knows `num_together`."""
        while self._num_together is None:
            self._wait()
        count = len(self._workers)
        return f"in {count} worker process{'es' * (count > 1)}{side_by_side(self._num_together)}"

    def for_study(self, share: float) -> "StudyExecutor":
        """The pool for a study, which gets workers in proportion to its share while others have work too."""
        return StudyExecutor(self, self._schedule.add_study(share))

    def submit(self, weights: Tensor, tasks: Sequence[Task], order: float = 0.0, study: int = 0) -> Ticket:
        """A ticket for this batch, which waits in the queue of the study."""
        # Put the weights into shared memory that has a row for each update too.
        num_updates = len(tasks) if any(isinstance(task, TrainTask) for task in tasks) else 0
        block = self._take_block(1 + num_updates, weights.numel())
        rows = torch.from_numpy(self._blocks[block].array).unbind()
        rows[0].copy_(weights)
        # Let the tasks wait.
        ticket = Ticket(next(self._tickets))
        self._batches[ticket] = Batch(tasks, block, rows, [None] * len(tasks), len(tasks))
        for index, task in enumerate(tasks):
            self._schedule.add(order, Piece(study, ticket, index, task_cost(task, self._dataset)))
        self._dispatch()
        return ticket

    def step(self) -> None:
        """Blocks until a worker has answered, is ready or has died; does nothing when there is nothing to do."""
        if all(batch.num_missing == 0 for batch in self._batches.values()):
            return
        self._wait()

    def finished(self, ticket: Ticket) -> bool:
        """True once all results of the ticket are there."""
        return self._batches[ticket].num_missing == 0

    def collect(self, ticket: Ticket) -> list[Result]:
        """The results of a finished ticket, in the order of its tasks."""
        return cast(list[Result], self._batches[ticket].results)

    def release(self, ticket: Ticket) -> None:
        """Gives back the memory of the ticket's updates."""
        self._free_blocks.append(self._batches.pop(ticket).block)

    def close(self) -> None:
        """Kills all workers."""
        for worker in self._workers:
            end_process(worker.process, worker.connection)
        self._workers = []

    def _wait(self) -> None:
        """Blocks until a worker has answered, is ready or has died."""
        events = wait([end for worker in self._workers for end in (worker.connection, worker.process.sentinel)])
        for worker in list(self._workers):
            if worker.connection in events:
                self._receive(worker)
            elif worker.process.sentinel in events:  # only once its connection was drained
                self._replace(worker)
        self._dispatch()

    def _take_block(self, num_rows: int, num_weights: int) -> int:
        """The smallest free block that is large enough, or a new one."""
        fitting = [block for block in self._free_blocks if len(self._blocks[block].array) >= num_rows]
        if not fitting:
            self._blocks.append(SharedArray((num_rows, num_weights), "<f4"))
            return len(self._blocks) - 1
        block = min(fitting, key=lambda block: len(self._blocks[block].array))
        self._free_blocks.remove(block)
        return block

    def _dispatch(self) -> None:
        """Gives every idle worker a chunk, then a second one to those that will soon be done."""
        loads = [worker.load for worker in self._workers]
        for num_chunks in (0, 1):
            for worker in [worker for worker in self._workers if worker.ready and len(worker.load) == num_chunks]:
                if chunk := self._schedule.next_chunk(worker.load, loads):
                    self._send(worker, chunk)

    def _send(self, worker: Worker, chunk: list[Piece]) -> None:
        message: Chunk = []
        try:
            for piece in chunk:
                batch = self._batches[piece.ticket]
                if batch.block not in worker.blocks:
                    worker.connection.send(batch.block)
                    self._blocks[batch.block].send(worker.connection)
                    worker.blocks.add(batch.block)
                message.append((batch.block, piece.index + 1, batch.tasks[piece.index]))
            worker.connection.send(message)
        except OSError:  # the worker is dead, through no fault of this chunk
            self._schedule.put_back(chunk)
        else:
            worker.load.append(chunk)

    def _receive(self, worker: Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # it died, perhaps in the middle of a message
            self._replace(worker)
            return
        if isinstance(message, Failure):
            raise InputError(f"a worker process can't start: {message.message}")
        if isinstance(message, int):
            worker.ready, self._num_together, self._deaths_before_ready = True, message, 0
        else:
            self._take_answer(worker.load.popleft(), message)

    def _take_answer(self, chunk: list[Piece], answer: Answer) -> None:
        self._schedule.measure_speed(chunk, answer.seconds)
        for piece, result in zip(chunk, answer.results, strict=True):
            if isinstance(result, dict):
                self._record(piece, Update(self._batches[piece.ticket].rows[piece.index + 1], result))
            else:
                self._record(piece, result)

    def _record(self, piece: Piece, result: Result) -> None:
        batch = self._batches[piece.ticket]
        batch.results[piece.index] = result
        batch.num_missing -= 1
        self._schedule.finish(piece)

    def _replace(self, worker: Worker) -> None:
        """Replaces a dead worker, and queues its tasks again."""
        end_process(worker.process, worker.connection)
        exit_code = worker.process.exitcode
        # A worker that can't even start would be replaced for ever.
        if not worker.ready:
            self._deaths_before_ready += 1
            if self._deaths_before_ready > 1:
                raise RuntimeError(f"worker processes end before they are ready, exit code {exit_code}")
        for piece in self._schedule.worker_died(worker.load):
            task = self._batches[piece.ticket].tasks[piece.index]
            reason = f"ended its worker process twice, exit code {exit_code}"
            self._record(piece, Failure(f"{describe(task)}: {reason}"))
        self._workers[self._workers.index(worker)] = self._start_worker()

    def _start_worker(self) -> Worker:
        return Worker(*start_process(main, self._folder, self._settings, self._dataset.spec, self._data))


class StudyExecutor:
    """The pool as one of several studies sees it: only what it submits waits in the study's own queue."""

    def __init__(self, pool: PoolExecutor, study: int) -> None:
        self._pool = pool
        self._study = study

    def describe(self) -> str:
        """Where clients train."""
        return self._pool.describe()

    def submit(self, weights: Tensor, tasks: Sequence[Task], order: float = 0.0) -> Ticket:
        """A ticket for this batch."""
        return self._pool.submit(weights, tasks, order, self._study)

    def step(self) -> None:
        """Blocks until a worker of the pool has answered, is ready or has died."""
        self._pool.step()

    def finished(self, ticket: Ticket) -> bool:
        """True once all results of the ticket are there."""
        return self._pool.finished(ticket)

    def collect(self, ticket: Ticket) -> list[Result]:
        """The results of a finished ticket, in the order of its tasks."""
        return self._pool.collect(ticket)

    def release(self, ticket: Ticket) -> None:
        """Gives back the memory of the ticket's updates."""
        self._pool.release(ticket)

    def close(self) -> None:
        """Kills all workers of the pool, which other studies may use too."""
        self._pool.close()
