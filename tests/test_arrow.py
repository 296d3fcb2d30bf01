"""Arrow files that are mapped into memory."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import fedtune
from fedtune.data import checks
from fedtune.data.mapped import place_of
from fedtune.data.parts import PARTS
from fedtune.errors import InputError, UnknownNameError

ROWS, CLIENTS = 60, 6


def columns():
    draws = np.random.default_rng(0)
    pixels = draws.normal(size=(ROWS, 2, 3)).astype(np.float32)
    return {
        "user": [f"u{CLIENTS - number % CLIENTS}" for number in sorted(range(ROWS), key=lambda row: row % CLIENTS)],
        "left": draws.normal(size=ROWS),
        "right": draws.normal(size=ROWS),
        "label": draws.integers(0, 3, ROWS),
        "target": draws.normal(size=ROWS).astype(np.float32),
        "name": draws.choice(["cat", "dog"], ROWS),
        "pixels": pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pixels.ravel(), 3), 2),
        "whole": draws.integers(0, 9, ROWS),
    }


def write(path, columns, compression=None, rows=ROWS):
    table = pa.table(columns)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return str(path)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (["left", "right"], lambda table: np.stack([table["left"], table["right"]], axis=1)),
        (["right"], lambda table: table["right"][:, None]),
        (["whole"], lambda table: table["whole"][:, None]),
        (["pixels"], lambda table: np.array(table["pixels"].to_pylist(), np.float32)),
    ],
)
@pytest.mark.parametrize("kind", ["text", "category", "number"])
def test_a_mapped_table_is_the_table_and_lies_in_its_file(tmp_path, features, expected, kind):
    table = columns()
    users = table["user"]
    if kind == "category":
        table["user"] = pa.array(users).dictionary_encode()
    if kind == "number":
        table["user"] = [int(user[1:]) for user in users]
    path = write(tmp_path / "users.arrow", table)
    dataset = fedtune.load(path, client="user", label="label", features=features, mapped=True)
    assert dataset.client_ids == [str(user) for user in pd.unique(pd.Series(table["user"]))]
    np.testing.assert_array_equal(dataset.x, expected(table))
    np.testing.assert_array_equal(dataset.y, table["label"])
    assert dataset.sizes().sum(1).tolist() == [ROWS // CLIENTS] * CLIENTS
    for array in (dataset.x, dataset.y):
        assert place_of(array).path == path
    for number, part in enumerate(PARTS):  # in the order of the file
        rows = dataset.ranges[:, number]
        assert (rows[1:] - rows[:-1] == ROWS // CLIENTS).all(), part


@pytest.mark.parametrize(("label", "objective"), [("target", "regression"), ("right", "regression")])
def test_targets_stay_as_they_are(tmp_path, label, objective):
    path = write(tmp_path / "users.feather", columns())
    options = {"client": "user", "label": label, "objective": objective, "features": ["left"], "mapped": True}
    dataset = fedtune.load(path, **options)
    np.testing.assert_array_equal(dataset.y, columns()[label].astype(np.float32))
    assert (place_of(dataset.y) is not None) == (label == "target")  # the other is float64


def test_labels_that_are_names_are_numbered(tmp_path):
    path = write(tmp_path / "users.arrow", columns())
    dataset = fedtune.load(path, client="user", label="name", features=["left"], mapped=True)
    assert dataset.y.tolist() == (columns()["name"] == "dog").tolist()
    assert dataset.spec.num_classes == 2


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_without_mapped_an_arrow_file_is_read_as_any_table(tmp_path, compression):
    table = columns()
    frame = pd.DataFrame({name: table[name] for name in ("user", "left", "label")}).sample(frac=1, random_state=0)
    write(tmp_path / "users.arrow", {name: frame[name].to_numpy() for name in frame}, compression, rows=7)
    frame.to_csv(tmp_path / "users.csv", index=False)
    mine, other = (
        fedtune.load(str(tmp_path / f"users.{kind}"), client="user", label="label") for kind in ("arrow", "csv")
    )
    np.testing.assert_allclose(mine.x, other.x, rtol=1e-6)
    np.testing.assert_array_equal(mine.y, other.y)


def two_places(table):
    table["user"] = table["user"][1:] + table["user"][:1]


def hole(table):
    table["left"] = pa.array(table["left"], mask=np.arange(ROWS) == 3)


def nobody(table):
    table["user"] = [None, *table["user"][1:]]


def unlike(table):
    table["right"] = table["right"].astype(np.float32)


def apart(table):
    table["far"] = table["left"]


def ragged(table):
    table["left"] = [[1.0]] * ROWS


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (two_places, {}, r"must be sorted by 'user', got the rows of 'u6' in several places; without data\.mapped it"),
        (hole, {}, r"must have no missing value, got 1 in column 'left'; without"),
        (nobody, {}, r"column 'user' must have a value in every row, got none in 1 of 60"),
        (unlike, {}, r"must have features of one type of number, or one feature of lists; without"),
        (None, {"features": ["left", "pixels"]}, r"must have features of one type of number, or one feature of lists"),
        (apart, {"features": ["left", "right", "far"]}, r"must hold its features side by side"),
        (None, {"features": ["right", "left"]}, r"must hold its features side by side"),
        (ragged, {}, r"must hold numbers or lists of one size, got column 'left' of type list<item: double>"),
        (None, {"features": ["name"]}, r"must hold numbers or lists of one size, got column 'name' of type string"),
        (None, {"features": ["left", "user"]}, r"features must be other columns than the client and the label, got 'u"),
        (None, {"client": "pixels"}, r"column 'pixels' must hold names or numbers, got type fixed_size_list"),
        (None, {"client": "who"}, r"unknown column 'who'; known: "),
        (None, {"standardize": True}, r"standardize must be false for a mapped table, .* got true"),
        (None, {"compression": "lz4"}, r"must be uncompressed; without"),
        (None, {"rows": 7}, r"must have one record batch, got 9; without"),
    ],
)
def test_what_can_not_be_mapped_is_one_line(tmp_path, change, options, message):
    table = columns()
    if change:
        change(table)
    written = {name: options.pop(name) for name in ("compression", "rows") if name in options}
    path = write(tmp_path / "users.arrow", table, **written)
    given = {"client": "user", "label": "label", "features": ["left", "right"], "mapped": True, **options}
    with pytest.raises((InputError, UnknownNameError), match=message) as raised:
        fedtune.load(path, **given)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_arrow_file_is_one_line(tmp_path):
    (tmp_path / "empty.arrow").write_bytes(b"")
    (tmp_path / "wrong.arrow").write_bytes(b"no" * 99)
    (tmp_path / "users.parquet").write_bytes(b"")
    write(tmp_path / "none.arrow", {"user": pa.array([], pa.string()), "x": np.zeros(0), "y": np.zeros(0, int)})
    for name, message in (
        ("empty.arrow", "can't be read"),
        ("wrong.arrow", "can't be read"),
        ("missing.arrow", "does not exist"),
        ("none.arrow", "must have one record batch, got 0"),
        ("users.parquet", r"a mapped table must be a file that ends in \.arrow or \.feather, got .*users.parquet"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            fedtune.load(str(tmp_path / name), client="user", label="y", mapped=True)
        assert "\n" not in str(raised.value)


def in_memory(kind, path=""):
    """How many bytes this process holds: with a path, of that file's pages; else of its own."""
    held, inside = 0, False
    for line in Path("/proc/self/smaps" if path else "/proc/self/status").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(path)
        elif line.startswith(kind) and (inside or not path):
            held += 1024 * int(line.split()[1])
    return held


def test_a_hundred_thousand_clients_in_an_arrow_file(tmp_path, monkeypatch):
    """Loading reads the clients and the labels, and a run its cohorts: neither the examples."""
    monkeypatch.setattr(checks, "QUICK_BYTES", 2**20)  # so that the check too reads some clients
    rows, width = 1_000_000, 32
    draws = np.random.default_rng(0)
    y = draws.integers(0, 4, rows)
    x = np.tile(draws.normal(0, 0.3, (1000, width)).astype(np.float32), (rows // 1000, 1))  # 128 MB
    x[np.arange(rows), y] += 1
    pixels = pa.FixedSizeListArray.from_arrays(x.ravel(), width)
    table = {"user": np.repeat(np.arange(100_000, dtype=np.int32), 10), "pixels": pixels, "label": y}
    path, num_bytes = write(tmp_path / "users.arrow", table, rows=rows), x.nbytes
    del x, pixels, table
    before = in_memory("RssAnon:")
    dataset = fedtune.load(path, client="user", label="label", mapped=True)
    assert dataset.num_clients == 100_000
    assert in_memory("RssAnon:") - before < num_bytes / 4
    assert in_memory("Rss:", path) < y.nbytes + 2**20
    data = {"client": "user", "label": "label", "mapped": True}
    options = {"model": {"name": "logistic"}, "evaluation": {"clients": 20}, "workers": 2, "out": tmp_path / "run"}
    run = fedtune.train(path, rounds=10, data=data, executor="pool", **options)
    assert run.results["test_error"].item() < 0.6


def test_the_number_of_processes_never_changes_a_number(tmp_path):
    path = write(tmp_path / "users.arrow", columns())
    data = {"client": "user", "label": "label", "features": ["left", "right"], "mapped": True}
    options = {"model": {"name": "logistic"}, "data": data, "cohort_size": 3, "rounds": 4}
    serial, pool = (
        fedtune.train(path, **options, executor=name, workers=2, out=tmp_path / name).results
        for name in ("serial", "pool")
    )
    pd.testing.assert_frame_equal(serial, pool)
