"""What this process and its workers cost: memory and processor time, from /proc."""

import multiprocessing
import os
from pathlib import Path


def memory() -> dict[str, float]:
    """The memory of this process and its workers in MB: their own memory, and pages of mapped files.

    A page that n processes share counts 1 / n for each. Pages of files are a cache; the kernel takes it back if needed.
    """
    kilobytes = dict.fromkeys(("Pss_Anon", "Pss_Shmem", "Pss_File"), 0)
    for process in processes():
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
            name, number = line.removesuffix(" kB").split(":")
            if name in kilobytes:
                kilobytes[name] += int(number)
    anonymous, shared, mapped = (number * 1024 / 1e6 for number in kilobytes.values())
    return {"own": anonymous + shared, "mapped": mapped}


def processor_seconds() -> float:
    """The processor time of this process and its workers, as exact as the kernel's ticks."""
    fields = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in processes()]
    return sum(int(user) + int(system) for *_, user, system in (some[:13] for some in fields)) / os.sysconf(
        "SC_CLK_TCK"
    )


def processes() -> list[int]:
    """This process and its workers."""
    return [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
