"""The worker processes of the pool: they are started, and replaced when they end."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from fedtune.errors import RunStopped
from fedtune.executors.processes import ForkserverEnded, end_process
from fedtune.executors.schedule import Load


@dataclass(eq=False)
class Worker:
    """A worker process as the parent sees it."""

    process: BaseProcess
    connection: Connection
    forkserver: int = 0  # the id of the process that started it
    ready: bool = False
    blocks: set[int] = field(default_factory=set)  # the blocks that it has access to
    load: Load = field(default_factory=deque)
    seconds: float = 0.0  # that the parent has waited for the answer to the first chunk of the load
    next_look: float = 0.0  # the seconds after which the task of that chunk is looked at

    def end(self) -> int | None:
        """Ends the process. Returns its exit code; None if its forkserver has ended, so that nobody knows it."""
        return end_process(self.process, self.connection, self.forkserver)


class Workers:
    """The workers of a pool. `now` are those that there are now; `start` starts a process for one.

    A worker that can't be started would be replaced for ever. So RunStopped is raised if two workers end before they
    are ready, and none became ready in between, or if two forkservers have ended.
    """

    def __init__(self, start: Callable[[], tuple[BaseProcess, Connection, int]], num_workers: int) -> None:
        self._start_process = start
        self._ends_before_ready = 0
        self._ended_forkservers: set[int] = set()
        self.now = [self._start() for _ in range(num_workers)]

    def note_ready(self, worker: Worker) -> None:
        """Notes that a worker can work."""
        worker.ready, self._ends_before_ready = True, 0

    def replace(self, worker: Worker) -> None:
        """Starts a worker in place of one that has ended."""
        self.now[self.now.index(worker)] = self._start()

    def bury(self, worker: Worker) -> tuple[list[Worker], int | None]:
        """Replaces a dead worker. Returns the workers that were replaced, and the exit code of this one.

        If its forkserver has ended, the exit code is None, and all workers of that forkserver are replaced, before one
        of them gets another one's tasks.
        """
        exit_code = worker.end()
        if exit_code is not None:
            self._check_ready(worker, exit_code)
            self.replace(worker)
            return [worker], exit_code
        self._count_forkserver(worker.forkserver)
        buried = [other for other in self.now if other.forkserver == worker.forkserver]
        for other in buried:
            if other is not worker:
                other.end()
            self.replace(other)
        return buried, None

    def close(self) -> None:
        """Kills all workers."""
        for worker in self.now:
            worker.end()
        self.now = []

    def _check_ready(self, worker: Worker, exit_code: int) -> None:
        if not worker.ready:
            self._ends_before_ready += 1
            if self._ends_before_ready > 1:
                raise RunStopped(f"worker processes end before they are ready, exit code {exit_code}")

    def _start(self) -> Worker:
        try:
            return Worker(*self._start_process())
        except ForkserverEnded as ended:
            self._count_forkserver(ended.pid)
            return self._start()

    def _count_forkserver(self, pid: int) -> None:
        self._ended_forkservers.add(pid)
        if len(self._ended_forkservers) > 1:
            raise RunStopped("the forkserver, which starts the worker processes, ended twice: out of memory?")
