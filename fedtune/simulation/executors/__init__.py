"""Who computes what the clients do: one process, or a pool of them; the results are equal to the bit."""

import multiprocessing
import multiprocessing.forkserver
import os


def num_workers(requested: int) -> int:
    """How many processes to use; 0 stands for one a core that this process may run on."""
    return requested or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def start_forkserver() -> None:
    """Lets the process that worker processes are forked from import torch while this one goes on; call it early."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fedtune.simulation.executors.worker"])
    multiprocessing.forkserver.ensure_running()
