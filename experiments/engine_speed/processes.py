"""Engines as processes: starts them, asks for rounds, measures memory, ends them with all processes they started."""

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

SAMPLE_SECONDS = 0.05
END_SECONDS = 60
CORES = len(os.sched_getaffinity(0))
REPOSITORY = Path(__file__).parents[2]


class Engine(NamedTuple):
    """How an engine is started: PYTHON SCRIPT MODEL PLANS *ARGUMENTS, with `threads` threads in its first process."""

    python: str
    script: str
    arguments: tuple[str, ...]
    threads: int


class RunningEngine:
    """An engine at work on one model."""

    def __init__(self, engine: Engine, model: str, folder: Path) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(engine.threads),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "clients")]),
            "PYTHONWARNINGS": "ignore",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # the default, 15, leaves its actors hardly a core if other programs run
        }
        command = [engine.python, str(Path(__file__).parent / engine.script), model, str(folder), *engine.arguments]
        self._log = folder / f"log-{engine.script}-{'-'.join(engine.arguments)}.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )

    def __enter__(self) -> "RunningEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        started = _descendants(self._process.pid)
        with suppress(BrokenPipeError):  # it has ended by itself
            self._process.stdin.close()
        try:
            self._process.wait(0 if error else END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid, born in started.items():
            if _born(pid) == born:  # still there, and not another process under its number
                os.kill(pid, signal.SIGKILL)

    def train(self, cohort_size: int, rounds: int, weights: Path | str = "-") -> float:
        """The seconds that these rounds took; the weights after them go to the file `weights`."""
        with suppress(BrokenPipeError):  # then there is no answer
            self._process.stdin.write(f"{cohort_size} {rounds} {weights}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._process.args} ended:\n{self._log.read_text()[-3000:]}")
        return float(answer)

    def memory_during(self, cohort_size: int, rounds: int) -> float:
        """The peak memory in GiB of all its processes together during these rounds; shared memory counts once."""
        most, done = 0, threading.Event()

        def sample() -> None:
            nonlocal most
            while not done.is_set():
                pids = [self._process.pid, *_descendants(self._process.pid)]
                most = max(most, sum(map(_proportional_bytes, pids)))
                time.sleep(SAMPLE_SECONDS)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            self.train(cohort_size, rounds)
        finally:
            done.set()
            thread.join()
        return most / 2**30


def _proportional_bytes(pid: int) -> int:
    """The process's proportional set size: each page divided by the number of processes that have it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _stat(pid: int | str) -> tuple[int, int] | None:
    """A process's parent and its start time; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), int(fields[19])


def _born(pid: int) -> int | None:
    stat = _stat(pid)
    return stat and stat[1]


def _descendants(pid: int) -> dict[int, int]:
    """The start time of each process that this process started, directly or through others."""
    children: dict[int, list[tuple[int, int]]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(entry)):
            children.setdefault(stat[0], []).append((int(entry), stat[1]))
    found: dict[int, int] = {}
    waiting = [pid]
    while waiting:
        for child, born in children.get(waiting.pop(), []):
            found[child] = born
            waiting.append(child)
    return found
