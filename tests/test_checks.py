from dataclasses import replace

import numpy as np
import pytest

from fedtune.data import FederatedDataset, checks, chunks, from_clients
from fedtune.data.checks import find_problems
from fedtune.data.problems import BadDataError
from fedtune.data.repeats import find_repeats
from fedtune.data.spec import DatasetSpec


def data_set(x, y, ranges, num_classes=10):
    spec = DatasetSpec(x.shape[1:], "real", num_classes)
    return FederatedDataset("made", spec, x, y, [f"c{i}" for i in range(len(ranges))], np.array(ranges, np.int64))


def random_data_set(seed, values, num_clients=6):
    """Clients of 3 to 12 examples; the fewer values a number may have, the more examples repeat."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, (num_clients, 3))
    stops = sizes.cumsum().reshape(sizes.shape)
    total = int(sizes.sum())
    x = rng.integers(0, values, (total, 2)).astype(np.float32)
    return data_set(x, rng.integers(0, 2, total), np.stack([stops - sizes, stops], 2))


@pytest.mark.parametrize("values", [1, 2, 4, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_repeats_are_those_of_a_comparison_of_all_pairs(seed, values, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 80)  # five examples
    dataset = random_data_set(seed, values)

    def rows(client, part):
        x, y = dataset.examples(client, part)
        return [(*row, label) for row, label in zip(x.tolist(), y.tolist(), strict=True)]

    train = [set(rows(client, "train")) for client in range(6)]
    tests = [(client, row) for client in range(6) for row in rows(client, "test")]
    own = [client for client, row in tests if row in train[client]]
    elsewhere = [client for client, row in tests if any(row in train[other] for other in range(6) if other != client)]
    repeats = find_repeats(dataset, dataset.ranges)
    assert sorted(repeats.own.tolist()) == own
    assert sorted(repeats.others[:, 0].tolist()) == elsewhere
    assert (repeats.others[:, 0] != repeats.others[:, 1]).all()


def test_equal_fingerprints_of_unequal_examples_are_no_repeats(monkeypatch):
    monkeypatch.setattr("fedtune.data.repeats._fingerprints", lambda values, array: np.zeros(len(values), np.uint64))
    dataset = data_set(np.arange(3.0)[:, None], np.zeros(3, np.int64), [[[0, 1], [1, 2], [2, 3]]])
    assert not len(find_repeats(dataset, dataset.ranges).own)


def test_repeated_test_examples_are_warnings_of_their_client_and_one_for_all_others():
    x = np.array([5, 1, 5, 7, 2, 5], np.float32)[:, None]
    dataset = data_set(x, np.array([0, 0, 0, 1, 1, 0]), [[[0, 1], [1, 2], [2, 3]], [[3, 4], [4, 5], [5, 6]]])
    problems = find_problems(dataset)
    assert [problem.message for problem in problems] == [
        "client 'c0': 1 of its 1 test examples also stand in its train part",
        "1 test examples also stand in another client's train part, such as one of client 'c1' in that of 'c0'",
    ]
    assert {problem.severity for problem in problems} == {"warning"}
    assert dataset.check() == []


@pytest.mark.parametrize("step", [1, 1000])
def test_a_lone_class_is_a_warning(monkeypatch, step):
    monkeypatch.setattr(checks, "chunk_size", lambda *arrays: step)
    x, ranges = np.arange(3.0)[:, None], [[[0, 1], [1, 2], [2, 3]]]
    (problem,) = find_problems(data_set(x, np.ones(3, np.int64), ranges), quick=True)
    assert problem.message == "labels should be of two classes or more, got 1 in every example"
    assert problem.severity == "warning"
    assert find_problems(data_set(x, np.array([1, 1, 0]), ranges)) == []


def test_a_quick_check_of_large_data_looks_at_some_clients_and_at_every_part(monkeypatch):
    x = np.arange(300, dtype=np.float32)[:, None]
    starts = np.arange(100)[:, None] * 3 + np.arange(3)
    ranges = np.stack([starts, starts + 1], 2)
    ranges[7, 2] = ranges[7, 2, 0]
    dataset = data_set(x, np.arange(300) % 2, ranges)
    x[3 * 50] = np.nan  # a client that two, spread evenly, do not include
    assert len(find_problems(dataset, quick=True)) == 2  # small data are read whole
    monkeypatch.setattr(checks, "QUICK_BYTES", 24 * 12 * 2)
    assert [problem.client for problem in find_problems(dataset, quick=True)] == ["c7"]
    x[0] = np.nan
    assert [problem.client for problem in find_problems(dataset, quick=True)] == ["c0", "c7"]
    assert [problem.client for problem in find_problems(dataset)] == ["c0", "c7", "c50"]


def test_clients_that_fit_are_checked_beside_those_that_do_not():
    x, y = np.arange(8, dtype=np.float32).reshape(4, 2), np.zeros(4, np.int64)
    clients = {"nan": (x * np.nan, y), "thin": (x[:, :1], y), 1: (x, y), "1": (x, y), "none": ([], []), "ok": (x, y)}
    with pytest.raises(BadDataError) as caught:
        from_clients(clients, name="bad", num_classes=1)
    assert [problem.message for problem in checks.errors_of(caught.value.problems)] == [
        "client 'nan': x must be finite, got NaN or infinity in 4 of its examples",
        "client 'thin': an example must have shape (2,) and dtype float32, as client 'nan' has, got (1,) and float32",
        "client id '1' must be unique, got it 2 times",
        "client 'none': a client must have at least 1 example, got none",
    ]


def test_labels_of_other_objectives():
    x, ranges = np.arange(3.0)[:, None], np.array([[[0, 1], [1, 2], [2, 3]]])
    spec = DatasetSpec((1,), "real", 0, objective="regression", target_shape=(1,))
    targets = FederatedDataset("r", spec, x, np.array([[0], [np.inf], [1]], np.float32), ["a"], ranges)
    assert targets.check() == ["client 'a': y must be finite, got NaN or infinity in 1 of its examples"]
    spec = DatasetSpec((1,), "real", 2, objective="next_token", target_shape=(2,))
    tokens = FederatedDataset("t", spec, x, np.array([[0, 1], [-100, 2], [-100, 1]]), ["a"], ranges)
    assert tokens.check() == [
        "client 'a': labels must be in 0..1, or -100 if a position does not count, got others in 1 of its examples, "
        "such as 2"
    ]
    stats = replace(tokens, y=np.zeros((3, 2), np.int64)).stats()
    assert stats["examples"] == 3
    assert "label_skew" not in stats
