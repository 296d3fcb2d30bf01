"""What the figures show, read off the figures themselves."""

import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation
from sklearn.isotonic import isotonic_regression

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.report import plots
from fedtune.report.frames import Run

NAN = math.nan
PIXELS = 1200


def a_run(curves: dict[str, list[list[float]]], entropy: float = NAN) -> Run:
    """A run in which each tuner has one trial a seed, evaluated in every round with these test errors."""
    rounds = [
        {
            "tuner": tuner,
            "seed": seed,
            "trial": 0,
            "round": number,
            "spent": number,
            "incumbent": 0,
            "test_error": error,
            "entropy": entropy / number if tuner == "fedex" else NAN,
        }
        for tuner, seeds in curves.items()
        for seed, errors in enumerate(seeds)
        for number, error in enumerate(errors, start=1)
    ]
    seeds = max(len(seeds) for seeds in curves.values())
    settings = {"tuners": list(curves), "seeds": seeds, "data": {"name": "digits"}}
    empty = pd.DataFrame()
    return Run(Path("run"), settings, pd.DataFrame(rounds), empty, empty, empty)


def a_dataset(sizes: list[int], num_classes: int = 4) -> FederatedDataset:
    """Client i has `sizes[i]` examples, all with the label i modulo the number of classes but one with label 0."""
    clients = {
        f"client{i}": (np.zeros((size, 1), np.float32), np.array([0] + [i % num_classes] * (size - 1)))
        for i, size in enumerate(sizes)
    }
    return FederatedDataset.from_clients(clients, name="made up", num_classes=num_classes)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures are kept here, not written."""
    kept: list[Figure] = []

    def keep(figure: Figure, path: Path) -> Path:
        kept.append(figure)
        return path

    monkeypatch.setattr(plots, "_save", keep)
    return kept


def drawn(axes: Axes) -> np.ndarray:
    """The first line's points, x and y in rows."""
    return np.asarray(axes.lines[0].get_xydata(), float).T


def names(axes: Axes) -> dict[str, str]:
    """The labels beside the lines, each with its colour."""
    return {text.get_text(): str(text.get_color()) for text in axes.texts if isinstance(text, Annotation)}


def test_incumbents_are_drawn_as_mean_and_band(figures: list[Figure]) -> None:
    plots.plot_incumbents(a_run({"sha": [[0.9, 0.3], [0.7, 0.1]]}), Path("figure.png"))
    (axes,) = figures[0].axes
    (line,) = axes.lines
    assert line.get_drawstyle() == "steps-post"
    assert drawn(axes)[0].tolist() == [1, 2, 2]
    np.testing.assert_allclose(drawn(axes)[1], [(0.9 + 0.7) / 2, (0.3 + 0.1) / 2, (0.3 + 0.1) / 2])
    band = np.asarray(axes.collections[0].get_paths()[0].vertices, float)[:, 1]
    half = abs(0.9 - 0.7) / 2  # the standard error of two values
    np.testing.assert_allclose([band.min(), band.max()], [0.2 - half, 0.8 + half])
    assert names(axes) == {"sha": line.get_color()}
    assert axes.get_title(loc="left").endswith("?")
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_a_lone_tuner_is_not_asked_who_wins(figures: list[Figure]) -> None:
    for curves in ({"sha": [[0.9, 0.3]]}, {"sha": [[0.9, 0.3]], "asha": [[0.9, 0.3]]}):
        plots.plot_incumbents(a_run(curves), Path("figure.png"))
    assert ["Which tuner" in figure.axes[0].get_title(loc="left") for figure in figures] == [False, True]


def test_a_study_that_spends_less_is_drawn_on_to_its_own_end_and_dotted_to_the_last(figures: list[Figure]) -> None:
    short = [[0.5, NAN, NAN]]
    plots.plot_incumbents(a_run({"sha": short, "manual": [[0.5] * 9]}), Path("figure.png"))
    axes = figures[0].axes[0]
    assert drawn(axes)[0].tolist() == [1, 3]  # evaluated at 1, spent 3
    assert axes.get_xlim() == (0, 9)
    dots = [(float(start[0]), float(stop[0])) for start, stop in axes.collections[-1].get_segments()]  # type: ignore[attr-defined]
    assert dots == [(3, 9)]


@pytest.mark.parametrize(("errors", "scale"), [([0.9, 0.1], "log"), ([0.3, 0.1], "linear"), ([0.9, 0.0], "linear")])
def test_axis_is_logarithmic_when_that_shows_more(figures: list[Figure], errors: list[float], scale: str) -> None:
    plots.plot_incumbents(a_run({"sha": [errors]}), Path("figure.png"))
    axes = figures[0].axes[0]
    assert axes.get_yscale() == scale
    assert axes.get_ylim()[0] <= min(errors) <= max(errors) <= axes.get_ylim()[1]


def test_tuners_can_be_told_apart(figures: list[Figure]) -> None:
    run = a_run({f"tuner{number}": [[0.5]] for number in range(13)})
    plots.plot_incumbents(run, Path("figure.png"))
    looks = {(line.get_color(), line.get_linestyle()) for line in figures[0].axes[0].lines}
    assert len(looks) == 13


def test_a_colour_is_a_place_in_the_settings(figures: list[Figure]) -> None:
    curves = {"sha": [[0.5]], "fedex": [[0.4]]}
    plots.plot_incumbents(a_run(curves), Path("figure.png"))
    plots.plot_entropy(a_run(curves, entropy=2.0), Path("figure.png"))
    assert names(figures[1].axes[0]) == {"fedex": names(figures[0].axes[0])["fedex"]}


def test_entropy_is_drawn_with_ticks_at_uniform_distributions(figures: list[Figure]) -> None:
    path = Path("figure.png")
    assert plots.plot_entropy(a_run({"sha": [[0.5] * 3], "fedex": [[0.5] * 3]}, entropy=math.log(8)), path) == path
    (axes,) = figures[0].axes
    np.testing.assert_allclose(drawn(axes)[1], [math.log(8) / number for number in (1, 2, 3)])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["ln 1", "ln 2", "ln 3", "ln 5"]
    np.testing.assert_allclose(axes.get_yticks(), [math.log(count) for count in (1, 2, 3, 5)])


def test_entropy_of_zero_throughout_can_be_drawn(figures: list[Figure]) -> None:
    assert plots.plot_entropy(a_run({"fedex": [[0.5]]}, entropy=0.0), Path("figure.png"))
    assert figures[0].axes[0].get_ylim()[1] > 0


def test_without_theta_there_is_no_entropy_figure(tmp_path: Path) -> None:
    assert plots.plot_entropy(a_run({"sha": [[0.5]]}), tmp_path / "entropy.png") is None
    assert not list(tmp_path.iterdir())


def test_label_shares_count_all_parts_of_a_client() -> None:
    shares = plots.label_shares(a_dataset([10, 20, 4]), np.array([1, 2]))
    np.testing.assert_allclose(shares, [[1 / 20, 19 / 20, 0, 0], [1 / 4, 0, 3 / 4, 0]])


def test_heat_map_orders_clients_by_their_most_frequent_label(figures: list[Figure]) -> None:
    plots.plot_stats(a_dataset([10, 10, 10, 10, 30, 30, 30, 30]), Path("figure.png"))
    image = np.asarray(figures[0].axes[0].images[0].get_array())
    assert image.argmax(1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    np.testing.assert_allclose(image[2:4, 1], [29 / 30, 9 / 10])  # the clearer client first


def test_heat_map_of_many_clients_shows_some_and_says_so(figures: list[Figure]) -> None:
    plots.plot_stats(a_dataset([3] * 1234), Path("figure.png"))
    axes = figures[0].axes[0]
    assert np.asarray(axes.images[0].get_array()).shape == (plots.MAX_ROWS, 4)
    assert f"{plots.MAX_ROWS} of 1,234" in axes.get_ylabel()


@pytest.mark.parametrize(
    ("sizes", "scale"),
    [([600] * 9, "linear"), ([3] * 5, "linear"), ([30, 45, 60, 61, 90], "linear"), ([3, 10, 100, 1000], "log")],
)
def test_histogram_counts_every_client_once(figures: list[Figure], sizes: list[int], scale: str) -> None:
    plots.plot_stats(a_dataset(sizes), Path("figure.png"))
    axes = figures[0].axes[1]
    assert axes.get_xscale() == scale
    assert sum(bar.get_height() for bar in axes.patches) == len(sizes)  # type: ignore[attr-defined]
    low, high = axes.get_xlim()
    assert low < min(sizes) <= max(sizes) < high
    assert f"median {np.median(sizes):,.0f}" in "".join(text.get_text() for text in axes.texts)


@pytest.mark.parametrize("sizes", [[3, 5000], [5000, 3, 4800], [21, 60, 90, 500], [7] * 30, [3] * 9 + [999], [12, 40]])
def test_numbers_on_a_histogram_are_plain_and_do_not_overlap(figures: list[Figure], sizes: list[int]) -> None:
    plots.plot_stats(a_dataset(sizes), Path("figure.png"))
    figure, axes = figures[0], figures[0].axes[1]
    figure.draw_without_rendering()
    shown = [
        label
        for label in (*axes.get_xticklabels(), *axes.get_xticklabels(minor=True))
        if label.get_text() and axes.get_xlim()[0] <= label.get_position()[0] <= axes.get_xlim()[1]
    ]
    assert len(shown) > 1
    assert all(re.fullmatch(r"[\d,]+", label.get_text()) for label in shown)
    boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    (median,) = [text for text in axes.texts if "median" in text.get_text()]
    inside = axes.get_window_extent()
    assert inside.x0 < median.get_window_extent().x0 < median.get_window_extent().x1 < inside.x1


def test_figures_are_wide_enough_to_read(tmp_path: Path) -> None:
    run = a_run({"elimination+fedex": [[0.9, 0.3], [0.7, 0.1]], "fedex": [[0.9, 0.2], [0.7, 0.2]]}, entropy=2.0)
    paths = [
        plots.plot_incumbents(run, tmp_path / "figures" / "incumbents.png"),
        plots.plot_entropy(run, tmp_path / "figures" / "entropy.png"),
        plots.plot_stats(a_dataset([5, 6, 7]), tmp_path / "figures" / "stats.png"),
    ]
    for path in paths:
        assert path is not None
        picture = imread(path)
        assert picture.shape[1] == PIXELS
        assert picture[..., :3].std() > 0.01  # something is drawn
        frame = np.concatenate([picture[[0, -1], :, :3].ravel(), picture[:, [0, -1], :3].ravel()])
        assert frame.min() == 1  # and nothing runs over the edge


def test_nothing_global_is_touched() -> None:
    program = "import sys, fedtune.report.plots; sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@given(st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=15))
def test_labels_are_moved_apart_no_more_than_needed(heights: list[float]) -> None:
    gap = 0.06
    wanted = np.array(heights)
    order = np.argsort(wanted, kind="stable")
    offsets = gap * np.arange(len(wanted))
    places = plots.spread(wanted, gap)[order]
    assert np.all(np.diff(places) >= gap - 1e-9)
    assert places.min() >= -1e-9
    assert places.max() <= 1 + 1e-9
    # Least squares within bounds is the least-squares solution without them, cut off at them.
    free = isotonic_regression(wanted[order] - offsets)
    np.testing.assert_allclose(places - offsets, np.clip(free, 0, 1 - offsets[-1]), atol=1e-9)


def test_a_data_set_in_a_long_path_leaves_room_for_the_axes(tmp_path: Path) -> None:
    """Without room matplotlib warns, and warnings are errors."""
    run = a_run({"manual": [[0.5, 0.4]]})
    run.settings["data"]["name"] = "/".join(["folder"] * 100) + "/my_data.py:make"
    assert plots.plot_incumbents(run, tmp_path / "incumbents.png").is_file()


@pytest.mark.parametrize("name", ["$x_{$", "a$b$c.csv", "\x1b[2J"])
def test_the_name_of_a_data_set_is_no_formula(tmp_path: Path, name: str) -> None:
    run = a_run({"sha": [[0.5] * 3]})
    run.settings["data"] = {"name": name}
    assert plots.plot_incumbents(run, tmp_path / "incumbents.png").is_file()
