"""The rungs of successive halving: after how many rounds they end, and which trials in them can be promoted."""

import math
from heapq import heappop, heappush, heappushpop

from fedtune.errors import InputError
from fedtune.tuning.space import checked_number
from fedtune.tuning.trial import rank_key

Key = tuple[int, float, int]


class Rung:
    """The trials that finished a rung; lines 14 to 17 of Algorithm 3 in O(log n).

    The best trial not yet promoted can be promoted if and only if it ranks among the best floor(n / reduction_factor).
    So two heaps are enough: one has the worst of these best trials at its root, the other the best trial not yet
    promoted.
    """

    def __init__(self, reduction_factor: int) -> None:
        self.reduction_factor = reduction_factor
        self._candidates: list[Key] = []  # the best floor(n / reduction_factor), negated: the worst at the root
        self._others: list[Key] = []
        self._waiting: list[Key] = []  # not yet promoted

    def __len__(self) -> int:
        return len(self._candidates) + len(self._others)

    def record(self, number: int, error: float) -> None:
        """Enter a trial that finished this rung."""
        key: Key = rank_key(error, number)
        # Departure: literal Algorithm 3 promotes a NaN if it is among the best floor(n / reduction_factor).
        if math.isfinite(error):
            heappush(self._waiting, key)
        heappush(self._others, _negated(heappushpop(self._candidates, _negated(key))))
        if len(self) // self.reduction_factor > len(self._candidates):
            heappush(self._candidates, _negated(heappop(self._others)))

    def promote(self) -> int | None:
        """Promotes the best trial that was not promoted yet, if it is among the best floor(n / reduction_factor).

        Returns the number of the trial, or None.
        """
        if not self._waiting or not self._candidates or self._waiting[0] > _negated(self._candidates[0]):
            return None
        return heappop(self._waiting)[2]


def _negated(key: Key) -> Key:
    return -key[0], -key[1], -key[2]


def rung_rounds(
    max_rounds: int, min_rounds: int | None, reduction_factor: int, early_stopping_rate: int = 0
) -> tuple[int, ...]:
    """The rounds r eta^s, ..., R after which the rungs end. If min_rounds is None, r is as small as it can be.

    Raises InputError unless R / r is a power of eta.
    """
    checked_number("max_rounds", max_rounds, low=1, integer=True)
    checked_number("reduction_factor", reduction_factor, low=2, integer=True)
    if min_rounds is None:
        min_rounds = default_min_rounds(max_rounds, reduction_factor)
    halvings = num_halvings(max_rounds, min_rounds, reduction_factor)
    checked_number("early_stopping_rate", early_stopping_rate, low=0, high=halvings, integer=True)
    return tuple(min_rounds * reduction_factor**k for k in range(early_stopping_rate, halvings + 1))


def num_halvings(max_rounds: int, min_rounds: int, reduction_factor: int) -> int:
    """log_eta(R / r), counted in whole numbers: in floats, log(243) / log(3) is less than 5."""
    checked_number("min_rounds", min_rounds, low=1, high=max_rounds, integer=True)
    halvings, rounds = 0, min_rounds
    while rounds < max_rounds:
        halvings, rounds = halvings + 1, rounds * reduction_factor
    if rounds != max_rounds:
        raise InputError(
            f"max_rounds must be min_rounds ({min_rounds}) times a power of reduction_factor ({reduction_factor}), "
            f"got {max_rounds}; {rounds // reduction_factor} and {rounds} are allowed"
        )
    return halvings


def default_min_rounds(max_rounds: int, reduction_factor: int) -> int:
    """The smallest whole r for which R / r is a power of eta (R >= 1, eta >= 2): 1 for 81 and eta 3, 11 for 99.

    Raises InputError if that is R itself, since then no trial could be stopped early. The error names values of R that
    are allowed. They are the powers of eta around R, whose rungs start at 1, and the multiples of eta^2 around R, which
    have three rungs or more.
    """
    min_rounds, power = max_rounds, reduction_factor
    while min_rounds % reduction_factor == 0:
        min_rounds //= reduction_factor
    if min_rounds < max_rounds:
        return min_rounds
    while power * reduction_factor < max_rounds:
        power *= reduction_factor
    multiple = reduction_factor**2 * (max_rounds // reduction_factor**2)
    allowed = {power, power * reduction_factor, multiple, multiple + reduction_factor**2} - {0}
    raise InputError(
        f"max_rounds must be a multiple of reduction_factor ({reduction_factor}), got {max_rounds}; "
        f"{', '.join(map(str, sorted(allowed)))} are allowed"
    )
