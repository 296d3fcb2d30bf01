"""The pool executor: persistent worker processes of one thread each, weights and updates in shared memory.

`fedtune.executors.schedule` decides which tasks a worker gets; this module sends them, receives the answers and keeps
the workers alive. A worker that dies is replaced and its tasks run again, each of them alone.

- If a task ends its worker twice, alone in its chunk, it is a failure of its client (`fedtune.executors.blame`).
- If a worker is killed, or lost with the forkserver, no client is to blame. If that happens again when the task is
  alone, the run stops and can be resumed (ClientStopped).
- If the forkserver ends, another one is started, once. If that one ends too, the run stops (RunStopped).
- If two workers die before they are ready, and no worker became ready in between, the run stops (RunStopped).
- If a task takes too long, a warning names its client. At `watch.limit` the run stops (ClientStopped).
"""

import functools
import itertools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import cast

import torch
from torch import Tensor

from fedtune.client.tasks import Failure, Result, Task, Ticket, TrainTask, Update, describe
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import ClientStopped, InputError
from fedtune.executors.blame import is_crash, why_it_stopped
from fedtune.executors.machine import MachineSettings
from fedtune.executors.names import client_id, name
from fedtune.executors.processes import start_forkserver, start_process
from fedtune.executors.schedule import SHORT_CHUNK_SECONDS, Piece, Schedule, task_cost
from fedtune.executors.shared_memory import SharedArray, share
from fedtune.executors.watch import NO_WATCH, Warn, next_look, warn_of
from fedtune.executors.worker import READY, Answer, Chunk, main
from fedtune.executors.workers import Worker, Workers
from fedtune.settings import WatchSettings

BREATH = 1.0  # seconds that a worker may take to end by itself once its connection has ended


@dataclass
class Batch:
    """A submitted batch: row 0 of its block holds the weights, row i + 1 the update of task i."""

    tasks: Sequence[Task]
    block: int
    rows: Sequence[Tensor]  # of the block
    place: str  # in the run, for messages
    results: list[Result | None]
    num_missing: int


class PoolExecutor:
    """See `fedtune.client.tasks.Executor`. Workers work in the folder in which the executor was made."""

    def __init__(
        self,
        settings: MachineSettings,
        dataset: FederatedDataset,
        num_workers: int,
        watch: WatchSettings = NO_WATCH,
        warn: Warn = lambda message, **fields: None,
    ) -> None:
        start_forkserver()
        self._dataset = dataset
        data = {name: share(array) for name, array in dataset.shared().items()}
        self._schedule = Schedule(SHORT_CHUNK_SECONDS)
        self._schedule.add_study(1.0)  # study 0: tasks that are submitted to the pool itself
        self._tickets = itertools.count()
        self._batches: dict[int, Batch] = {}
        self._blocks: list[SharedArray] = []
        self._rows: list[Sequence[Tensor]] = []  # of each block
        self._free_blocks: list[int] = []
        self._watch = watch
        self._warn = warn
        arguments = main, os.getcwd(), settings, dataset.spec, data
        self._workers = Workers(functools.partial(start_process, *arguments), num_workers)

    def describe(self) -> str:
        """Where clients train."""
        count = len(self._workers.now)
        return f"in {count} worker process{'es' * (count > 1)}"

    def for_study(self, share: float) -> "StudyExecutor":
        """The pool for a study, which gets workers in proportion to its share while others have work too."""
        return StudyExecutor(self, self._schedule.add_study(share))

    def submit(
        self, weights: Tensor, tasks: Sequence[Task], order: float = 0.0, place: str = "", study: int = 0
    ) -> Ticket:
        """A ticket for this batch, which waits in the queue of the study."""
        # Put the weights into shared memory that has a row for each update too.
        num_updates = len(tasks) if any(isinstance(task, TrainTask) for task in tasks) else 0
        block = self._take_block(1 + num_updates, weights.numel())
        rows = self._rows[block]
        rows[0].copy_(weights)
        # Let the tasks wait.
        ticket = Ticket(next(self._tickets))
        self._batches[ticket] = Batch(tasks, block, rows, place, [None] * len(tasks), len(tasks))
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
        self._workers.close()

    def _wait(self) -> None:
        """Blocks until a worker has answered, is ready or has died, or until a task must be looked at."""
        # Wait. The time in which this whole process was stopped must not count, so no more than `longest` counts.
        busy = [worker for worker in self._workers.now if worker.load]
        longest = min((worker.next_look - worker.seconds for worker in busy), default=math.inf)
        began = time.monotonic()
        events = wait(
            [end for worker in self._workers.now for end in (worker.connection, worker.process.sentinel)],
            None if longest == math.inf else longest,
        )
        waited = min(time.monotonic() - began, longest)
        for worker in busy:
            worker.seconds += waited
        # Take what there is.
        for index, worker in enumerate(list(self._workers.now)):
            if self._workers.now[index] is not worker:
                continue  # it was replaced together with another one
            if worker.connection in events:
                self._receive(worker)
            elif worker.process.sentinel in events:  # only once its connection was drained
                self._bury(worker)
            elif worker.load and worker.seconds >= worker.next_look:
                self._look_at(worker)
        self._dispatch()

    def _take_block(self, num_rows: int, num_weights: int) -> int:
        """The smallest free block that is large enough, or a new one."""
        fitting = [block for block in self._free_blocks if len(self._blocks[block].array) >= num_rows]
        if not fitting:
            self._blocks.append(SharedArray((num_rows, num_weights), "<f4"))
            self._rows.append(torch.from_numpy(self._blocks[-1].array).unbind())
            return len(self._blocks) - 1
        block = min(fitting, key=lambda block: len(self._blocks[block].array))
        self._free_blocks.remove(block)
        return block

    def _dispatch(self) -> None:
        """Gives every idle worker a chunk, then a second one to those that will soon be done."""
        loads = [worker.load for worker in self._workers.now]
        for num_chunks in (0, 1):
            for worker in [worker for worker in self._workers.now if worker.ready and len(worker.load) == num_chunks]:
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
            if len(worker.load) == 1:
                self._start_watch(worker)

    def _receive(self, worker: Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # it died, perhaps in the middle of a message
            worker.process.join(BREATH)
            self._bury(worker)
            return
        if isinstance(message, Failure):
            raise InputError(f"a worker process can't start: {message.message}")
        if message == READY:
            self._workers.note_ready(worker)
        else:
            self._take_answer(worker.load.popleft(), message)
            self._start_watch(worker)

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

    def _start_watch(self, worker: Worker) -> None:
        """Counts the seconds from now on: the worker begins with a chunk."""
        worker.seconds, worker.next_look = 0.0, next_look(self._watch, 0.0)

    def _look_at(self, worker: Worker) -> None:
        """Warns of a task that takes long, or stops the run at the limit."""
        if len(worker.load[0]) > 1:
            # A chunk of several tasks takes a moment. Alone, the task that does not end is known.
            worker.end()
            self._schedule.take_back(worker.load)
            self._workers.replace(worker)
            return
        task, place = self._task_of(worker.load[0][0])
        if self._watch.limit is not None and worker.seconds >= self._watch.limit:
            message = f"{name(task, self._dataset, place)}: no answer after {self._watch.limit:g} s, the watch.limit"
            raise ClientStopped(message, client_id(task, self._dataset), at_limit=True)
        warn_of(self._warn, [task], self._dataset, place, worker.seconds)
        worker.next_look = next_look(self._watch, worker.seconds)

    def _bury(self, worker: Worker) -> None:
        """Replaces a dead worker, and queues its tasks again."""
        buried, exit_code = self._workers.bury(worker)
        for ended in buried:
            if is_crash(exit_code):
                self._take_back_crashed(ended, exit_code)
            else:
                self._take_back_killed(ended, exit_code)

    def _take_back_crashed(self, worker: Worker, exit_code: int | None) -> None:
        guilty = self._schedule.worker_crashed(worker.load)
        if guilty is not None:
            task, _ = self._task_of(guilty)
            reason = f"ended its worker process twice, exit code {exit_code}"
            self._record(guilty, Failure(f"{describe(task)}: {reason}"))

    def _take_back_killed(self, worker: Worker, exit_code: int | None) -> None:
        stopped = self._schedule.worker_killed(worker.load)
        if stopped is not None:
            task, place = self._task_of(stopped)
            message = f"{name(task, self._dataset, place)}: {why_it_stopped(exit_code)}"
            raise ClientStopped(message, client_id(task, self._dataset))

    def _task_of(self, piece: Piece) -> tuple[Task, str]:
        """The task, and its place in the run."""
        batch = self._batches[piece.ticket]
        return batch.tasks[piece.index], batch.place


class StudyExecutor:
    """The pool as one of several studies sees it: only what it submits waits in the study's own queue."""

    def __init__(self, pool: PoolExecutor, study: int) -> None:
        self._pool = pool
        self._study = study

    def describe(self) -> str:
        """Where clients train."""
        return self._pool.describe()

    def submit(self, weights: Tensor, tasks: Sequence[Task], order: float = 0.0, place: str = "") -> Ticket:
        """A ticket for this batch."""
        return self._pool.submit(weights, tasks, order, place, self._study)

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
