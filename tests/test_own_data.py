"""Everybody's own data: tables, folders, torch and Hugging Face data sets, arrays in mapped files."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from flwr_datasets.partitioner import NaturalIdPartitioner
from PIL import Image
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import datasets
import fedtune
from fedtune.cli import app
from fedtune.data import from_clients, from_folder, from_frame, from_hub, from_torch
from fedtune.data.parts import PARTS
from fedtune.errors import InputError, UnknownNameError


def frame():
    draws = np.random.default_rng(0)
    size, noise = draws.normal(50, 20, 120), draws.normal(0, 1, 120)
    return pd.DataFrame(
        {
            "user": draws.permutation([f"u{number % 6}" for number in range(120)]),
            "size": size,
            "age": draws.integers(20, 80, 120),
            "likes": np.where(size + noise > 50, "cats", "dogs"),
            "price": 3 * size + noise,
        }
    )


def client_rows(dataset, client):
    return np.concatenate([dataset.examples(client, part)[0] for part in PARTS])


def test_a_frame_becomes_a_client_for_each_name():
    table = frame()
    dataset = from_frame(table, client="user", label="likes", features=["size", "age"], standardize=False)
    assert dataset.client_ids == [f"u{number}" for number in range(6)]
    for number, client_id in enumerate(dataset.client_ids):
        expected = table[table.user == client_id][["size", "age"]].to_numpy(np.float32)
        assert sorted(map(tuple, client_rows(dataset, number))) == sorted(map(tuple, expected))
    assert dataset.spec.num_classes == 2
    x, y = dataset.x[:, 0], dataset.y
    assert y[x > 55].tolist() == [0] * (x > 55).sum()  # cats come first


def test_features_have_mean_0_and_variance_1():
    x = from_frame(frame(), client="user", label="price", features=["size", "age"], objective="regression").x
    assert x.mean(0) == pytest.approx([0, 0], abs=1e-5)
    assert x.std(0) == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"client": "who"}, "unknown column 'who'; known: "),
        ({}, {"label": "love"}, "unknown column 'love'; known: "),
        ({}, {}, "features must be numbers, got column 'likes' of type"),
        ({"likes": None}, {}, "column 'likes' must have a value in every row, got none in 120 of 120"),
        ({}, {"label": "price", "features": ["age"]}, "labels of a classification must be whole numbers or names, got"),
        ({}, {"label": "likes", "features": ["age"], "objective": "regression"}, "labels of a regression must be num"),
        ({}, {"label": "user"}, "label must be another column than the client, got 'user' for both"),
        ({}, {"features": ["age", "size", "age"]}, "features must name each column once, got 'age' twice"),
        ({"likes": 0}, {}, "must be of two classes or more, got 0 in every row of column 'likes'"),
        ({"likes": "cats"}, {}, "must be of two classes or more, got 'cats' in every row of column 'likes'"),
        ({"likes": range(120)}, {}, "must repeat, got 120 different ones in the 120 rows of column 'likes'; for a n"),
        ({"likes": [str(row) for row in range(120)]}, {}, "must repeat, got 120 different ones in the 120 rows of co"),
        ({}, {"features": []}, "a table must have a column in addition to 'user' and 'price', got none"),
    ],
)
def test_a_bad_table_is_one_line(change, options, message):
    table = frame().assign(**change)
    given = {"client": "user", "label": "price" if not change else "likes", **options}
    if change:
        given["features"] = ["age"]
    with pytest.raises((InputError, UnknownNameError), match=message):
        from_frame(table, **given)


def test_a_column_that_stands_twice_is_one_line(tmp_path):
    path = tmp_path / "users.csv"
    path.write_text("user,age,age,likes\n" + "ann,1,2,0\nbob,3,4,1\n" * 9)
    options = {"client": "user", "label": "likes"}
    with pytest.raises(InputError, match=r"^a table must name each column once, got 'age' twice$"):
        fedtune.load(str(path), **options)
    twice = pd.read_csv(path).set_axis(["user", "age", "age", "likes"], axis=1)
    with pytest.raises(InputError, match=r"^a table must name each column once, got 'age' twice$"):
        from_frame(twice, **options)


def test_a_column_without_values_is_named_once(tmp_path):
    path = tmp_path / "users.csv"
    frame().assign(likes=np.arange(120) % 2, age=None).to_csv(path, index=False)
    with pytest.raises(InputError, match=r"^features must have values, got column 'age' with none in 120 rows$"):
        fedtune.load(str(path), client="user", label="likes")


def test_a_long_table_whose_column_changes_its_type_leaks_no_warning(tmp_path, recwarn):
    path = tmp_path / "users.csv"
    lines = [f"u{number % 3},{number},{number % 2}" for number in range(400_000)]
    path.write_text("\n".join(["user,age,likes", *lines, "u1,old,1"]))
    with pytest.raises(InputError, match=r"got column 'age' of type \w+, such as 'old'"):
        fedtune.load(str(path), client="user", label="likes")
    assert [str(warning.message) for warning in recwarn] == []


def test_a_negative_seed_is_one_line(tmp_path):
    path = tmp_path / "users.csv"
    frame().to_csv(path, index=False)
    with pytest.raises(InputError, match=r"^seed must be a whole number >= 0, got -1$"):
        fedtune.load(str(path), client="user", label="likes", features=["age"], seed=-1)


def test_missing_numbers_are_found_by_client():
    table = frame()
    table.loc[table.user == "u3", "size"] = np.nan
    dataset = from_frame(table, client="user", label="likes", features=["size"], standardize=False)
    (problem,) = dataset.check()
    assert problem.startswith("client 'u3': x must be finite, got NaN or infinity in")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_is_tuned_from_the_command_line(tmp_path, suffix):
    path = tmp_path / f"users{suffix}"
    table = frame().drop(columns="price")
    table.to_csv(path, index=False) if suffix == ".csv" else table.to_parquet(path)
    arguments = ["--tuner", "random", "--max-rounds", "3", "--total-rounds", "6", "--executor", "serial"]
    options = ["data.client=user", "data.label=likes", "cohort_size=3"]
    arguments += [part for option in options for part in ("--set", option)]
    done = CliRunner().invoke(
        app, ["tune", str(path), "--model", "logistic", *arguments, "--out", str(tmp_path / "run")]
    )
    assert done.exit_code == 0, done.output
    assert fedtune.read_run(tmp_path / "run").results["test_error"].between(0, 1).all()


def test_a_regression_is_learned(tmp_path):
    path = tmp_path / "prices.csv"
    frame().drop(columns="likes").to_csv(path, index=False)
    data = {"client": "user", "label": "price", "objective": "regression"}
    run = fedtune.train(
        path,
        rounds=30,
        data=data,
        model={"name": "mlp", "hidden": [16]},
        cohort_size=3,
        executor="serial",
        out=tmp_path / "run",
    )
    assert run.results["test_error"].item() < 0.2  # 1 is what the mean alone leaves unexplained


def test_a_broken_file_is_one_line(tmp_path):
    path = tmp_path / "bad.parquet"
    path.write_text("no")
    with pytest.raises(InputError, match=r"the table .*bad\.parquet can't be read: "):
        fedtune.load(str(path), client="a", label="b")
    with pytest.raises(InputError, match=r"none\.csv does not exist"):
        fedtune.load(str(tmp_path / "none.csv"), client="a", label="b")
    with pytest.raises(InputError, match=r"the setting data\.client is missing"):
        fedtune.load(str(path), label="b")
    with pytest.raises(InputError, match=r"data\.features must be a list, got 'size'"):
        fedtune.load(str(path), client="a", label="b", features="size")


def test_a_hole_does_not_spread_to_other_clients():
    table = frame()
    table.loc[table.user == "u3", "size"] = np.inf
    dataset = from_frame(table, client="user", label="likes", features=["size", "age"])
    (problem,) = dataset.check()
    assert problem.startswith("client 'u3': x must be finite, got NaN or infinity in")
    sizes = table["size"][table.user != "u3"].to_numpy(np.float32).astype(float)
    x = np.concatenate([client_rows(dataset, number) for number in range(6) if number != 3])[:, 0]
    np.testing.assert_allclose(np.sort(x), np.sort((sizes - sizes.mean()) / sizes.std()), rtol=1e-4)


def test_a_frame_is_left_as_it_is():
    table = frame().astype({"size": np.float32, "age": np.float32})
    before = table.copy(deep=True)
    from_frame(table, client="user", label="likes", features=["size", "age"])
    pd.testing.assert_frame_equal(table, before)


def test_everything_that_is_wrong_in_a_table_is_said_at_once(tmp_path):
    table = frame().astype({"size": object}).drop(columns="price")
    table.loc[1, "size"], table.loc[2, "user"], table.loc[[4, 9], "likes"] = "12 cm", None, None
    table["day"] = "2024-05-01"
    table.to_csv(tmp_path / "users.csv", index=False)
    options = ["--set", "data.client=user", "--set", "data.label=likes"]
    done = CliRunner().invoke(app, ["data", "check", str(tmp_path / "users.csv"), *options])
    assert done.exit_code == 2
    for said in (
        "error: features must be numbers, got column 'size' of type ",
        "such as '12 cm'; name the columns to use in features",
        "error: features must be numbers, got column 'day' of type ",
        "such as '2024-05-01'; name",
        "error: column 'user' must have a value in every row, got none in 1 of 120, first in row 3",
        "error: column 'likes' must have a value in every row, got none in 2 of 120, first in row 5",
        "4 errors, 0 warnings",
    ):
        assert said in done.output, done.output


def test_a_table_with_no_rows_is_said_to_have_none():
    with pytest.raises(InputError, match="a table must have at least one row, got none"):
        from_frame(frame()[:0], client="user", label="likes", features=["size"])


def pairs():
    draws = np.random.default_rng(1)
    return {name: (draws.integers(0, 255, (20, 4, 5)).astype(np.uint8), draws.integers(0, 2, 20)) for name in "ab"}


def same(dataset, expected):
    assert dataset.client_ids == expected.client_ids
    assert np.array_equal(dataset.x, expected.x)
    assert np.array_equal(dataset.y, expected.y)
    assert np.array_equal(dataset.ranges, expected.ranges)


def test_every_form_gives_the_same_data_set(tmp_path):
    expected = from_clients(pairs(), name="own")
    tensors = {name: (torch.from_numpy(x), torch.from_numpy(y)) for name, (x, y) in pairs().items()}
    same(from_clients(tensors, name="own"), expected)
    same(from_torch({n: TensorDataset(*pair) for n, pair in tensors.items()}, name="own"), expected)
    (tmp_path / "npz").mkdir()
    for name, (x, y) in pairs().items():
        np.savez(tmp_path / "npz" / f"{name}.npz", x=x, y=y)
        for number, (image, label) in enumerate(zip(x, y, strict=True)):
            folder = tmp_path / "images" / name / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:02}.png")
    same(from_folder(tmp_path / "npz"), expected)
    same(fedtune.load(str(tmp_path / "npz")), expected)
    images = from_folder(tmp_path / "images")
    assert images.spec.scale == 1 / 255
    assert sorted(map(bytes, images.x)) == sorted(map(bytes, expected.x))  # in another order: class by class
    rows = [(name, x, y) for name, (xs, ys) in pairs().items() for x, y in zip(xs, ys, strict=True)]
    hub = datasets.Dataset.from_dict(
        {"writer": [row[0] for row in rows], "image": [row[1] for row in rows], "label": [row[2] for row in rows]}
    )
    dealt = from_hub(hub, NaturalIdPartitioner("writer"), name="own")
    same(dealt, expected)


def test_a_folder_of_tables(tmp_path):
    table = frame().drop(columns="price")
    for user, rows in table.groupby("user"):
        rows.drop(columns="user").to_csv(tmp_path / f"{user}.csv", index=False)
    same(
        from_folder(tmp_path, label="likes"),
        from_frame(table.sort_values("user", kind="stable"), client="user", label="likes"),
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "a folder of clients must hold only .npz files, .* got nothing in"),
        ({"a.txt": b""}, "got a.txt in"),
        ({"a.npz": b"no"}, r"a\.npz can't be read as arrays"),
        ({"a/cat/1.png": b"no"}, r"the image .*1\.png can't be read"),
        ({"a/1.png": b"no"}, "must hold a folder of images a class, got none in"),
        ({"x.npy": b"", "y.npy": b"", "sizes.npy": b""}, r"x\.npy can't be read as an array"),
    ],
)
def test_a_bad_folder_is_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        from_folder(tmp_path)


def mapped_pages(path):
    """How many bytes of a mapped file this process holds in memory."""
    held, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            held += 1024 * int(line.split()[1])
    return held


def test_a_hundred_thousand_clients_in_a_mapped_file(tmp_path):
    """Loading and a few rounds touch the cohorts' pages, not the file."""
    sizes = np.full(100_000, 10)
    draws = np.random.default_rng(0)
    y = draws.integers(0, 4, sizes.sum())
    x = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(len(y), 64))  # 256 MB
    for start in range(0, len(y), 100_000):
        block = y[start : start + 100_000]
        x[start : start + 100_000] = np.eye(4, 64, dtype=np.float32)[block] + draws.normal(0, 0.3, (len(block), 64))
    x.flush()
    del x
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "sizes.npy", sizes)
    dataset = fedtune.load(str(tmp_path))
    assert dataset.num_clients == 100_000
    assert mapped_pages(tmp_path / "x.npy") < 2**20
    run = fedtune.train(
        tmp_path, rounds=30, model={"name": "logistic"}, evaluation={"clients": 50}, workers=2, out=tmp_path / "run"
    )
    assert run.results["test_error"].item() < 0.5
    serial = fedtune.train(
        tmp_path,
        rounds=30,
        model={"name": "logistic"},
        evaluation={"clients": 50},
        executor="serial",
        out=tmp_path / "serial",
    )
    assert serial.results["test_error"].item() == run.results["test_error"].item()


MAKE = """
import numpy as np
from fedtune.data import from_clients

def make(*, kind):
    x = np.arange(40.0).reshape(20, 2)
    clients = {"a": (x, np.arange(20) % 2), "b": (x + 100, np.arange(20) % 2)}
    if kind == "hole":
        clients["a"][0][:] = np.nan
    if kind == "label":
        clients["b"] = (x + 100, np.full(20, -1))
    if kind == "empty":
        clients["b"] = ([], [])
    if kind == "shape":
        clients["b"] = (x[:, :1], np.arange(20.0))
    if kind == "twice":
        clients[1] = clients["1"] = (x + 300, np.arange(20) % 2)
    if kind == "repeats":
        clients["b"] = (np.ones((20, 2)), np.zeros(20, int))
    return from_clients(clients, name="made", num_classes=2)
"""


@pytest.mark.parametrize(
    ("kind", "exit_code", "lines"),
    [
        ("sound", 0, ["0 errors, 0 warnings"]),
        ("hole", 2, ["error: client 'a': x must be finite, got NaN or infinity in 20 of its examples"]),
        ("label", 2, ["error: client 'b': labels must be in 0..1, got 20 others, such as -1"]),
        ("empty", 2, ["error: client 'b': a client must have at least 1 example, got none"]),
        (
            "shape",
            2,
            [
                "error: client 'b': an example must have shape (2,) and dtype float64, as client 'a' has, got (1,) and "
                "float64",
                "error: client 'b': labels must be whole numbers, got dtype float64",
            ],
        ),
        ("twice", 2, ["error: client id '1' must be unique, got it 2 times"]),
        ("repeats", 1, ["warning: client 'b': 2 of its 2 test examples also stand in its train part"]),
    ],
)
def test_the_check_reports_on_the_command_line(tmp_path, kind, exit_code, lines):
    (tmp_path / "my_data.py").write_text(MAKE)
    done = CliRunner().invoke(app, ["data", "check", f"{tmp_path / 'my_data.py'}:make", "--set", f"data.kind={kind}"])
    assert done.exit_code == exit_code, done.output
    printed = done.output.splitlines()
    assert [line for line in lines if line not in printed] == [], done.output
    if exit_code == 2:  # and a simulation is refused
        with pytest.raises(InputError, match="must"):
            fedtune.train(f"{tmp_path / 'my_data.py'}:make", rounds=1, data={"kind": kind}, cohort_size=1)


def test_a_warning_is_shown_and_does_not_stop_a_run(tmp_path):
    (tmp_path / "my_data.py").write_text(MAKE)
    what, options = f"{tmp_path / 'my_data.py'}:make", ["--set", "data.kind=repeats", "--set", "cohort_size=1"]
    options += ["--rounds", "1", "--executor", "serial", "--model", "logistic", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["train", what, *options])
    assert done.exit_code == 0, done.output
    assert done.stderr.count("\nwarning: ") + done.stderr.startswith("warning: ") == 1
    assert "client 'b': 2 of its 2 test examples also stand in its train part" in done.stderr


def test_a_regression_has_statistics_and_a_picture(tmp_path):
    frame().drop(columns="likes").to_csv(tmp_path / "prices.csv", index=False)
    options = ["data.client=user", "data.label=price", "data.objective=regression"]
    arguments = [part for option in options for part in ("--set", option)]
    figure = tmp_path / "stats.png"
    done = CliRunner().invoke(app, ["data", "stats", str(tmp_path / "prices.csv"), *arguments, "--figure", str(figure)])
    assert done.exit_code == 0, done.output
    assert "label skew" not in done.output
    with Image.open(figure) as image:
        assert image.size[0] > 500


def test_a_folder_without_its_slash_is_hinted_at(tmp_path, monkeypatch):
    (tmp_path / "pics").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="data set 'pics' must be an installed one; for the folder write 'pics/'"):
        fedtune.load("pics")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("nn.Linear(64, 2)", r"does not fit data set 'digits': it must return logits of shape \(2, 10\), got \(2, 2\)"),
        ("nn.Linear(64, 11)", r"it must return logits of shape \(2, 10\), got \(2, 11\)"),
        ("Named()", r"does not fit data set 'digits': it must return a tensor, got dict"),
        ("nn.Linear(3, 10)", r"can't take an example of data set 'digits': RuntimeError: mat1 and mat2 shapes"),
    ],
)
def test_a_model_that_does_not_fit_is_found_before_the_run(tmp_path, body, message):
    model = tmp_path / "model.py"
    model.write_text(
        "from torch import nn\n"
        "class Named(nn.Linear):\n"
        "    def __init__(self): super().__init__(64, 10)\n"
        "    def forward(self, x): return {'logits': super().forward(x)}\n"
        f"def make(spec):\n    return nn.Sequential(nn.Flatten(), {body})\n"
    )
    with pytest.raises(InputError, match=message):
        fedtune.train("digits", rounds=1, model={"name": f"{model}:make"}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
