"""Fair shares of a cluster's workers among jobs, by water-filling (thesis, section 3.5.3).

Every job gets workers in proportion to its weight, but no more than it can use; the other jobs get the workers that it
can't use. The limit of a bracket of ASHA is kappa |S|: the number of its tasks that could run, times the number of
workers that one task may use.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace

from fedtune.errors import InputError
from fedtune.tuning.space import Number, checked_number


def fair_share(num_workers: int, limits: Sequence[int], weights: Sequence[Number] | None = None) -> list[int]:
    """How many workers each job gets. A job's limit is how many it can use; without weights, all weights are equal.

    Whole workers are handed out one by one. The next one goes to the job that would then have the fewest workers for
    its weight, and to the first of several such jobs. So, if a job could use another worker, no other job has more
    workers for its weight than this job would have with one more.
    """
    weights = [1] * len(limits) if weights is None else weights
    if len(weights) != len(limits):
        raise InputError(f"weights must be as many as limits, {len(limits)}, got {len(weights)}")
    checked_number("num_workers", num_workers, low=0, integer=True)
    for job, (limit, weight) in enumerate(zip(limits, weights, strict=True)):
        checked_number(f"limit of job {job}", limit, low=0, integer=True)
        checked_number(f"weight of job {job}", weight, low=0, low_open=True)
    shares = [0] * len(limits)
    # A heap of the jobs that can use another worker, by the workers for its weight that each would then have.
    hungry = [(1 / weight, job) for job, weight in enumerate(weights) if limits[job] > 0]
    heapify(hungry)
    for _ in range(num_workers):
        if not hungry:
            break
        job = hungry[0][1]
        shares[job] += 1
        if shares[job] == limits[job]:
            heappop(hungry)
        else:
            heapreplace(hungry, ((shares[job] + 1) / weights[job], job))
    return shares
