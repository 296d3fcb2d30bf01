"""One rung of successive halving: who has finished it, and who of them may go on."""

import math
from heapq import heappop, heappush, heappushpop

from fedtune.tuning.trial import rank_key

Key = tuple[int, float, int]


class Rung:
    """The trials that finished a rung; lines 14 to 17 of Algorithm 3 in O(log n).

    The best trial not yet promoted is a candidate just when it ranks no lower than the last of the best
    floor(n / reduction_factor). So it is enough to keep that last one at the root of a heap, and the best of those not
    yet promoted at the root of another.
    """

    def __init__(self, reduction_factor: int) -> None:
        self.reduction_factor = reduction_factor
        self._candidates: list[Key] = []  # the best floor(n / reduction_factor), negated: the worst of them at the root
        self._others: list[Key] = []
        self._waiting: list[Key] = []  # not yet promoted

    def __len__(self) -> int:
        return len(self._candidates) + len(self._others)

    def record(self, number: int, error: float) -> None:
        """Enter a trial that finished this rung."""
        key: Key = rank_key(error, number)
        # Departure: literal Algorithm 3 goes on with a NaN once it is among the best floor(n / reduction_factor).
        if math.isfinite(error):
            heappush(self._waiting, key)
        heappush(self._others, _negated(heappushpop(self._candidates, _negated(key))))
        if len(self) // self.reduction_factor > len(self._candidates):
            heappush(self._candidates, _negated(heappop(self._others)))

    def promote(self) -> int | None:
        """The best trial not yet promoted, now promoted, if it is among the best floor(n / reduction_factor)."""
        if not self._waiting or not self._candidates or self._waiting[0] > _negated(self._candidates[0]):
            return None
        return heappop(self._waiting)[2]


def _negated(key: Key) -> Key:
    return -key[0], -key[1], -key[2]
