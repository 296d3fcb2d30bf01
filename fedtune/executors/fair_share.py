"""Fair shares of a cluster's workers among jobs, by water-filling (thesis, section 3.5.3).

Every job gets workers in proportion to its weight, but no more than it can use; what one can't use goes to the others.
For a bracket of ASHA the limit is kappa |S|: its tasks that could run, times the workers that one may use.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace

from fedtune.errors import InputError
from fedtune.tuning.space import Number, checked_number


def fair_share(num_workers: int, limits: Sequence[int], weights: Sequence[Number] | None = None) -> list[int]:
    """How many workers each job gets, given the most it can use; equal weights if there are none.

    Whole workers are handed out one by one, each to the job that would then have the fewest for its weight; the first
    of equals. So no job that could use another has fewer for its weight than one that would still be ahead without it.
    """
    weights = [1] * len(limits) if weights is None else weights
    if len(weights) != len(limits):
        raise InputError(f"weights must be as many as limits, {len(limits)}, got {len(weights)}")
    checked_number("num_workers", num_workers, low=0, integer=True)
    for job, (limit, weight) in enumerate(zip(limits, weights, strict=True)):
        checked_number(f"limit of job {job}", limit, low=0, integer=True)
        checked_number(f"weight of job {job}", weight, low=0, low_open=True)
    shares = [0] * len(limits)
    thirsty = [(1 / weight, job) for job, weight in enumerate(weights) if limits[job] > 0]
    heapify(thirsty)
    for _ in range(num_workers):
        if not thirsty:
            break
        job = thirsty[0][1]
        shares[job] += 1
        if shares[job] == limits[job]:
            heappop(thirsty)
        else:
            heapreplace(thirsty, ((shares[job] + 1) / weights[job], job))
    return shares
