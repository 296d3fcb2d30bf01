import time
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fedtune.data import FederatedDataset, from_clients
from fedtune.data.parts import PARTS
from fedtune.data.problems import BadDataError
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError, UnknownNameError


def numbered(sizes, seed=0, fractions=(0.8, 0.1, 0.1)):
    """A data set whose example is its own number, 0, 1, … in the order of the clients."""
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    clients = {
        f"c{i}": (np.arange(a, b, dtype=np.float32)[:, None], np.arange(a, b) % 10)
        for i, (a, b) in enumerate(pairwise(bounds))
    }
    return from_clients(clients, name="numbered", num_classes=10, seed=seed, fractions=fractions)


def parts_of(dataset, client):
    return [dataset.examples(client, part)[0][:, 0].astype(int).tolist() for part in PARTS]


def hand_made(ranges, client_ids=None, labels=None, num_classes=10):
    y = np.zeros(12, np.int64) if labels is None else np.array(labels, np.int64)
    ids = client_ids or [f"c{i}" for i in range(len(ranges))]
    spec = DatasetSpec((1,), "real", num_classes)
    return FederatedDataset("hand", spec, np.zeros((len(y), 1), np.float32), y, ids, np.array(ranges, np.int64))


@pytest.mark.parametrize("n", [3, 4, 5, 10, 14, 15, 16, 25, 60, 600, 601])
def test_the_parts_of_a_client_are_a_disjoint_cover_in_the_given_proportions(n):
    dataset = numbered([7, n, 5])
    train, validation, test = parts_of(dataset, 1)
    assert sorted(train + validation + test) == list(range(7, 7 + n))
    assert len(validation) == len(test) == max(1, round(0.1 * n))
    assert [dataset.num_examples(part)[1] for part in PARTS] == [len(train), len(validation), len(test)]
    assert dataset.check() == []


def test_labels_stay_with_their_examples():
    dataset = numbered([30, 40])
    for client in range(2):
        for part in PARTS:
            x, y = dataset.examples(client, part)
            assert (x[:, 0] % 10 == y).all()


def test_other_fractions_are_taken():
    train, validation, test = parts_of(numbered([100], fractions=(0.5, 0.3, 0.2)), 0)
    assert (len(train), len(validation), len(test)) == (50, 30, 20)


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1)])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(InputError, match="fractions must be > 0 and sum to 1"):
        numbered([10], fractions=fractions)


def test_the_split_depends_on_the_seed_and_the_client_and_on_nothing_else():
    one = parts_of(numbered([50, 60, 70]), 1)
    assert parts_of(numbered([50, 60, 70]), 1) == one
    assert parts_of(numbered([50, 60, 70, 80]), 1) == one
    assert parts_of(numbered([50, 60, 70], seed=1), 1) != one
    first, second = parts_of(numbered([50, 50]), 0), parts_of(numbered([50, 50]), 1)
    assert [[i - 50 for i in part] for part in second] != first
    assert first[0] != sorted(first[0])


def test_reading_a_client_gives_views():
    dataset = numbered([20, 20])
    for part in PARTS:
        x, y = dataset.examples(1, part)
        assert np.shares_memory(x, dataset.x)
        assert np.shares_memory(y, dataset.y)


def test_a_partition_gives_the_named_examples_to_each_client():
    x = np.arange(100, dtype=np.uint8).reshape(50, 2)
    y = np.arange(50, dtype=np.uint8)
    indices = [np.arange(0, 50, 2), np.array([1, 3, 5, 49])]
    dataset = FederatedDataset.from_partition(x, y, indices, name="odd", scale=1 / 255)
    assert dataset.client_ids == ["0", "1"]
    assert dataset.num_clients == 2
    assert dataset.spec == DatasetSpec((2,), "real", 50, 1 / 255)
    assert (dataset.x.dtype, dataset.y.dtype) == (np.uint8, np.int64)
    for client, chosen in enumerate(indices):
        held = np.concatenate([dataset.examples(client, part)[1] for part in PARTS])
        rows = np.concatenate([dataset.examples(client, part)[0] for part in PARTS])
        assert sorted(held) == chosen.tolist()
        assert (rows == x[held]).all()


def test_both_constructors_split_alike():
    x, y = np.arange(40.0)[:, None], np.arange(40) % 3
    one = FederatedDataset.from_partition(x, y, [np.arange(15), np.arange(15, 40)], name="a", seed=3)
    other = from_clients({"0": (x[:15], y[:15]), "1": (x[15:], y[15:])}, name="a", seed=3)
    assert (one.x == other.x).all()
    assert (one.y == other.y).all()
    assert (one.ranges == other.ranges).all()
    assert one.spec == other.spec == DatasetSpec((1,), "real", 3)


def test_splitting_a_thousand_clients_and_reading_one_of_a_million_is_cheap():
    started = time.process_time()
    numbered([60] * 1000)
    assert time.process_time() - started < 1
    starts = np.arange(1_000_000)[:, None] * 3 + np.arange(3)
    ranges = np.stack([starts, starts + 1], axis=2)
    y = np.zeros(3_000_000, np.int64)
    dataset = FederatedDataset("large", DatasetSpec((), "real", 2), y.astype(np.uint8), y, range_of_names(), ranges)
    started = time.process_time()
    for client in range(0, 1_000_000, 1000):
        assert dataset.examples(client, "test")[1].shape == (1,)
    assert time.process_time() - started < 0.5  # 1,000 reads; any work per client of the data set takes far longer
    tenth = slice(100_000)
    assert replace(dataset, client_ids=dataset.client_ids[tenth], ranges=ranges[tenth]).check() == []


def range_of_names():
    return [str(client) for client in range(1_000_000)]


def test_check_reports_every_problem_by_client():
    three = (np.zeros((3, 1), np.float32), np.zeros(3, np.int64))
    nan = (np.array([[0], [np.nan], [1], [np.inf]], np.float32), np.zeros(4, np.int64))
    labels = (np.zeros((6, 1), np.float32), np.array([0, 1, 2, -1, 2, 5]))
    clients = {"good": three, "empty": (three[0][:0], three[1][:0]), "two": (three[0][:2], three[1][:2])}
    clients |= {"nan": nan, "labels": labels}
    problems = from_clients(clients, name="bad", num_classes=3).check()
    assert problems[:-1] == [
        "client 'empty': train must have at least 1 example, got 0 of the client's 0",
        "client 'empty': validation must have at least 1 example, got 0 of the client's 0",
        "client 'empty': test must have at least 1 example, got 0 of the client's 0",
        "client 'two': train must have at least 1 example, got 0 of the client's 2",
        "client 'nan': x must be finite, got NaN or infinity in 2 of its examples",
    ]
    assert problems[-1] in {
        f"client 'labels': labels must be in 0..2, got 2 others, such as {label}" for label in (-1, 5)
    }


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 2], [1, 3], [3, 4]],  # train and validation share example 1
        [[2, 4], [4, 5], [0, 3]],  # so do train and test, whatever their order
        [[0, 2], [2, 3], [11, 13]],
        [[-1, 2], [2, 3], [3, 4]],
        [[2, 0], [2, 3], [3, 4]],
    ],
)
def test_check_reports_parts_that_overlap_or_leave_the_examples(parts):
    problems = hand_made([[[6, 8], [8, 9], [9, 10]], parts]).check()
    assert problems[0] == "client 'c1': its parts must lie within the 12 examples and not overlap"
    assert not any("c0" in problem for problem in problems)


def test_check_reports_duplicate_ids():
    parts = [[[i, i + 1], [i + 1, i + 2], [i + 2, i + 3]] for i in (0, 3, 6)]
    assert hand_made(parts, client_ids=["a", "b", "a"]).check() == ["client id 'a' must be unique, got it 2 times"]


def test_check_takes_parts_with_gaps_and_any_order():
    assert hand_made([[[4, 8], [0, 1], [2, 3]], [[9, 10], [10, 11], [11, 12]]]).check() == []


def test_stats_against_their_definitions():
    labels = [0] * 4 + [0, 0, 1, 1] + [1, 1, 1, 1]
    parts = [[[0, 2], [2, 3], [3, 4]], [[4, 6], [6, 7], [7, 8]], [[8, 10], [10, 11], [11, 12]]]
    stats = hand_made(parts, labels=labels, num_classes=2).stats()
    assert (stats["clients"], stats["examples"], stats["train"], stats["validation"], stats["test"]) == (3, 12, 6, 3, 3)
    assert (stats["std"], stats["skewness"]) == (0, 0)
    assert stats["label_skew"] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)  # against half zeros, half ones


def test_stats_of_uneven_sizes_agree_with_scipy():
    from scipy.stats import skew

    sizes = [3, 4, 5, 40, 100]
    stats = numbered(sizes).stats()
    assert stats["mean"] == pytest.approx(np.mean(sizes))
    assert stats["std"] == pytest.approx(np.std(sizes))
    assert stats["skewness"] == pytest.approx(skew(sizes))
    assert (stats["smallest"], stats["largest"]) == (3, 100)


def test_label_skew_reads_each_part_wherever_it_lies():
    # The client's parts in reverse order, and a gap: examples 3 and 7 belong to nobody.
    labels = [0, 0, 0, 9, 1, 1, 1, 9]
    stats = hand_made([[[2, 3], [1, 2], [0, 1]], [[6, 7], [5, 6], [4, 5]]], labels=labels).stats()
    assert stats["label_skew"] == 1 / 2


def test_stats_of_a_data_set_with_problems_are_refused():
    with pytest.raises(InputError, match="got 1, first: client 'c0': train must have"):
        numbered([2, 10]).stats()


def test_clients_whose_arrays_differ_are_refused_all_at_once():
    x, y = np.arange(8, dtype=np.float32).reshape(4, 2), np.arange(4) % 2
    clients = {
        "a": (x, y),
        "b": (x[:, :1], y),
        "c": (x.astype(np.float64), y),
        "d": (x, y[:3]),
        "e": (x, y.astype(np.float64)),
    }
    with pytest.raises(BadDataError) as caught:
        from_clients(clients, name="bad")
    assert str(caught.value) == f"{caught.value.problems[0].message} (and 3 more)"
    assert [problem.message for problem in caught.value.problems] == [
        "client 'b': an example must have shape (2,) and dtype float32, as client 'a' has, got (1,) and float32",
        "client 'c': an example must have shape (2,) and dtype float32, as client 'a' has, got (2,) and float64",
        "client 'd': y must have one label an example, got shapes (4, 2), (3,)",
        "client 'e': labels must be whole numbers, got dtype float64",
    ]


def test_a_data_set_without_clients_is_refused():
    with pytest.raises(InputError, match="at least one client"):
        from_clients({}, name="none")
    with pytest.raises(InputError, match="at least one client"):
        FederatedDataset.from_partition(np.zeros((3, 1)), np.zeros(3, np.int64), [], name="none")


def test_the_wrong_kind_of_input_is_refused():
    clients = {"a": (np.zeros((4, 2), np.float32), np.zeros(4, np.int64))}
    with pytest.raises(InputError, match="x must hold token inputs, got dtype float32"):
        from_clients(clients, name="bad", input_kind="token")
    with pytest.raises(UnknownNameError, match="unknown input_kind 'image'; known: real, token"):
        from_clients(clients, name="bad", input_kind="image")


def test_tokens_are_kept_as_they_are_stored():
    clients = {"a": (np.full((4, 80), 79, np.uint8), np.arange(4))}
    dataset = from_clients(clients, name="text", num_classes=80, input_kind="token")
    assert (dataset.x.dtype, dataset.spec) == (np.uint8, DatasetSpec((80,), "token", 80))


def test_an_unknown_part_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="unknown part 'valid'; known: test, train, validation"):
        numbered([10]).examples(0, "valid")


@pytest.mark.parametrize(("field", "value"), [("num_classes", 0), ("scale", 0.0), ("scale", float("nan"))])
def test_impossible_specs_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field} must be"):
        DatasetSpec(**{"input_shape": (), "input_kind": "real", "num_classes": 2, field: value})


def test_arrays_that_do_not_fit_together_are_refused():
    spec = DatasetSpec((1,), "real", 2)
    x, y, ranges = np.zeros((3, 1), np.float32), np.zeros(3, np.int64), np.array([[[0, 1], [1, 2], [2, 3]]])
    for broken, message in [
        ((x, y.astype(np.int32), ["a"], ranges), "y must have dtype int64"),
        ((x, y[:2], ["a"], ranges), "y must have one label an example"),
        ((x[..., None], y, ["a"], ranges), "an example must have shape"),
        ((x, y, ["a", "b"], ranges), "ranges must be int64 of shape"),
        ((x, y, ["a"], ranges.astype(float)), "ranges must be int64 of shape"),
        ((x, y, [], ranges[:0]), "at least one client"),
    ]:
        with pytest.raises(InputError, match=message):
            FederatedDataset("bad", spec, *broken)


def of_text(text, parts=((0, 2), (2, 3), (3, 4)), window=3, num_classes=10):
    return FederatedDataset.from_text(
        text, ["a"], np.array([parts]), name="text", window=window, num_classes=num_classes
    )


def test_examples_of_a_text_are_its_windows_and_the_characters_that_follow():
    text = np.array([3, 1, 4, 1, 5, 9, 2], np.uint8)
    dataset = of_text(text)
    assert dataset.spec == DatasetSpec((3,), "token", 10)
    assert dataset.x.tolist() == [[3, 1, 4], [1, 4, 1], [4, 1, 5], [1, 5, 9]]
    assert dataset.y.tolist() == [1, 5, 9, 2]
    assert dataset.check() == []
    x, y = dataset.examples(0, "train")
    assert (x.tolist(), y.tolist()) == ([[3, 1, 4], [1, 4, 1]], [1, 5])


def test_a_text_is_kept_once():
    text = np.random.default_rng(0).integers(10, size=1_000_000).astype(np.uint8)
    tracemalloc.start()
    dataset = of_text(text, ((0, 100_000), (100_000, 110_000), (110_000, 120_000)), window=80)
    dataset.check()
    dataset.stats()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.shares_memory(dataset.x, text)
    assert dataset.x.nbytes == 80 * len(dataset.y)
    assert peak < dataset.x.nbytes / 2  # some arrays of one number an example


@pytest.mark.parametrize("window", [0, 7, 8])
def test_a_window_that_does_not_fit_is_refused(window):
    with pytest.raises(InputError, match=rf"window must be 1 to 6 \(the text has 7 characters\), got {window}"):
        of_text(np.zeros(7, np.uint8), window=window)


def test_check_reports_characters_that_are_no_class():
    text = np.array([10, 1, 4, 1, 11, 9, 2], np.uint8)  # the first is no label of any example
    assert of_text(text).check() == [
        "text: characters must be in 0..9, got 2 others, such as 10",
        "client 'a': labels must be in 0..9, got 1 others, such as 11",
    ]


@pytest.mark.parametrize("make", [lambda: of_text(np.arange(7, dtype=np.uint8)), lambda: numbered([5, 9])])
def test_another_process_makes_the_same_examples_from_the_shared_arrays(make):
    dataset = make()
    again = FederatedDataset.from_shared(dataset.spec, dataset.shared())
    assert again.num_clients == dataset.num_clients
    for client in range(dataset.num_clients):
        for part in PARTS:
            for array, expected in zip(again.examples(client, part), dataset.examples(client, part), strict=True):
                assert np.shares_memory(array, expected)
                assert array.tolist() == expected.tolist()


def test_what_is_shared_of_a_text_are_not_its_windows():
    dataset = of_text(np.zeros(1000, np.uint8), window=80)
    assert set(dataset.shared()) == {"text", "y", "ranges"}
    assert sum(array.nbytes for array in dataset.shared().values()) < 1000 + 8 * 1000 + 100
