"""Fair shares of the workers among studies, by water-filling (thesis, section 3.5.3, which calls a study a job).

Every study gets workers in proportion to its weight, but no more than it can use; the other studies get the workers
that it can't use. In the thesis the limit of a bracket of ASHA is kappa |S|: the number of its tasks that could run,
times the number of workers that one task may use.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace

from fedtune.errors import InputError
from fedtune.tuning.space import Number, checked_number


def fair_share(num_workers: int, limits: Sequence[int], weights: Sequence[Number] | None = None) -> list[int]:
    """How many workers each study gets. A study's limit is how many it can use; without weights, all weights are equal.

    Workers are handed out one by one. The next worker goes to the study with the smallest ratio (workers + 1) / weight;
    if several studies have it, to the first of them. So, if a study A could use another worker, then for every study B
    workers_B / weight_B <= (workers_A + 1) / weight_A.
    """
    weights = [1] * len(limits) if weights is None else weights
    if len(weights) != len(limits):
        raise InputError(f"weights must be as many as limits, {len(limits)}, got {len(weights)}")
    checked_number("num_workers", num_workers, low=0, integer=True)
    for study, (limit, weight) in enumerate(zip(limits, weights, strict=True)):
        checked_number(f"limit of study {study}", limit, low=0, integer=True)
        checked_number(f"weight of study {study}", weight, low=0, low_open=True)
    shares = [0] * len(limits)
    # A heap of the studies that can use another worker; the key is (workers + 1) / weight.
    hungry = [(1 / weight, study) for study, weight in enumerate(weights) if limits[study] > 0]
    heapify(hungry)
    for _ in range(num_workers):
        if not hungry:
            break
        study = hungry[0][1]
        shares[study] += 1
        if shares[study] == limits[study]:
            heappop(hungry)
        else:
            heapreplace(hungry, ((shares[study] + 1) / weights[study], study))
    return shares
