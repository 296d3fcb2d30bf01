"""Decides which tasks a worker of the pool gets next: of which study, which task first, and how many in one chunk.

Each study has one queue of tasks. The task with the smallest `order` in a queue goes first; of tasks with the same
`order`, the longest task goes first. Studies that run at once share the workers as `fedtune.executors.fair_share` says.
Several short tasks are sent in one chunk. A worker that will soon be done gets its next chunk early, so that it does
not wait for the main process.

This module does not handle processes. Its input is the load of each worker, its output is chunks of tasks.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedtune.client.tasks import EvaluateTask, Task
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.executors.fair_share import fair_share

CHUNK_SECONDS = 0.01  # shorter tasks are sent several at a time
SHORT_CHUNK_SECONDS = 0.001  # in a pool: a chunk of a shorter time would cost the main process too much for its work
CHUNK_OF_ROOM = 0.5  # a chunk of several tasks fills at most half of a worker's room, in case the worker is slow
STEP_COST = 16  # a step of local SGD costs about as much as this many examples
EVALUATION_COST = 0.25  # evaluating an example costs about as much as training on this many
FIRST = -math.inf  # the order of a task that goes before all others


@dataclass
class Piece:
    """One task of a batch, as the schedule sees it."""

    study: int  # in whose queue it waits
    ticket: int  # of its batch
    index: int  # in its batch
    cost: float  # see `task_cost`
    alone: bool = False  # a worker ended while it worked on its chunk: now it travels alone
    num_crashes: int = 0  # how many workers crashed while they worked on it alone
    num_kills: int = 0  # how many workers were killed while they worked on its chunk


Load = deque[list[Piece]]  # the chunks that a worker has not answered; the worker is at the first of them


def task_cost(task: Task, dataset: FederatedDataset) -> float:
    """About how long the task takes, in units of the time for one training example; at least 1."""
    if isinstance(task, EvaluateTask):
        bounds = dataset.ranges[list(task.clients), 1:]  # of the validation and the test parts
        return max(1.0, EVALUATION_COST * float((bounds[..., 1] - bounds[..., 0]).sum()))
    start, stop = dataset.ranges[task.client, 0].tolist()
    num_train = stop - start
    num_steps = -(-num_train // max(1, int(task.config.get("batch_size", num_train))))
    return max(1.0, float(task.config.get("epochs", 1) * (num_train + STEP_COST * num_steps)))


class Schedule:
    """The waiting tasks of all studies, and the rules that hand them out.

    A chunk may always take `short_seconds`, even if that is more than its worker's room allows.
    """

    def __init__(self, short_seconds: float = 0.0) -> None:
        self._short_seconds = short_seconds
        self._queues: list[list[tuple[float, float, int, Piece]]] = []  # heaps, by study
        self._shares: list[float] = []  # by study
        self._sequence = itertools.count()  # so that the first of equal tasks goes first
        self._unfinished_cost = 0.0  # of all tasks that have no result yet
        self._seconds_per_cost = 0.0  # unknown before the first answer

    def add_study(self, share: float) -> int:
        """The number of a new study, which gets workers in proportion to its share while others have work too."""
        self._queues.append([])
        self._shares.append(share)
        return len(self._queues) - 1

    def add(self, order: float, piece: Piece) -> None:
        """Lets a new task wait in the queue of its study."""
        self._unfinished_cost += piece.cost
        self._enqueue(order, piece)

    def put_back(self, pieces: Iterable[Piece]) -> None:
        """Lets tasks that were handed out wait again, before all other tasks."""
        for piece in pieces:
            self._enqueue(FIRST, piece)

    def finish(self, piece: Piece) -> None:
        """Notes that the task has its result."""
        self._unfinished_cost -= piece.cost

    def measure_speed(self, chunk: Sequence[Piece], seconds: float) -> None:
        """Notes how long a worker took for a chunk. The time of later chunks is estimated from this."""
        self._seconds_per_cost = seconds / sum(piece.cost for piece in chunk)

    def take_back(self, load: Load, but: Piece | None = None) -> None:
        """Lets the tasks of a worker that ended wait again, except one of them.

        A task of the chunk that the worker had begun with travels alone from now on.
        """
        for piece in load[0] if load else ():
            piece.alone = True
        self.put_back(piece for chunk in load for piece in chunk if piece is not but)

    def worker_crashed(self, load: Load) -> Piece | None:
        """Takes back the load of a worker that its task ended. Returns the task if it has now ended two workers.

        Only a task that is alone in its chunk can be blamed. So it makes no difference with which other tasks a task
        travelled before.
        """
        suspect = load[0][0] if load and len(load[0]) == 1 else None
        if suspect is not None:
            suspect.num_crashes += 1
        guilty = suspect if suspect is not None and suspect.num_crashes == 2 else None
        self.take_back(load, but=guilty)
        return guilty

    def worker_killed(self, load: Load) -> Piece | None:
        """Takes back the load of a worker that was killed. Returns the task if this happened again with it alone."""
        begun = load[0] if load else []
        for piece in begun:
            piece.num_kills += 1
        self.take_back(load)
        return begun[0] if len(begun) == 1 and begun[0].num_kills > 1 else None

    def next_chunk(self, load: Load, loads: Sequence[Load]) -> list[Piece]:
        """The tasks that a worker gets in addition to its load; none if it should get nothing now.

        `loads` are the loads of all workers.
        """
        if not any(self._queues) or (load and not self._may_get_ahead(load, loads)):
            return []
        queue = self._queues[self._next_study(loads)]
        chunk = [heapq.heappop(queue)[-1]]
        cost = chunk[0].cost
        if chunk[0].alone:
            return chunk  # it may have ended a worker: so no other task can be blamed
        # Add tasks while they all are suspected of nothing, take little time and fit.
        cost_limit = CHUNK_OF_ROOM * self._room(load, loads)
        while queue and 0 < self._seconds(cost) < CHUNK_SECONDS:
            longer = cost + queue[0][-1].cost
            if queue[0][-1].alone or (longer > cost_limit and self._seconds(longer) > self._short_seconds):
                break
            chunk.append(heapq.heappop(queue)[-1])
            cost = longer
        return chunk

    def _enqueue(self, order: float, piece: Piece) -> None:
        heapq.heappush(self._queues[piece.study], (order, -piece.cost, next(self._sequence), piece))

    def _may_get_ahead(self, load: Load, loads: Sequence[Load]) -> bool:
        """Whether a worker gets its next chunk before it has answered the one that it works on."""
        num_waiting = sum(map(len, self._queues))
        return (
            num_waiting > len(loads)  # the last tasks are for the workers that are done first
            and self._room(load, loads) > 0
            and 0 < self._seconds(_load_cost(load)) < 2 * CHUNK_SECONDS
        )

    def _room(self, load: Load, loads: Sequence[Load]) -> float:
        """The worker's equal part of the cost of all unfinished tasks, minus the cost of its load."""
        return self._unfinished_cost / len(loads) - _load_cost(load)

    def _seconds(self, cost: float) -> float:
        """The estimated time for tasks of this cost; 0 if nothing is known yet."""
        return cost * self._seconds_per_cost

    def _next_study(self, loads: Sequence[Load]) -> int:
        """The study that has waiting tasks and whose number of running chunks is furthest below its fair share.

        A fair share is a share of the running chunks and the next chunk.
        """
        waiting = [study for study, queue in enumerate(self._queues) if queue]
        if len(waiting) == 1:  # the usual case, and the fast one
            return waiting[0]
        # Count the chunks that run now.
        running = [0] * len(self._queues)
        for chunk in itertools.chain(*loads):
            running[chunk[0].study] += 1
        # Share one chunk more than run now. A study can't use more chunks than it has tasks for.
        limits = [busy + len(queue) for busy, queue in zip(running, self._queues, strict=True)]
        fair = fair_share(sum(running) + 1, limits, self._shares)
        return max(waiting, key=lambda study: (fair[study] - running[study]) / self._shares[study])


def _load_cost(load: Load) -> float:
    return sum((piece.cost for chunk in load for piece in chunk), 0.0)
