"""Hyperband, Algorithm 1 of the thesis (section 2.3.2; Li et al., JMLR 2018): successive halving over several n and r.

    input R, eta;  s_max = floor(log_eta(R / r)), B = (s_max + 1) R
     1  for s in 0, ..., s_max:                                            a bracket, the most aggressive first
     2      n = ceil(B / R eta^(s_max - s) / (s_max - s + 1)), r_s = R eta^-(s_max - s)
     3  begin SuccessiveHalving with (n, r_s)                              `fedtune.tuning.successive_halving`
    11  return the configuration with the smallest intermediate loss seen so far

R -> max_rounds, r -> min_rounds (1 in the text), eta -> reduction_factor. The brackets are repeated without end, as the
text recommends. Several brackets are open at once if workers would otherwise be idle.

Departures: R / r must be a power of eta. The result is the best trial at the highest resource reached
(`trial.incumbent`). With `floor_first`, line 2 is floor((s_max + 1) / (s_max - s + 1)) eta^(s_max - s). This gives the
well-known table for R = 81 and eta = 3: 81, 27, 9, 6, 5 instead of 81, 34, 15, 8, 5.
"""

from itertools import cycle

from fedtune.tuning.rungs import rung_rounds
from fedtune.tuning.successive_halving import BracketPlan, SynchronousBrackets
from fedtune.tuning.trial import Draw


def hyperband(
    draw: Draw,
    max_rounds: int,
    min_rounds: int | None = None,
    reduction_factor: int = 3,
    floor_first: bool = False,
) -> SynchronousBrackets:
    """Hyperband: its brackets one after another, without end."""
    plans = bracket_plans(rung_rounds(max_rounds, min_rounds, reduction_factor), reduction_factor, floor_first)
    return SynchronousBrackets(draw, cycle(plans), reduction_factor)


def bracket_plans(rounds: tuple[int, ...], reduction_factor: int, floor_first: bool = False) -> list[BracketPlan]:
    """The brackets, from the most to the least aggressive. Rung k ends after `rounds[k]` rounds."""
    plans = []
    for s in range(len(rounds)):  # 1
        num_rungs, grown = len(rounds) - s, reduction_factor ** (len(rounds) - s - 1)
        num_configs = len(rounds) // num_rungs * grown if floor_first else -(-len(rounds) * grown // num_rungs)  # 2
        plans.append(BracketPlan(num_configs, rounds[s:]))
    return plans
