"""Files that are damaged, or made to do harm: one line each."""

import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import fedtune
from fedtune.data import find_problems, reading
from fedtune.data.formats.tables import read_columns
from fedtune.errors import InputError
from fedtune.settings_text import read_settings

TABLE = {"client": "user", "label": "likes"}


def one_line(match, *arguments, **options):
    """Loads a data set, which must fail in one line."""
    with pytest.raises(InputError, match=match) as caught:
        fedtune.load(*map(str, arguments), **options).stats()
    assert "\n" not in str(caught.value)


def npy(shape, dtype="<f8", content=b""):
    """An array file whose header claims a shape."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def write_npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


LABELS = npy("(3,)", "<i8", bytes(24))


@pytest.mark.parametrize(
    "shape", ["(10000000000000,)", "(1000000000, 1000000000)", "(99999999999999999999999,)", "(-1,)"]
)
def test_a_header_that_claims_a_huge_array(tmp_path, shape):
    folder = tmp_path / "npz"
    folder.mkdir()
    write_npz(folder / "a.npz", x=npy(shape), y=LABELS)
    one_line(r"a\.npz can't be read as arrays: ", f"{folder}/")
    for name, content in (
        ("x.npy", npy(shape)),
        ("y.npy", LABELS),
        ("sizes.npy", npy("(1,)", "<i8", b"\3" + bytes(7))),
    ):
        (tmp_path / name).write_bytes(content)
    folder.rename(tmp_path / ".npz")
    one_line(r"x\.npy can't be read as an array: ", f"{tmp_path}/")


def test_arrays_that_unpack_to_more_than_the_memory(tmp_path, monkeypatch):
    write_npz(tmp_path / "a.npz", x=npy("(1000, 1000)", "<f8", bytes(8_000_000)), y=LABELS)
    monkeypatch.setattr(os, "sysconf", lambda name: 2_000)  # 2,000 pages of 2,000 bytes
    one_line(r"the arrays in .* must fit into memory, 0\.0 GB, got 0\.0 GB", f"{tmp_path}/")


def test_a_parquet_file_that_unpacks_to_more_than_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "users.parquet"
    pd.DataFrame({"user": ["a"] * 300_000, "likes": 1, "size": 0.5}).to_parquet(path)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(os, "sysconf", lambda name: 2_000)
    one_line(r"the table .* must fit into memory", path, **TABLE)


class Pickled:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_pickled_objects_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", x=np.array([Pickled()] * 3), y=np.arange(3))
    one_line(r"a\.npz can't be read as arrays: Object arrays cannot be loaded", f"{tmp_path}/")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "array", [np.array(["a"] * 9), np.zeros(9, complex), np.zeros(9, "M8[s]"), np.zeros(9, [("a", "f4")])]
)
def test_arrays_that_hold_no_numbers(tmp_path, array):
    np.savez(tmp_path / "a.npz", x=array, y=np.arange(9) % 2)
    one_line(r"x must hold real inputs, got dtype ", f"{tmp_path}/")


def test_numbers_in_another_machines_order_of_bytes(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    folders = {}
    for order in "<>":
        folders[order] = tmp_path / f"order{ord(order)}"
        folders[order].mkdir()
        np.savez(folders[order] / "a.npz", x=x.astype(f"{order}f8"), y=y.astype(f"{order}i8"))
    little, big = (fedtune.load(f"{folder}/") for folder in folders.values())
    assert little.x.dtype == big.x.dtype
    assert little.x.tobytes() == big.x.tobytes()
    assert little.y.tobytes() == big.y.tobytes()


def test_sizes_that_overflow_to_the_right_sum(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 2)))
    np.save(tmp_path / "y.npy", np.zeros(4, np.int64))
    np.save(tmp_path / "sizes.npy", np.array([2**63 - 1, 2**63 - 1, 6]))
    one_line("sizes must be a number >= 0 a client, 4 in all", f"{tmp_path}/")


def png(width, height):
    """A tiny picture that claims to be a large one."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 30_000, 2**31 - 1])
def test_a_picture_that_claims_to_be_huge(tmp_path, side):
    (tmp_path / "a" / "cat").mkdir(parents=True)
    (tmp_path / "a" / "cat" / "1.png").write_bytes(png(side, side))
    one_line(r"the image .*1\.png can't be read: ", f"{tmp_path}/")


def test_pictures_that_are_more_than_the_memory_together(tmp_path, monkeypatch):
    (tmp_path / "a" / "cat").mkdir(parents=True)
    for number in range(5):
        Image.new("L", (1000, 1000)).save(tmp_path / "a" / "cat" / f"{number}.png")
    monkeypatch.setattr(os, "sysconf", lambda name: 2_000)
    one_line("the images in .* must fit into memory", f"{tmp_path}/")


def test_a_picture_that_is_a_program(tmp_path):
    """Pillow hands PostScript to another program."""
    (tmp_path / "a" / "cat").mkdir(parents=True)
    (tmp_path / "a" / "cat" / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    one_line(r"the image .*1\.png can't be read: cannot identify", f"{tmp_path}/")


def leaf(folder, text):
    (folder / "all_data").mkdir(parents=True)
    (folder / "all_data" / "all.json").write_text(text)
    return f"{folder}/"


LEAF = json.dumps({"users": ["a"], "num_samples": [20], "user_data": {"a": {"x": [[0.5]] * 20, "y": [0, 1] * 10}}})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.5", "9" * 5000),
        ("[0.5]", "[" * 100_000),
        ("20]", "9" * 5000 + "]"),
        ('"a"]', '"a", {"b": NaN}]'),
        ("[0.5]", "[]"),
    ],
)
def test_json_that_is_no_data_set(tmp_path, old, new):
    one_line(r"all\.json|must", leaf(tmp_path / "leaf", LEAF.replace(old, new)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spec", []),
        ("spec", {}),
        ("client_ids", 3),
        ("client_ids", [["a"]]),
        ("name", []),
        ("x_dtype", "O"),
        ("x_dtype", "V9999999999"),
        ("input_shape", [-1]),
        ("input_shape", [10**15]),
        ("input_shape", ["a"]),
        ("target_mean", "a"),
        ("scale", "1"),
        ("num_classes", 1.5),
    ],
)
def test_what_fedtune_says_of_its_own_export_is_not_believed(tmp_path, name, value):
    from fedtune.data.formats.leaf_export import export_leaf

    export_leaf(fedtune.load("digits", num_clients=3), tmp_path / "leaf")
    file = tmp_path / "leaf" / "fedtune.json"
    extra = json.loads(file.read_text())
    (extra["spec"] if name in extra["spec"] else extra)[name] = value
    file.write_text(json.dumps(extra))
    one_line("must|can't", f"{tmp_path / 'leaf'}/")


@pytest.mark.parametrize("name", ["users.csv", "users.parquet", "users.arrow"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "nothing"])
def test_something_else_in_a_files_place(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    one_line("it must be a file, got |does not exist", path, **TABLE)


@pytest.mark.parametrize("name", ["a.npz", "x.npy", "a.csv", "a/cat/1.png", "all_data/all.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_something_else_in_the_place_of_a_file_of_a_folder(tmp_path, name, kind):
    if name == "x.npy":
        for other in ("y.npy", "sizes.npy"):
            np.save(tmp_path / other, np.arange(3))
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "inside").touch()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    one_line("must", f"{tmp_path}/")


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "users.csv"
    path.write_text("user,likes\n")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pd, "read_csv", refuse)
    one_line(r"the table .*users\.csv can't be read: \[Errno 13\] Permission denied", path, **TABLE)


def test_names_in_a_table_that_lie_outside_it(tmp_path):
    """Arrow would read them wherever they say they are."""
    path = tmp_path / "users.arrow"
    names = pd.DataFrame({"user": [f"user{number}" for number in range(64)], "likes": 1, "size": 0.5})
    names.to_feather(path, compression="uncompressed")
    content = path.read_bytes()
    offsets = np.cumsum([0, *map(len, names["user"])]).astype(np.int32)
    wide = offsets.astype(np.int64)
    for before in (offsets.tobytes(), wide.tobytes()):
        if before in content:
            after = np.frombuffer(before, offsets.dtype if len(before) == offsets.nbytes else wide.dtype).copy()
            after[5:9] = 2**30
            path.write_bytes(content.replace(before, after.tobytes()))
            break
    else:
        raise AssertionError("the offsets are not in the file")
    one_line("can't be read", path, **TABLE)
    one_line("can't be read", path, mapped=True, **TABLE)


@pytest.mark.parametrize(
    "text", ["a = " + "9" * 5000, "a = 0x" + "f" * 5000, "a = " + "[" * 10_000, "seed = 18446744073709551616", "\0\0\0"]
)
def test_settings_that_no_reader_takes(tmp_path, text):
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(InputError, match=r"^settings file [^\n]*settings\.toml [^\n]*$"):
        read_settings(tmp_path / "settings.toml")


def test_settings_that_are_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "settings.toml")
    with pytest.raises(InputError, match=r"settings\.toml cannot be read: it is no file"):
        read_settings(tmp_path / "settings.toml")


def test_an_error_without_a_message_has_its_kinds_name(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(InputError, match=r"^it can't be read: MemoryError$"), reading.reading(path, "it can't be read"):
        raise MemoryError
    with pytest.raises(InputError, match=r"^mine$"), reading.reading(path, "it can't be read"):
        raise InputError("mine")


def test_a_label_that_makes_too_many_classes(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(20, 2)), y=np.arange(20) + 2**62)
    one_line("the counts of .* labels of each client must fit into memory", f"{tmp_path}/")


def test_clients_without_names_that_share_an_example(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((40, 2)))
    np.save(tmp_path / "y.npy", np.zeros(40, np.int64))
    np.save(tmp_path / "sizes.npy", np.array([20, 20]))
    problems = find_problems(fedtune.load(f"{tmp_path}/"))
    assert any("test examples also stand in another client's train part" in problem.message for problem in problems)


def test_texts_of_results_that_are_no_texts(tmp_path):
    path = tmp_path / "trials.parquet"
    buffers = [None, pa.py_buffer(np.array([0, 6], np.int32)), pa.py_buffer(b"asha\xff\xe4")]
    parquet.write_table(pa.table({"tuner": pa.Array.from_buffers(pa.string(), 1, buffers)}), path)
    with pytest.raises(InputError, match=r"^[^\n]*trials\.parquet can't be read: [^\n]*$"):
        read_columns(path, texts=["tuner"])
