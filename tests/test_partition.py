import warnings
from itertools import combinations

import numpy as np
import pytest

from fedtune import rng
from fedtune.data.partition import make_partition
from fedtune.errors import InputError, UnknownNameError


def random_labels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 10, n)


def label_counts(labels, parts):
    return np.array([np.bincount(labels[part], minlength=10) for part in parts])


@pytest.mark.parametrize("name", ["iid", "shards", "dirichlet"])
@pytest.mark.parametrize(("num_clients", "examples_per_client"), [(1, None), (10, None), (40, 30)])
def test_every_partition_is_a_disjoint_cover_with_enough_for_each_client(name, num_clients, examples_per_client):
    labels = random_labels(2000)
    parts = make_partition(labels, name, num_clients, seed=0, examples_per_client=examples_per_client)
    held = np.concatenate(parts)
    assert len(parts) == num_clients
    assert min(len(part) for part in parts) >= 3
    assert len(np.unique(held)) == len(held) == num_clients * (examples_per_client or 2000 // num_clients)
    assert all((np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize("name", ["iid", "shards", "dirichlet"])
def test_a_partition_is_a_function_of_its_seed(name):
    labels = random_labels(600)
    np.random.seed(5)  # noqa: NPY002 the global generator must neither matter nor move
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = make_partition(labels, name, 10, seed=1)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    again, other = make_partition(labels, name, 10, seed=1), make_partition(labels, name, 10, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("name", "num_clients", "examples_per_client", "options"),
    [
        ("iid", 7, None, {}),
        ("shards", 50, None, {}),
        ("shards", 20, 30, {"shards_per_client": 5}),
        ("dirichlet", 20, None, {}),
        ("dirichlet", 5, 100, {"alpha": 3.0}),
        ("dirichlet", 40, None, {"alpha": 0.12}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_partitions_are_those_of_flwr_datasets(name, num_clients, examples_per_client, options, seed):
    """The last case with seed 1 is drawn several times, of which theirs warns."""
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, ShardPartitioner

    import datasets

    labels = random_labels(2000).astype(np.uint8)
    used = len(labels) if examples_per_client is None else num_clients * examples_per_client
    chosen = rng.stream(seed, "partition").permutation(len(labels))[:used]
    draw_seed, shards = rng.derived_seed(seed, "partitioner"), options.get("shards_per_client", 2)
    alpha = float(options.get("alpha", 0.5))
    partitioner = {
        "iid": lambda: IidPartitioner(num_clients),
        "shards": lambda: ShardPartitioner(num_clients, "label", num_shards_per_partition=shards, seed=draw_seed),
        "dirichlet": lambda: DirichletPartitioner(num_clients, "label", alpha, min_partition_size=3, seed=draw_seed),
    }[name]()
    partitioner.dataset = datasets.Dataset.from_dict({"label": labels[chosen], "example": chosen})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = [np.sort(partitioner.load_partition(client)["example"][:]) for client in range(num_clients)]
    ours = make_partition(labels, name, num_clients, seed=seed, examples_per_client=examples_per_client, **options)
    assert all(np.array_equal(part, expected) for part, expected in zip(ours, parts, strict=True))
    drawn_again = any("min_partition_size" in str(warning.message) for warning in caught)
    assert drawn_again == (options.get("alpha") == 0.12 and seed == 1)


def test_iid_sizes_differ_by_one_and_examples_are_shuffled():
    labels = np.repeat(np.arange(10), 100)
    parts = make_partition(labels, "iid", 7, seed=0)
    assert {len(part) for part in parts} == {1000 // 7, 1000 // 7 + 1}
    # A label is missing from a client of 142 or more with probability below 0.9**142 = 3e-7; 70 such cells.
    assert (label_counts(labels, parts) > 0).all()


def test_shards_are_those_of_mcmahan():
    """100 clients of 60,000 examples: 200 shards of 300 of the examples sorted by label, two random ones a client."""
    labels = random_labels(60_000)
    counts = label_counts(labels, make_partition(labels, "shards", 100, seed=0))
    shards = np.array([np.bincount(shard, minlength=10) for shard in np.sort(labels).reshape(200, 300)])
    pairs = {tuple(a + b) for a, b in combinations(shards, 2)}
    assert {tuple(row) for row in counts} <= pairs
    assert (counts.sum(1) == 600).all()
    assert (counts > 0).sum(1).max() <= 4
    assert (counts.sum(0) == np.bincount(labels)).all()


def test_the_two_shards_of_a_client_are_random():
    labels = np.repeat(np.arange(10), 6000)  # 20 pure shards a digit
    counts = label_counts(labels, make_partition(labels, "shards", 100, seed=0))
    assert (counts % 300 == 0).all()
    single = ((counts > 0).sum(1) == 1).sum()
    # Expected 100 * 19/199 = 9.5, near Poisson: outside 1..24 with probability below 1e-4; in sorted order 100.
    assert 1 <= single <= 24


def test_which_shards_a_client_has_depends_on_the_seed():
    labels = np.repeat(np.arange(10), 60)
    first, second = (label_counts(labels, make_partition(labels, "shards", 20, seed=seed)) for seed in (0, 1))
    assert (first != second).any()


def test_the_number_of_shards_can_be_set():
    labels = np.repeat(np.arange(10), 60)
    counts = label_counts(labels, make_partition(labels, "shards", 20, seed=0, shards_per_client=1))
    assert ((counts > 0).sum(1) == 1).all()


def test_dirichlet_is_per_class_and_alpha_sets_its_skew():
    labels = random_labels(20_000)
    spread = {}
    for alpha in (0.2, 1000.0):
        counts = label_counts(labels, make_partition(labels, "dirichlet", 20, seed=0, alpha=alpha))
        spread[alpha] = (counts / counts.sum(0)).std()  # of the clients' shares of each label
    # A share of Dirichlet(alpha) among n has variance (n - 1) / n^2 / (n alpha + 1). The standard deviation of 200
    # shares has a relative error of about a tenth, so 0.5 is five of those; rounding to examples adds less than 1e-3.
    for alpha, std in spread.items():
        expected = np.sqrt(19 / 400 / (20 * alpha + 1))
        assert std == pytest.approx(expected, rel=0.5)


def test_dirichlet_that_leaves_clients_too_small_is_an_input_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="alpha must be large enough to give each of 100 clients 3 of 1000"):
            make_partition(random_labels(1000), "dirichlet", 100, seed=0, alpha=0.01)


def test_examples_are_drawn_at_random_and_clients_may_use_them_all():
    labels = random_labels(1000)
    some = np.concatenate(make_partition(labels, "iid", 10, seed=0, examples_per_client=20))
    # 200 of 1000: the first half holds 100 ± 6.3 of them; outside 60..140 with probability below 1e-9.
    assert 60 <= (some < 500).sum() <= 140
    assert len(np.concatenate(make_partition(labels, "iid", 10, seed=0, examples_per_client=100))) == 1000


@pytest.mark.parametrize(
    ("name", "num_clients", "options", "message"),
    [
        ("iid", 0, {}, "num_clients must be 1 to 33"),
        ("iid", 34, {}, "num_clients must be 1 to 33 .*, got 34"),
        ("iid", 10, {"alpha": 0.5}, "alpha must be left out with partition 'iid', got 0.5"),
        ("shards", 10, {"alpha": 0.5}, "alpha must be left out with partition 'shards'"),
        ("dirichlet", 10, {"shards_per_client": 2}, "shards_per_client must be left out with partition 'dirichlet'"),
        ("dirichlet", 10, {"alpha": 0.0}, "alpha must be a finite number > 0, got 0.0"),
        ("dirichlet", 10, {"alpha": float("nan")}, "alpha must be a finite number > 0, got nan"),
        ("shards", 10, {"shards_per_client": 0}, "shards_per_client must be >= 1, got 0"),
        ("shards", 7, {}, "must divide the examples into equal shards, got 14 for 100 examples"),
        ("iid", 10, {"examples_per_client": 2}, "examples_per_client must be 3 to 10 .*, got 2"),
        ("iid", 10, {"examples_per_client": 11}, "examples_per_client must be 3 to 10 .*, got 11"),
    ],
)
def test_what_is_impossible_is_refused(name, num_clients, options, message):
    with pytest.raises(InputError, match=message):
        make_partition(random_labels(100), name, num_clients, seed=0, **options)


def test_an_unknown_partition_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="unknown partition 'iidd'; known: dirichlet, iid, shards"):
        make_partition(random_labels(100), "iidd", 10, seed=0)
