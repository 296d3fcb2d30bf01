"""The tables of README.md and the figure, made from results.csv alone."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from engines import BY_TORCH, ENGINES, LIMIT, OURS, RIVALS
from matplotlib.figure import Figure
from measured import DEMO, FLUTE, GFLOP, MEMORY, ROUND, START, Results, Spread

COLOURS = {"pfl": "#009E73", "Flower on Ray": "#D55E00", "fluke": "#CC79A7", "plain": "#666666", BY_TORCH: "#0072B2"}


class Targets(NamedTuple):
    """What fedtune's pool should reach with one federation; None if there is no target."""

    over_pfl: float | None = None  # times as fast
    over_flower: float | None = None
    share_of_limit: float | None = None


TARGETS = {
    ("logistic", 50): Targets(6, 20, None),
    ("mlp", 10): Targets(3, 14, 0.4),
    ("lstm", 10): Targets(3, 8, 0.3),
    ("leaf_lstm", 10): Targets(1.3, None, 0.7),
    ("cnn", 10): Targets(1.3, 1.9, 0.68),
}
START_TARGET = 0.12  # of Flower's time to the end of the first round
DEMO_TARGET = 0.5  # of the torch engine's time
FLUTE_TARGET = 10.0  # seconds


def tables(results: Results) -> Iterator[str]:
    """All tables, as Markdown. What was not measured is an empty cell."""
    yield _targets(results)
    yield _rounds(results)
    yield _shares(results)
    yield _starts(results)
    yield _commands(results)


def _targets(results: Results) -> str:
    """How many times as fast fedtune's pool is, and its share of the machine's limit, each beside its target."""
    lines = []
    for model, size in results.cases(ROUND):
        targets = TARGETS.get((model, size), Targets())
        wanted = {"pfl": targets.over_pfl, "Flower on Ray": targets.over_flower}
        cells = [_judged(results.advantage(model, size, rival), wanted.get(rival), _times) for rival in RIVALS]
        share = _judged(results.share_of_limit(model, size, OURS), targets.share_of_limit, _percent)
        lines.append([_case(model, size), *cells, share])
    return markdown(["", *(f"over {rival}" for rival in RIVALS), "share of the limit"], lines)


def _rounds(results: Results) -> str:
    """The milliseconds of a round."""
    names = [name for name in ENGINES if name in results.engines(ROUND)]
    lines = (
        [_case(*case), *(_range(results.spread(ROUND, *case, name), _number) for name in names)]
        for case in results.cases(ROUND)
    )
    return markdown(["", *names], lines)


def _shares(results: Results) -> str:
    """The share of the machine's limit that each engine reaches."""
    names = [name for name in ENGINES if name in results.engines(ROUND) and name != LIMIT]
    lines = []
    for case in results.cases(ROUND):
        gflop = results.spread(GFLOP, *case, LIMIT).median
        limit = results.spread(ROUND, *case, LIMIT)
        rate = Spread(*(1000 * gflop / value for value in (limit.median, limit.most, limit.least)))
        shares = [_range(results.share_of_limit(*case, name), _percent) for name in names]
        lines.append([_case(*case), "" if np.isnan(gflop) else _number(gflop), _range(rate, _number), *shares])
    return markdown(["", GFLOP, "GFLOP/s at the limit", *names], lines)


def _starts(results: Results) -> str:
    """The time to the end of the first round and the memory; beside them fedtune's share of Flower's."""
    names = [name for name in ENGINES if name in results.engines(START)]
    lines = []
    for what, target in ((START, START_TARGET), (MEMORY, 1.0)):
        for case in results.cases(what):
            share = _judged(results.ratio(what, *case, OURS, "Flower on Ray"), target, _times, at_most=True)
            cells = [_range(results.spread(what, *case, name), _number) for name in names]
            lines.append([f"{what}, {_case(*case)}", *cells, share])
    return markdown(["", *names, "fedtune's share of Flower's"], lines)


def _commands(results: Results) -> str:
    """The seconds of whole commands of fedtune, from the start to the report."""
    lines = []
    for what in (FLUTE, DEMO):
        for case in results.cases(what):
            spread = results.spread(what, *case, OURS)
            if what == FLUTE:
                lines.append([what, _judged(spread, FLUTE_TARGET, _number, at_most=True), "", ""])
            else:
                share = _judged(results.ratio(what, *case, OURS, BY_TORCH), DEMO_TARGET, _times, at_most=True)
                by_torch = _range(results.spread(what, *case, BY_TORCH), _number)
                lines.append([what, _range(spread, _number), by_torch, share])
    return markdown(["", "fedtune", "fedtune, engine torch", "share of the torch engine's time"], lines)


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    """A table of cells."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def _case(model: str, size: int) -> str:
    return f"`{model}`, {size} clients"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _times(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _range(spread: Spread, form: Callable[[float], str]) -> str:
    """The median and the range of the repeats; nothing if nothing was measured."""
    if np.isnan(spread.median):
        return ""
    return f"{form(spread.median)} ({form(spread.least)}–{form(spread.most)})"


def _judged(spread: Spread, target: float | None, form: Callable[[float], str], *, at_most: bool = False) -> str:
    """The median and the range beside the target, and whether the median meets it."""
    text = _range(spread, form)
    if target is None or not text:
        return text
    met = spread.median <= target if at_most else spread.median >= target
    bound = "at most" if at_most else "at least"
    wanted = form(target) if form is _percent else f"{target:g}"
    return f"{text}; target {bound} {wanted}: {'met' if met else '**missed**'}"


def plot(results: Results, path: Path) -> None:
    """Draws how many times as fast as each rival the pool is, with the range over the repeats, and the targets."""
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    cases = results.cases(ROUND)
    for number, (rival, colour) in enumerate(COLOURS.items()):
        spreads = np.array([results.advantage(*case, rival) for case in cases])
        if np.isnan(spreads).all():
            continue
        median, least, most = spreads.T
        position = np.arange(len(cases)) + (number - 2) * 0.15
        spread = [median - least, most - median]
        axes.errorbar(median, position, xerr=spread, fmt="o", color=colour, label=f"over {rival}", capsize=2)
        if rival in ("pfl", "Flower on Ray"):
            wanted = (TARGETS.get(case, Targets()) for case in cases)
            targets = [each.over_pfl if rival == "pfl" else each.over_flower for each in wanted]
            axes.plot(np.array(targets, dtype=float), position, "|", color=colour, markersize=12, markeredgewidth=2)
    axes.plot([], [], "|", color="#222222", markersize=12, markeredgewidth=2, label="target")
    axes.set_yticks(np.arange(len(cases)), [f"{model}, {size} clients" for model, size in cases])
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 3, 5, 10, 20, 40]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.xaxis.minorticks_off()
    axes.axvline(1, color="#222222", linewidth=0.8)
    axes.set_xlabel("times as many rounds a second")
    axes.set_title("How much faster are fedtune's rounds?", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
