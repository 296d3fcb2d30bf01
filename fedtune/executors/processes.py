"""Who computes what the clients do: one process, or a pool of them; the results are equal to the bit."""

import multiprocessing
import os
import signal
from multiprocessing import forkserver, resource_tracker


def num_workers(requested: int) -> int:
    """How many processes to use; 0 stands for one a core that this process may run on."""
    return requested or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def start_forkserver() -> None:
    """Lets the process that worker processes are forked from import torch while this one goes on; call it early."""
    # torch by itself, for a preload that fails is passed over in silence, as where fedtune is not installed.
    preload = ["torch", "fedtune.executors.worker"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    resource_tracker.ensure_running()  # by itself ensure_running below would start it, which unblocks the signal
    # Ctrl-C is this process's to handle: that process and all workers are born with it blocked.
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
