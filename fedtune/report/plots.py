"""Figures. The title of a figure is the question that it answers.

They are drawn without pyplot, so that no global state changes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.parts import PARTS
from fedtune.errors import InputError
from fedtune.printable import printable
from fedtune.report.frames import Run, curve_band, entropy_curve, incumbent_curve

# Okabe and Ito's palette, which colour-blind readers can tell apart; its yellow is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
INK, MUTED, GRID = "#222222", "#666666", "#E3E3E3"
DPI = 150  # 1200 pixels at a width of 8 inches
LOG_FROM = 4.0  # if the largest error is more than so many times the smallest, the axis is logarithmic
LABEL_GAP = 0.065  # between the labels of lines, as a fraction of the axis
LOG_SIZES_FROM = 20  # as LOG_FROM, for client sizes
BINS, LOG_BINS = 30, 20
MAX_ROWS = 200  # clients in a heat map
MAX_COLUMNS = 300  # with more labels than this, a heat map is drawn blurred


class Line(NamedTuple):
    """One tuner's line, ready to draw."""

    tuner: str
    colour: str
    dashes: str
    x: Int[np.ndarray, "point"]
    mean: Float[np.ndarray, "point"]
    low: Float[np.ndarray, "point"]  # NaN with one seed
    high: Float[np.ndarray, "point"]


def plot_incumbents(run: Run, path: Path) -> Path:
    """The path of the figure: the incumbent's test error against the rounds spent, a step line for each tuner."""
    spent = run.rounds.groupby("tuner")["spent"].max()
    bands = curve_band(incumbent_curve(run.rounds))
    lines = [_until(line, int(spent[line.tuner])) for line in _lines(bands, "spent", run.settings["tuners"])]
    several = len(run.settings["tuners"]) > 1
    figure, axes = _figure(
        "Which tuner gets furthest with the same number of rounds?"
        if several
        else "How far does it get by which round?",
        f"{_data_name(run)}: test error of the trial that the tuner would pick now, {_over(run)}",
    )
    _draw(axes, lines, steps=True)
    axes.set_xlabel("rounds spent over all trials", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("test error of the incumbent", color=INK)
    _error_axis(axes, lines)
    _label_ends(axes, lines)
    return _save(figure, path)


def plot_entropy(run: Run, path: Path) -> Path | None:
    """The path of the figure: theta's entropy by round. None, and no figure, if no tuner of the run has a theta."""
    lines = _lines(entropy_curve(run.rounds), "round", run.settings["tuners"])
    if not lines:
        return None
    figure, axes = _figure(
        "How soon does theta settle on a configuration?",
        f"{_data_name(run)}: theta in the federation picked at the end, {_over(run)}",
    )
    _draw(axes, lines, steps=False)
    _entropy_axis(axes, lines)
    axes.set_xlabel("round of the federation", color=INK)
    _label_ends(axes, lines)
    return _save(figure, path)


def plot_stats(dataset: FederatedDataset, path: Path) -> Path:
    """The path of the figure: a histogram of client sizes and, for a classification, a heat map of labels."""
    figure = Figure(figsize=(8, 4.4), dpi=DPI, layout="constrained")
    if dataset.spec.objective == "classification":
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _heat_map(figure, left, dataset)
    else:
        right = figure.subplots()
    _size_histogram(right, np.sum([dataset.num_examples(part) for part in PARTS], axis=0))
    return _save(figure, path)


def label_shares(dataset: FederatedDataset, clients: Int[np.ndarray, "client"]) -> Float[np.ndarray, "client label"]:
    """The fraction of each label among a client's examples of all parts."""
    labels = [np.concatenate([dataset.examples(client, part)[1] for part in PARTS]) for client in clients.tolist()]
    counts = np.stack([np.bincount(label, minlength=dataset.spec.num_classes) for label in labels])
    shares: np.ndarray = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def _heat_map(figure: Figure, axes: Axes, dataset: FederatedDataset) -> None:
    """Draws a row for each client, sorted by its most frequent label, so that a skew shows as a diagonal."""
    rows = min(dataset.num_clients, MAX_ROWS)
    shares = label_shares(dataset, np.linspace(0, dataset.num_clients - 1, rows).round().astype(np.int64))
    order = np.lexsort((-shares.max(1), shares.argmax(1)))
    # With more labels than pixels, a sharp image would leave some labels out; a blurred one shows all.
    blur = "nearest" if shares.shape[1] <= MAX_COLUMNS else "auto"
    image = axes.imshow(shares[order], aspect="auto", cmap="Blues", norm=PowerNorm(0.5, vmin=0), interpolation=blur)
    shown = f"all {rows:,}" if rows == dataset.num_clients else f"{rows} of {dataset.num_clients:,}"
    _panel_title(axes, "Which labels does a client have?", "colour: share of the client's examples")
    axes.set_xlabel(f"label ({dataset.name})", color=INK)
    axes.set_ylabel(f"client ({shown}, by most frequent label)", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=0), pad=0.02, aspect=30)
    bar.outline.set_visible(False)


def _size_histogram(axes: Axes, sizes: Int[np.ndarray, "client"]) -> None:
    """Draws how many clients have how many examples; bins are logarithmic if the sizes differ much.

    The edges of bins lie between whole numbers.
    """
    low, high = int(sizes.min()), int(sizes.max())
    bins = min(BINS, math.ceil(2 * math.sqrt(len(sizes))))
    if low > 0 and high > LOG_SIZES_FROM * low:
        axes.set_xscale("log")
        edges = (np.unique(np.geomspace(low, high + 1, min(bins, LOG_BINS) + 1).round()) - 0.5).tolist()
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        width = max(math.ceil((high - low + 1) / bins), math.ceil(high / 40), 1)
        bins = math.ceil((high - low + 1) / width)
        first = math.floor((low + high - width * bins) / 2) + 0.5
        edges = [first + width * number for number in range(bins + 1)]
        axes.set_xlim(edges[0] - 2 * width, edges[-1] + 2 * width)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.hist(sizes, bins=edges, color=COLOURS[0], edgecolor="white", linewidth=0.5)
    axes.margins(y=0.12)
    median = float(np.median(sizes))
    axes.axvline(median, color=COLOURS[1], linewidth=1.5)
    _panel_title(axes, "How many examples?", "of all parts: train, validation and test")
    place = axes.transAxes.inverted().transform(axes.transData.transform((median, 0)))[0]
    axes.annotate(
        f" median {median:,.0f} ",
        (median, 1.0),
        xycoords=axes.get_xaxis_transform(),
        ha="left" if place < 0.5 else "right",
        va="top",
        color=COLOURS[1],
        fontsize=9,
    )
    axes.set_xlabel("examples of a client", color=INK)
    axes.set_ylabel("clients", color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _quiet(axes)


def _panel_title(axes: Axes, question: str, says: str) -> None:
    axes.set_title(question, loc="left", fontsize=11, fontweight="bold", color=INK, pad=18)
    axes.text(0, 1.02, says, transform=axes.transAxes, fontsize=9, color=MUTED)


def _lines(bands: pd.DataFrame, x: str, tuners: Sequence[str]) -> list[Line]:
    """A line for each tuner in `bands`; a tuner's place in the settings gives its colour and dashes."""
    lines = []
    for place, tuner in enumerate(tuners):
        band = bands[bands["tuner"] == tuner]
        if len(band):
            values = [band[name].to_numpy(dtype=float) for name in ("mean", "low", "high")]
            colour, dashes = COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]
            lines.append(Line(tuner, colour, dashes, band[x].to_numpy(dtype=int), *values))
    return lines


def _until(line: Line, spent: int) -> Line:
    """The line, prolonged to all rounds that were spent: an incumbent stays one until another trial replaces it."""
    longer = (np.append(values, values[-1]) for values in (line.mean, line.low, line.high))
    return Line(line.tuner, line.colour, line.dashes, np.append(line.x, spent), *longer)


def _data_name(run: Run) -> str:
    """The name of the data set; of a path only the last part, for a long path would leave no room for the axes."""
    return printable(Path(run.settings["data"]["name"]).name).replace("$", r"\$")  # else it could be a formula


def _over(run: Run) -> str:
    seeds = run.settings["seeds"]
    return f"mean over {seeds} seeds ± standard error" if seeds > 1 else "one seed"


def _figure(question: str, says: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title(question, loc="left", fontsize=13, fontweight="bold", color=INK, pad=24)
    axes.text(0, 1.025, says, transform=axes.transAxes, fontsize=9.5, color=MUTED)
    _quiet(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    return figure, axes


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK)
    axes.set_axisbelow(True)


def _draw(axes: Axes, lines: Sequence[Line], steps: bool) -> None:
    for line in lines:
        axes.fill_between(
            line.x, line.low, line.high, step="post" if steps else None, color=line.colour, alpha=0.15, linewidth=0
        )
        axes.plot(
            line.x,
            line.mean,
            color=line.colour,
            linestyle=line.dashes,
            linewidth=1.8,
            drawstyle="steps-post" if steps else "default",
        )
    axes.set_xlim(0, max((line.x[-1] for line in lines), default=1))


def _error_axis(axes: Axes, lines: Sequence[Line]) -> None:
    """Labels the axis in per cent; its scale is logarithmic if the errors differ by more than LOG_FROM."""
    values = np.concatenate([np.concatenate(line[4:]) for line in lines]) if lines else np.array([1.0])
    low, high = np.nanmin(values), np.nanmax(values)
    if low > 0 and high > LOG_FROM * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _entropy_axis(axes: Axes, lines: Sequence[Line]) -> None:
    """Labels the axis in nats; the ticks are at ln m, the entropy of a theta that is uniform over m configurations."""
    top = 1.06 * max(float(np.nanmax(np.append(line.high, line.mean))) for line in lines) or 1.0
    counts = [count for count in (1, 2, 3, 5, 10, 20, 50, 100) if math.log(count) < top]
    axes.set_ylim(-0.02 * top, top)
    axes.set_yticks([math.log(count) for count in counts], [f"ln {count}" for count in counts])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("entropy of theta (ln m: as if m were equally likely)", color=INK)


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Writes each tuner's name right of its line; names that would overlap are moved apart, each with a thin leader."""
    points = np.array([axes.transData.transform((line.x[-1], line.mean[-1])) for line in lines]).reshape(-1, 2)
    heights = axes.transAxes.inverted().transform(points)[:, 1]
    right = axes.get_xlim()[1]
    for line, height in zip(lines, spread(heights, LABEL_GAP), strict=True):
        if line.x[-1] < right:
            axes.plot(line.x[-1:], line.mean[-1:], "o", color=line.colour, markersize=4)
            axes.hlines(line.mean[-1], line.x[-1], right, colors=line.colour, linewidth=0.8, linestyles=":")
        axes.annotate(
            line.tuner,
            xy=(1, line.mean[-1]),
            xycoords=axes.get_yaxis_transform(),
            xytext=(1.045, height),
            textcoords="axes fraction",
            va="center",
            fontsize=10,
            color=line.colour,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 2,
                "color": line.colour,
                "linewidth": 0.8,
            },
        )


def spread(heights: Float[np.ndarray, "label"], gap: float) -> Float[np.ndarray, "label"]:
    """The heights that are nearest to the given heights (least squares), in the same order, a gap apart, in [0, 1]."""
    order, count = np.argsort(heights, kind="stable"), len(heights)
    offsets = gap * np.arange(count)
    wanted = heights[order] - offsets
    # Without the offsets, the heights must only not decrease: isotonic regression, by its max-min formula.
    means = [[wanted[first : last + 1].mean() for last in range(first, count)] for first in range(count)]
    places = np.array([max(min(means[first][i - first :]) for first in range(i + 1)) for i in range(count)])
    moved = np.empty(count)
    moved[order] = np.clip(places, 0, max(0, 1 - gap * (count - 1))) + offsets
    return moved


def check_path(path: Path) -> None:
    """Raises InputError unless a figure can be written to a file of that name."""
    if path.suffix.lower() != ".png":
        raise InputError(f"a figure must be a file that ends in .png, got {path}")


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
