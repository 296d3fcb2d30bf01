import functools
import http.server
import json
import re
import shutil
import string
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
from fedtune.data.parts import PARTS
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError, UnknownNameError
from fedtune.testing import check_dataset
from fedtune_datasets import femnist, mnist

SIZES = {"f0000_14": 40, "f0001_41": 25, "f0002_07": 12, "f3999_02": 33}
FEATURES = datasets.Features(
    image=datasets.Image(),
    writer_id=datasets.Value("string"),
    hsf_id=datasets.Value("int64"),
    character=datasets.ClassLabel(names=[*string.digits, *string.ascii_uppercase, *string.ascii_lowercase]),
)


def handwriting(sizes=SIZES):
    """{writer: (images, labels)}: white paper with a few marks, in which every image is another one."""
    draws = np.random.default_rng(0)
    writers = {}
    for writer, size in sizes.items():
        x = np.full((size, 28, 28), 255, np.uint8)
        x[:, 8:20, 8:20] = draws.integers(0, 256, (size, 12, 12))
        writers[writer] = (x, draws.integers(0, 62, size))
    return writers


def write_leaf(folder, **parts):
    """LEAF's files, two users in each: `all_data={writer: (x, y)}`."""
    for part, writers in parts.items():
        (folder / part).mkdir(parents=True)
        names = list(writers)
        for number, users in enumerate([names[:2], names[2:]]):
            data = {
                user: {"x": (x.reshape(len(x), -1) / 255).tolist(), "y": y.tolist()}
                for user, (x, y) in writers.items()
                if user in users
            }
            content = {"users": users, "num_samples": [len(writers[user][1]) for user in users], "user_data": data}
            (folder / part / f"{part}_{number}_niid_0_keep_10.json").write_text(json.dumps(content))
    return str(folder)


def hub(writers):
    """The data set in the form of the hub's, the writers mixed."""
    rows = [(writer, image, label) for writer, (x, y) in writers.items() for image, label in zip(x, y, strict=True)]
    mixed = [rows[row] for row in np.random.default_rng(1).permutation(len(rows))]
    # A writer's images stay in their order.
    queues = {writer: iter(zip(x, y, strict=True)) for writer, (x, y) in writers.items()}
    mixed = [(writer, *next(queues[writer])) for writer, _, _ in mixed]
    columns = {
        "image": [Image.fromarray(image) for _, image, _ in mixed],
        "writer_id": [writer for writer, _, _ in mixed],
        "hsf_id": [0] * len(mixed),
        "character": [int(label) for _, _, label in mixed],
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


@pytest.fixture
def leaf(tmp_path):
    return write_leaf(tmp_path / "leaf", all_data=handwriting())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(femnist, "_ask_hub", lambda: hub(handwriting()))
    return tmp_path / "cache" / "femnist"


def held(dataset, client):
    """A client's examples of all parts as (pixels, label), sorted."""
    parts = [dataset.examples(client, part) for part in PARTS]
    return sorted((image.tobytes(), int(label)) for x, y in parts for image, label in zip(x, y, strict=True))


def assert_equal(one, other):
    assert (one.name, one.spec, one.client_ids) == (other.name, other.spec, other.client_ids)
    assert one.x.dtype == other.x.dtype == np.uint8
    assert one.x.tobytes() == other.x.tobytes()
    assert one.y.tolist() == other.y.tolist()
    assert one.ranges.tolist() == other.ranges.tolist()


def test_a_client_is_a_writer_with_black_on_white_images(leaf):
    dataset = femnist.load(folder=leaf)
    assert dataset.spec == DatasetSpec((28, 28), "real", 62, 1 / 255)
    assert dataset.client_ids == list(SIZES)
    for client, (x, y) in enumerate(handwriting().values()):
        assert held(dataset, client) == sorted((image.tobytes(), int(label)) for image, label in zip(x, y, strict=True))
    assert (dataset.x[:, 0, 0] * dataset.spec.scale == 1).all()  # the paper
    check_dataset(femnist.load, folder=leaf)


@pytest.mark.parametrize("options", [{}, {"classes": "digits", "seed": 3}, {"fraction": 0.6, "max_samples": 11}])
def test_the_hub_and_leafs_files_give_the_same_to_the_bit(leaf, cache, options):
    assert_equal(femnist.load(**options), femnist.load(folder=leaf, **options))


def test_leafs_own_split_and_the_order_of_its_writers_do_not_matter(leaf, tmp_path):
    writers = dict(reversed(handwriting().items()))
    train = {writer: (x[:9], y[:9]) for writer, (x, y) in writers.items()}
    test = {writer: (x[9:], y[9:]) for writer, (x, y) in writers.items()}
    assert_equal(femnist.load(folder=write_leaf(tmp_path / "split", train=train, test=test)), femnist.load(folder=leaf))


def test_digits_are_the_first_ten_classes(leaf):
    dataset = femnist.load(folder=leaf, classes="digits")
    assert dataset.spec.num_classes == 10
    counts = {writer: int((y < 10).sum()) for writer, (_, y) in handwriting().items()}
    assert dict(zip(dataset.client_ids, dataset.sizes().sum(1).tolist(), strict=True)) == {
        writer: count for writer, count in counts.items() if count >= 3
    }
    assert set(dataset.y.tolist()) <= set(range(10))
    with pytest.raises(UnknownNameError, match="unknown classes 'letters'; known: all, digits"):
        femnist.load(folder=leaf, classes="letters")


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.75])
def test_a_fraction_is_of_the_images_in_whole_writers_but_one(leaf, fraction):
    used = [femnist.load(folder=leaf, fraction=fraction, seed=seed) for seed in range(8)]
    for dataset in used:
        sizes = dict(zip(dataset.client_ids, dataset.sizes().sum(1).tolist(), strict=True))
        cut = [writer for writer, size in sizes.items() if size < SIZES[writer]]
        missing = int(fraction * sum(SIZES.values())) - sum(sizes.values())
        assert len(cut) <= 1
        assert 0 <= missing < 3  # a last writer who would have fewer is left out
    assert len({tuple(dataset.client_ids) for dataset in used}) > 1
    assert_equal(femnist.load(folder=leaf, fraction=fraction, seed=5), used[5])


def test_limits_of_a_writers_images(leaf):
    dataset = femnist.load(folder=leaf, min_samples=20, max_samples=30)
    assert dataset.client_ids == ["f0000_14", "f0001_41", "f3999_02"]
    assert dataset.sizes().sum(1).tolist() == [30, 25, 30]
    other = femnist.load(folder=leaf, min_samples=20, max_samples=30, seed=1)
    assert held(dataset, 0) != held(other, 0)
    assert set(held(dataset, 0)) | set(held(other, 0)) <= set(held(femnist.load(folder=leaf), 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.5}, "fraction must be > 0 and <= 1, got 1.5"),
        ({"min_samples": 2}, "min_samples must be >= 3, got 2"),
        ({"min_samples": 41}, "must leave a writer, got 1.0 and 41; the most that one of 4 then has is 40"),
        ({"fraction": 0.01}, "must leave a writer, got 0.01 and 3; the most that one of 4 then has is 1"),
    ],
)
def test_impossible_options_are_refused(leaf, options, message):
    with pytest.raises(InputError) as caught:
        femnist.load(folder=leaf, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((3, 784), 255), "user 'f1': x must be in 0..1, got 255.0 to 255.0"),
        (np.full((3, 784), np.nan), "user 'f1': x must be in 0..1, got nan to nan"),
        (np.ones((3, 64)), "user 'f1': an example must have shape (28, 28), got (64,)"),
    ],
)
def test_images_that_are_not_leafs_are_refused(tmp_path, x, message):
    folder = write_leaf(tmp_path / "leaf", all_data={"f1": (x * 255.0, np.arange(3))})
    with pytest.raises(InputError) as caught:
        femnist.load(folder=folder)
    assert message in str(caught.value)
    with pytest.raises(InputError, match=r"must hold train/\*.json and test/\*.json, or all_data"):
        femnist.load(folder=str(tmp_path))


def test_a_label_that_is_no_class_is_found(tmp_path):
    x, y = handwriting()["f0002_07"]
    folder = write_leaf(tmp_path / "leaf", all_data={"f1": (x, np.where(y == y[0], 62, 5))})
    for classes, last in (("all", 61), ("digits", 9)):
        (problem,) = femnist.load(folder=folder, classes=classes).check()
        assert problem.startswith(f"client 'f1': labels must be in 0..{last}, got {(y == y[0]).sum()} others")


def test_a_wrong_num_samples_is_told(leaf):
    file = min(Path(leaf).glob("all_data/*.json"))
    file.write_text(file.read_text().replace('"num_samples": [40,', '"num_samples": [39,'))
    (problem,) = femnist.load(folder=leaf).tolerated
    assert problem.message.startswith("client 'f0000_14': num_samples must be 40")


def test_the_hub_is_asked_once(cache, monkeypatch):
    monkeypatch.setattr(femnist, "BATCH", 7)  # the last batch is a smaller one
    first = femnist.load()
    assert femnist.prepare() == cache / "hub-df739a2b09df"
    monkeypatch.setattr(femnist, "_ask_hub", lambda: pytest.fail("asked again"))
    assert_equal(femnist.load(), first)
    assert sorted(file.name for file in cache.iterdir()) == ["hub-df739a2b09df", "hub-df739a2b09df.json"]


def test_a_failure_leaves_nothing(cache, monkeypatch):
    small = {"f1": (np.zeros((3, 8, 8), np.uint8), np.arange(3))}
    monkeypatch.setattr(femnist, "_ask_hub", lambda: hub(small))
    with pytest.raises(
        InputError, match=r"images of flwrlabs/femnist must be 28 x 28 bytes, got uint8 of shape \(8, 8"
    ):
        femnist.prepare()
    monkeypatch.setattr(femnist, "_ask_hub", lambda: hub(handwriting()).remove_columns("writer_id"))
    with pytest.raises(UnknownNameError, match="unknown column of flwrlabs/femnist 'writer_id'; known: character, hsf"):
        femnist.prepare()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["x.npy", "writers.json"])
def test_a_damaged_cache_is_told(cache, name):
    file = femnist.prepare() / name
    file.write_bytes(file.read_bytes()[:-5])
    match = rf"hub-\w+ is damaged: {name} has not the checksum in .*; remove it, then `fedtune data prepare femnist`"
    with pytest.raises(InputError, match=match):
        femnist.load()


def test_a_damaged_byte_is_noticed(cache):
    file = femnist.prepare() / "x.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npy has not the checksum in"):
        femnist.load()


def test_a_second_download_must_be_what_the_first_one_was(cache, monkeypatch):
    first = femnist.load()
    shutil.rmtree(femnist.prepare())
    assert_equal(femnist.load(), first)
    shutil.rmtree(femnist.prepare())
    others = handwriting()
    others["f0002_07"][1][0] ^= 1
    monkeypatch.setattr(femnist, "_ask_hub", lambda: hub(others))
    with pytest.raises(InputError, match=r"flwrlabs/femnist must be what was downloaded first, but y\.npy has not the"):
        femnist.load()
    assert [file.name for file in cache.iterdir()] == ["hub-df739a2b09df.json"]
    (cache / "hub-df739a2b09df.json").unlink()
    femnist.load()


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_damaged_checksums_are_one_line(cache, content):
    femnist.prepare().with_suffix(".json").write_text(content)
    with pytest.raises(InputError, match=r"^[^\n]*hub-\w+\.json must hold the checksums of a download, got [^\n]*$"):
        femnist.load()


def test_the_hub_is_asked_for_one_revision(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda api, name, **options: asked.append(options))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.append(options))
    femnist._ask_hub()
    assert re.fullmatch("[0-9a-f]{40}", femnist.REVISION)
    assert [options["revision"] for options in asked] == [femnist.REVISION] * 2


class Silent(http.server.BaseHTTPRequestHandler):
    """A hub that knows no data set."""

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("answers", [True, False])
def test_without_the_hub_it_says_what_to_do(tmp_path, monkeypatch, answers):
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: pytest.fail("asked"))
    with http.server.HTTPServer(("127.0.0.1", 0), Silent) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        if answers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        with pytest.raises(InputError) as caught:
            femnist.load()
        if answers:
            server.shutdown()
    assert str(caught.value).startswith(f"cannot get flwrlabs/femnist from {address}: ")
    assert ("404" in str(caught.value)) == answers
    assert "fedtune data prepare femnist" in str(caught.value)
    assert "--set data.folder=PATH" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_default_settings_load_and_search_the_spaces_of_mnist(leaf):
    with Path(femnist.__file__).with_name("femnist.toml").open("rb") as file:
        assert tomllib.load(file) == femnist.SETTINGS
    arguments = {key: value for key, value in femnist.SETTINGS["data"].items() if key != "name"}
    assert femnist.load(folder=leaf, **arguments).sizes().sum() == int(0.1 * sum(SIZES.values()))
    assert femnist.SETTINGS["space"] == mnist.SETTINGS["space"]
    assert femnist.SETTINGS["client"] == mnist.SETTINGS["client"]


@functools.cache
def hub_is_reached():
    try:
        femnist.prepare()
    except InputError as error:
        return str(error)
    return None


@pytest.mark.network
def test_the_hubs_data_set():
    if reason := hub_is_reached():
        pytest.skip(reason)
    dataset = femnist.load()
    assert dataset.check() == []
    assert dataset.spec == DatasetSpec((28, 28), "real", 62, 1 / 255)
    # Its card: 814,277 images; Caldas et al. 2018 have 805,263 of 3,550 writers.
    assert dataset.sizes().sum() > 0.99 * 814_277
    assert dataset.num_clients >= 3550
    assert set(dataset.y.tolist()) == set(range(62))
    assert np.median(dataset.x[::100, 0, 0]) == 255  # the paper is white
    x, y = dataset.x[::40].reshape(-1, 784).astype(np.float32), dataset.y[::40]
    digits = y < 10
    means = np.array([x[digits][::2][y[digits][::2] == digit].mean(0) for digit in range(10)])
    distance = (means**2).sum(1) - 2 * x[digits][1::2] @ means.T
    assert (distance.argmin(1) == y[digits][1::2]).mean() > 0.5  # wrong labels give 0.1
