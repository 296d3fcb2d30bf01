"""The pool executor: persistent worker processes of one thread each, weights and updates in shared memory.

Work waits in one queue a study: smaller `order` first, then the longest task first. Studies that run at once share the
workers as `fedtune.executors.fair_share` says. Work travels in chunks, and where tasks are short a worker has its next
chunk before it has answered, so that it need not wait for this process. A worker that dies is replaced and its tasks
run again; a task that kills its worker twice is a failure of its client.
"""

import heapq
import itertools
import multiprocessing
import os
import sys
import types
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

import torch
from torch import Tensor

from fedtune.client.tasks import EvaluateTask, Failure, Result, Task, Ticket, TrainTask, Update, describe
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.executors import worker
from fedtune.executors.fair_share import fair_share
from fedtune.executors.machine import MachineSettings, side_by_side
from fedtune.executors.processes import start_forkserver
from fedtune.executors.shared_memory import SharedArray, share

CHUNK_SECONDS = 0.01  # shorter tasks are sent several at a time
STEP_COST = 16  # a step of local SGD costs about as much as this many examples
EVALUATION_COST = 0.25  # evaluating an example costs about as much as training on this many


@dataclass
class Batch:
    """A submitted batch: row 0 of its block holds the weights, row i + 1 the update of task i."""

    tasks: Sequence[Task]
    block: int
    rows: Sequence[Tensor]  # of the block
    results: list[Result | None]
    num_missing: int


@dataclass
class Piece:
    """A task in the queue of its study."""

    study: int
    ticket: int
    index: int
    cost: float
    num_deaths: int = 0  # how many workers died while they had it


@dataclass
class Worker:
    """A worker process as the parent sees it."""

    process: BaseProcess
    connection: Connection
    ready: bool = False
    blocks: set[int] = field(default_factory=set)  # those that it has access to
    chunks: deque[list[Piece]] = field(default_factory=deque)  # what it has not answered; it is at the first

    def cost(self) -> float:
        """The cost of what it has not answered."""
        return sum((piece.cost for chunk in self.chunks for piece in chunk), 0.0)


class StudyExecutor:
    """The pool as one of several studies sees it: what it submits waits in the study's queue."""

    def __init__(self, pool: "PoolExecutor", study: int) -> None:
        self._pool = pool
        self._study = study
        self.describe, self.step, self.finished = pool.describe, pool.step, pool.finished
        self.collect, self.release, self.close = pool.collect, pool.release, pool.close

    def submit(self, weights: Tensor, tasks: Sequence[Task], order: float = 0.0) -> Ticket:
        """A ticket for this batch."""
        return self._pool.submit(weights, tasks, order, self._study)


class PoolExecutor:
    """See `fedtune.client.tasks.Executor`. Workers work in the folder in which the executor was made."""

    def __init__(self, settings: MachineSettings, dataset: FederatedDataset, num_workers: int) -> None:
        start_forkserver()
        self._settings = settings
        self._dataset = dataset
        self._folder = os.getcwd()
        self._data = {name: share(array) for name, array in dataset.shared().items()}
        self._queues: list[list[tuple[float, float, int, Piece]]] = [[]]  # heaps, by study
        self._weights: list[float] = [1.0]  # in the sharing of the workers, by study
        self._sequence = itertools.count()
        self._batches: dict[int, Batch] = {}
        self._blocks: list[SharedArray] = []
        self._free_blocks: list[int] = []
        self._cost_missing = 0.0  # of all tasks that have no result yet
        self._seconds_per_cost = 0.0  # unknown before the first answer
        self._deaths_before_ready = 0
        self._num_together: int | None = None  # clients that a worker trains at a time; known once one is ready
        self._workers = [self._start_worker() for _ in range(num_workers)]

    def describe(self) -> str:
        """Where clients train; waits for the first worker that is ready, which knows."""
        while self._num_together is None:
            self._wait()
        count = len(self._workers)
        return f"in {count} worker process{'es' * (count > 1)}{side_by_side(self._num_together)}"

    def for_study(self, weight: float) -> StudyExecutor:
        """The pool for a study, which gets workers in proportion to its weight while others have work too."""
        self._queues.append([])
        self._weights.append(weight)
        return StudyExecutor(self, len(self._queues) - 1)

    def submit(self, weights: Tensor, tasks: Sequence[Task], order: float = 0.0, study: int = 0) -> Ticket:
        """A ticket for this batch."""
        ticket = Ticket(next(self._sequence))
        num_updates = len(tasks) if any(isinstance(task, TrainTask) for task in tasks) else 0
        block = self._take_block(1 + num_updates, weights.numel())
        rows = torch.from_numpy(self._blocks[block].array).unbind()
        rows[0].copy_(weights)
        self._batches[ticket] = Batch(tasks, block, rows, [None] * len(tasks), len(tasks))
        for index, task in enumerate(tasks):
            piece = Piece(study, ticket, index, self._cost(task))
            self._cost_missing += piece.cost
            self._enqueue(order, piece)
        self._dispatch()
        return ticket

    def step(self) -> None:
        """Blocks until a worker has answered, is ready or has died; does nothing when there is nothing to do."""
        if all(batch.num_missing == 0 for batch in self._batches.values()):
            return
        self._wait()

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
            _end(worker_)
        self._workers = []

    def _wait(self) -> None:
        """Blocks until a worker has answered, is ready or has died."""
        events = wait([end for worker_ in self._workers for end in (worker_.connection, worker_.process.sentinel)])
        for worker_ in list(self._workers):
            if worker_.connection in events:
                self._receive(worker_)
            elif worker_.process.sentinel in events:  # only once its connection was drained
                self._replace(worker_)
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

    def _cost(self, task: Task) -> float:
        if isinstance(task, EvaluateTask):
            sizes = self._dataset.ranges[list(task.clients), 1:]
            return EVALUATION_COST * float((sizes[..., 1] - sizes[..., 0]).sum())
        start, stop = self._dataset.ranges[task.client, 0]
        num_train = int(stop - start)
        num_steps = -(-num_train // max(1, int(task.config.get("batch_size", num_train))))
        return float(task.config.get("epochs", 1) * (num_train + STEP_COST * num_steps))

    def _enqueue(self, order: float, piece: Piece) -> None:
        heapq.heappush(self._queues[piece.study], (order, -piece.cost, next(self._sequence), piece))

    def _dispatch(self) -> None:
        """Gives every idle worker a chunk, then a second one to those that will soon be done."""
        for worker_ in [worker_ for worker_ in self._workers if worker_.ready and not worker_.chunks]:
            if any(self._queues):
                self._send_chunk(worker_)
        for worker_ in [worker_ for worker_ in self._workers if len(worker_.chunks) == 1]:
            # The last tasks are for whoever is done first.
            if (
                sum(map(len, self._queues)) > len(self._workers)
                and self._room(worker_) > 0
                and 0 < self._seconds(worker_.cost()) < 2 * CHUNK_SECONDS
            ):
                self._send_chunk(worker_)

    def _room(self, worker_: Worker) -> float:
        """The cost that the worker is short of its share of all that has no result yet."""
        return self._cost_missing / len(self._workers) - worker_.cost()

    def _seconds(self, cost: float) -> float:
        return cost * self._seconds_per_cost

    def _send_chunk(self, worker_: Worker) -> None:
        chunk = self._next_chunk(self._room(worker_) / 2)  # half: it may be slower than we think
        message: worker.Chunk = []
        try:
            for piece in chunk:
                batch = self._batches[piece.ticket]
                if batch.block not in worker_.blocks:
                    worker_.connection.send(batch.block)
                    self._blocks[batch.block].send(worker_.connection)
                    worker_.blocks.add(batch.block)
                message.append((batch.block, piece.index + 1, batch.tasks[piece.index]))
            worker_.connection.send(message)
        except OSError:  # it is dead, through no fault of this chunk
            for piece in chunk:
                self._enqueue(-float("inf"), piece)
        else:
            worker_.chunks.append(chunk)

    def _next_chunk(self, room: float) -> list[Piece]:
        """The next task and those after it that a chunk of cost `room` has room for."""
        queue = self._queues[self._next_study()]
        chunk = [heapq.heappop(queue)[-1]]
        cost = chunk[0].cost
        while queue and 0 < self._seconds(cost) < CHUNK_SECONDS and cost + queue[0][-1].cost <= room:
            if chunk[0].num_deaths > 0 or queue[0][-1].num_deaths > 0:  # nothing beside a suspect
                break
            chunk.append(heapq.heappop(queue)[-1])
            cost += chunk[-1].cost
        return chunk

    def _next_study(self) -> int:
        """The study that has waiting work and, of as many chunks as will then be under way, is furthest below its
        share.
        """
        waiting = [study for study, queue in enumerate(self._queues) if queue]
        if len(waiting) == 1:
            return waiting[0]
        under_way = [0] * len(self._queues)
        for worker_ in self._workers:
            for chunk in worker_.chunks:
                under_way[chunk[0].study] += 1
        limits = [busy + len(queue) for busy, queue in zip(under_way, self._queues, strict=True)]
        shares = fair_share(sum(under_way) + 1, limits, self._weights)
        return max(waiting, key=lambda study: (shares[study] - under_way[study]) / self._weights[study])

    def _receive(self, worker_: Worker) -> None:
        try:
            message = worker_.connection.recv()
        except (EOFError, OSError):  # it died, perhaps in the middle of a message
            self._replace(worker_)
            return
        if isinstance(message, Failure):
            raise InputError(f"a worker process can't start: {message.message}")
        if isinstance(message, int):
            worker_.ready, self._num_together, self._deaths_before_ready = True, message, 0
        else:
            self._take_answer(worker_.chunks.popleft(), message)

    def _take_answer(self, chunk: list[Piece], answer: worker.Answer) -> None:
        self._seconds_per_cost = answer.seconds / sum(piece.cost for piece in chunk)
        for piece, result in zip(chunk, answer.results, strict=True):
            if isinstance(result, dict):
                self._record(piece, Update(self._batches[piece.ticket].rows[piece.index + 1], result))
            else:
                self._record(piece, result)

    def _record(self, piece: Piece, result: Result) -> None:
        batch = self._batches[piece.ticket]
        batch.results[piece.index] = result
        batch.num_missing -= 1
        self._cost_missing -= piece.cost

    def _replace(self, worker_: Worker) -> None:
        _end(worker_)
        exit_code = worker_.process.exitcode
        if not worker_.ready:
            self._deaths_before_ready += 1
            if self._deaths_before_ready > 1:
                raise RuntimeError(f"worker processes end before they are ready, exit code {exit_code}")
        for number, chunk in enumerate(worker_.chunks):
            for piece in chunk:
                piece.num_deaths += number == 0  # it had not begun with the others
                if piece.num_deaths > 1:
                    task = self._batches[piece.ticket].tasks[piece.index]
                    reason = f"ended its worker process twice, exit code {exit_code}"
                    self._record(piece, Failure(f"{describe(task)}: {reason}"))
                else:
                    self._enqueue(-float("inf"), piece)
        self._workers[self._workers.index(worker_)] = self._start_worker()

    def _start_worker(self) -> Worker:
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        arguments = (theirs, self._folder, self._settings, self._dataset.spec, self._data)
        process = context.Process(target=worker.main, args=arguments, daemon=True)
        # A worker would import the user's script again, which fails without an `if __name__ == "__main__"` and on
        # stdin.
        main_module = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            process.start()
        finally:
            sys.modules["__main__"] = main_module
        theirs.close()
        return Worker(process, ours)


def _end(worker_: Worker) -> None:
    if worker_.process.is_alive():  # as where only its connection broke
        worker_.process.kill()
    worker_.process.join()
    worker_.connection.close()
