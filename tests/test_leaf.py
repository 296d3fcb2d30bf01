import json

import numpy as np
import pytest
from typer.testing import CliRunner

import fedtune
from fedtune import cli
from fedtune.data import FederatedDataset, from_clients, from_leaf
from fedtune.data.checks import find_problems
from fedtune.data.formats.leaf import is_leaf_folder
from fedtune.data.formats.leaf_export import export_leaf
from fedtune.data.formats.text import UNKNOWN, VOCABULARY, decode_rows, encode_characters
from fedtune.data.parts import PARTS
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError
from fedtune.runs.prepare import prepare


def content(users, /, **changes):
    whole = {"users": list(users), "num_samples": [len(data["y"]) for data in users.values()], "user_data": users}
    return {**whole, **changes}


def write(folder, **files):
    """Files by part: `train=[content, content], test=[...]`."""
    for part, contents in files.items():
        (folder / part).mkdir(parents=True)
        for number, one in enumerate(contents):
            text = one if isinstance(one, str) else json.dumps(one)
            (folder / part / f"part_{number}.json").write_text(text)
    return folder


def numbers(start, count):
    """Examples that are their own numbers, at four places."""
    return {"x": [[float(i), 0.5, 0.25, 0.1] for i in range(start, start + count)], "y": [i % 3 for i in range(count)]}


def windows(text, width=80):
    return {"x": [text[i : i + width] for i in range(len(text) - width)], "y": list(text[width:])}


def two_users():
    return {
        "train": [content({"a": numbers(0, 20)}), content({"b": numbers(100, 10)})],
        "test": [content({"b": numbers(110, 3), "a": numbers(20, 5)})],
    }


def held(dataset, client):
    return [dataset.examples(client, part)[0].reshape(-1, 4)[:, 0].tolist() for part in PARTS]


def assert_equal(one, other):
    assert one.spec == other.spec
    assert one.leaf == other.leaf
    assert list(one.client_ids) == list(other.client_ids)
    assert one.x.dtype == other.x.dtype
    for client in range(one.num_clients):
        for part in PARTS:
            for left, right in zip(one.examples(client, part), other.examples(client, part), strict=True):
                assert left.dtype == right.dtype
                assert left.shape == right.shape
                assert left.tobytes() == right.tobytes()


@pytest.mark.parametrize("inner", [".", "data"])
def test_validation_is_a_tenth_of_the_whole_and_cut_from_train(tmp_path, inner):
    write(tmp_path / inner, **two_users())
    dataset = from_leaf(tmp_path, input_shape=[2, 2])
    assert is_leaf_folder(tmp_path)
    assert dataset.client_ids == ["a", "b"]
    assert dataset.spec == DatasetSpec((2, 2), "real", 3)
    assert dataset.x.dtype == np.float32
    for client, (start, num_train, num_test) in enumerate([(0, 20, 5), (100, 10, 3)]):
        train, validation, test = held(dataset, client)
        assert sorted(train + validation) == list(range(start, start + num_train))
        assert len(validation) == max(1, round((num_train + num_test) / 10))
        assert test == list(range(start + num_train, start + num_train + num_test))
        for part, first in zip(PARTS, (start, start, start + num_train), strict=True):
            x, y = dataset.examples(client, part)
            assert y.tolist() == [(number - first) % 3 for number in x[:, 0, 0].tolist()]
    assert dataset.check() == []
    assert held(from_leaf(tmp_path, seed=1), 0)[1] != held(from_leaf(tmp_path), 0)[1]
    assert_equal(FederatedDataset.from_leaf(tmp_path), from_leaf(tmp_path))


def test_one_folder_is_split_as_other_data_are(tmp_path):
    write(tmp_path, all_data=[content({"a": numbers(0, 30)})])
    train, validation, test = held(from_leaf(tmp_path), 0)
    assert sorted(train + validation + test) == list(range(30))
    assert (len(train), len(validation), len(test)) == (24, 3, 3)


def test_the_validation_windows_share_no_character_with_the_training_labels(tmp_path):
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcdefgh .,"), 400))
    write(tmp_path, train=[content({"a": windows(text)})], test=[content({"a": windows(text[::-1][:100])})])
    dataset = from_leaf(tmp_path)
    assert dataset.spec == DatasetSpec((80,), "token", 81)
    x, y = dataset.examples(0, "validation")
    assert len(y) == round((320 + 20) / 10)
    whole = encode_characters(text)
    assert y.tolist() == whole[-len(y) :].tolist()
    first_position = 400 - len(y) - 80
    assert x[0].tolist() == whole[first_position : first_position + 80].tolist()
    num_train = dataset.num_examples("train")[0]
    assert num_train + 80 == first_position  # so the last training label stands right before


def test_one_folder_of_text_leaves_a_gap_at_both_cuts(tmp_path):
    text = "".join(np.random.default_rng(0).choice(list("abcdefgh .,"), 500))
    write(tmp_path, all_data=[content({"a": windows(text)})])
    dataset = from_leaf(tmp_path)
    whole = encode_characters(text).tolist()
    labels = [dataset.examples(0, part)[1].tolist() for part in PARTS]
    assert [len(part) for part in labels] == [208, 26, 26]  # of 420 - 2 * 80 windows
    assert labels == [whole[80:288], whole[368:394], whole[474:500]]


def test_users_without_all_parts_are_left_out_and_told(tmp_path):
    write(
        tmp_path,
        train=[content({"both": numbers(0, 9), "train only": numbers(9, 5), "small": numbers(0, 1)})],
        test=[content({"test only": numbers(20, 5), "both": numbers(30, 2), "small": numbers(0, 1)})],
    )
    dataset = from_leaf(tmp_path)
    assert dataset.client_ids == ["both"]
    assert [(problem.client, problem.severity) for problem in dataset.tolerated] == [
        ("train only", "warning"),
        ("small", "warning"),
        ("test only", "warning"),
    ]
    assert "none in test" in dataset.tolerated[0].message
    assert find_problems(dataset)[:3] == dataset.tolerated
    assert dataset.check() == []


def test_a_split_by_user_is_refused(tmp_path):
    write(tmp_path, train=[content({"a": numbers(0, 9)})], test=[content({"b": numbers(9, 5)})])
    with pytest.raises(InputError, match=r"none of the .* users has"):
        from_leaf(tmp_path)


def test_a_wrong_num_samples_is_tolerated_and_told(tmp_path):
    files = two_users()
    files["test"][0]["num_samples"] = [3, 99]
    dataset = from_leaf(write(tmp_path, **files))
    assert dataset.num_clients == 2
    message = f"client 'a': num_samples must be 5, the number of its examples in {tmp_path}/test/part_0.json, got 99"
    assert [problem.message for problem in dataset.tolerated] == [message]
    done = CliRunner().invoke(cli.app, ["data", "check", str(tmp_path)])
    assert done.output.splitlines() == [f"warning: {message}", "0 errors, 1 warnings"]
    assert done.exit_code == 1
    settings = fedtune.resolve_settings(f"{tmp_path}/", {"model": {"name": "logistic"}, "cohort_size": 2})
    assert prepare(settings).warning == message  # what a run says before it begins


@pytest.mark.parametrize("part", ["train", "all_data"])
def test_what_users_belong_to_is_kept(tmp_path, part):
    users = {"HAMLET_OPHELIA": numbers(0, 12), "brief": numbers(0, 1), "LEAR_FOOL": numbers(20, 15)}
    plays = ["HAMLET", None, {"play": "LEAR", "acts": [1, 2.5]}]
    files = {part: [content(users, hierarchies=plays)]}
    if part == "train":
        test = {"LEAR_FOOL": numbers(50, 5), "HAMLET_OPHELIA": numbers(60, 4)}
        files["test"] = [content(test, hierarchies=[plays[2], plays[0]])]
    dataset = from_leaf(write(tmp_path, **files))
    assert dataset.client_ids == ["HAMLET_OPHELIA", "LEAR_FOOL"]
    assert dataset.leaf.hierarchies == [plays[0], plays[2]]
    export_leaf(dataset, tmp_path / "out", users_per_file=1)
    for each in PARTS:
        written = json.loads((tmp_path / "out" / each / "000001.json").read_text())
        assert (written["users"], written["hierarchies"]) == (["LEAR_FOOL"], [plays[2]])
    assert_equal(from_leaf(tmp_path / "out"), dataset)


@pytest.mark.parametrize(("hierarchies", "got"), [(["X", "Y", "Z"], "3"), ("X", "'X'")])
def test_hierarchies_that_fit_no_user_are_left_out_and_told(tmp_path, hierarchies, got):
    dataset = from_leaf(write(tmp_path, all_data=[content({"a": numbers(0, 12)}, hierarchies=hierarchies)]))
    assert dataset.leaf.hierarchies is None
    (problem,) = dataset.tolerated
    assert problem.message.endswith(f"hierarchies must be a list of one for each of 1 users, got {got}: left out")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{", "part_0.json must be JSON in LEAF's form: "),
        ('{"users": []} x', "Extra data"),
        ("[1]", "must be JSON in LEAF's form: Expecting '{'"),
        (content({"a": numbers(0, 9)}, users=["a", "c"], num_samples=[9, 1]), "user 'c' must be in user_data"),
        (content({"a": numbers(0, 9), "c": numbers(0, 3)}, users=["a"], num_samples=[9]), "user 'c' must be in users"),
        ({"users": ["a"], "user_data": {"a": numbers(0, 9)}}, "got no num_samples"),
        (content({"a": numbers(0, 9)}, num_samples=[]), "users and num_samples must be of one length, got 1, 0"),
        (content({"a": {"x": [[1.0]] * 3, "y": [0, 1]}}), "user 'a': x and y must be of one length, got 3 and 2"),
        (content({"a": {"x": [], "y": []}}), "user 'a' must have at least 1 example, got none"),
        (content({"a": {"y": [1]}}), "user 'a' must have lists x and y"),
        (content({"a": numbers(0, 9), "b": numbers(0, 9)}), "user 'b' must be unique, got it also in "),
        (content({"a": {"x": [[1.0], [1.0, 2.0]], "y": [0, 1]}}), "user 'a': x must hold examples of one shape"),
        (content({"a": {"x": [["id", "a tweet"]], "y": [0]}}), "user 'a': x must hold numbers, or strings of one"),
        (content({"a": {"x": ["abc", "ab"], "y": ["a", "b"]}}), "user 'a': x must hold strings of 3 characters"),
        (content({"a": {"x": ["abc"], "y": ["ab"]}}), "user 'a': y must hold strings of 1 character"),
        (content({"a": {"x": [[1.0]], "y": [0.5]}}), "user 'a': labels must be whole numbers, got 0.5"),
        (content({"a": {"x": [[1.0]], "y": [[0, 1]]}}), "the labels of an example must have shape (), got (2,)"),
        (content({"a": numbers(0, 9)}, users=[["a"]]), "users must be strings, got ['a']"),
    ],
)
def test_damage_is_one_line_that_names_file_and_user(tmp_path, train, message):
    files = {"train": [train, two_users()["train"][1]], "test": two_users()["test"]}
    with pytest.raises(InputError) as caught:
        from_leaf(write(tmp_path, **files))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_the_layout_is_refused(tmp_path):
    assert not is_leaf_folder(tmp_path / "missing")
    with pytest.raises(InputError, match=r"must hold train/\*.json and test/\*.json, or all_data"):
        from_leaf(tmp_path)


def made(dtype=np.uint8, kind="real", shape=(2, 3)):
    rng = np.random.default_rng(0)
    clients = {
        name: ((rng.random((n, *shape)) * 200).astype(dtype), rng.integers(0, 7, n))
        for name, n in [("z", 12), ("é", 30), ("a", 3)]
    }
    return from_clients(clients, name="made", num_classes=9, scale=1 / 3, input_kind=kind)


def labelled(objective, labels):
    """Clients with labels of a form of their own."""
    rng = np.random.default_rng(0)
    clients = {name: (rng.integers(0, 9, (n, 4)), labels(rng, n)) for name, n in [("a", 12), ("b", 5), ("c", 3)]}
    return from_clients(clients, name="made", objective=objective, input_kind="token")


def next_tokens(rng, n):
    return np.where(rng.random((n, 4)) < 0.3, -100, rng.integers(0, 9, (n, 4)))


@pytest.mark.parametrize(
    "dataset",
    [
        made(),
        made(np.float32),
        made(np.float64),
        made(np.int16, "token", (5,)),
        made(np.float32, shape=()),
        labelled("regression", lambda rng, n: rng.normal(3, 2, n)),
        labelled("regression", lambda rng, n: rng.normal(3, 2, (n, 2, 3))),
        labelled("next_token", next_tokens),
    ],
    ids=["bytes", "singles", "doubles", "tokens", "numbers", "targets", "tables of targets", "next tokens"],
)
def test_what_is_written_is_read_again_to_the_bit(tmp_path, dataset):
    export_leaf(dataset, tmp_path / "out", users_per_file=2)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["fedtune.json", "test", "train", "validation"]
    assert len(list((tmp_path / "out" / "train").iterdir())) == 2
    again = from_leaf(tmp_path / "out")
    assert again.tolerated == []
    assert again.name == "made"
    assert_equal(again, dataset)


def text(**options):
    tokens = np.random.default_rng(0).integers(0, UNKNOWN + 1, 300).astype(np.uint8)
    ranges = np.array([[[0, 50], [130, 140], [200, 220]]])
    return FederatedDataset.from_text(tokens, ["A_B"], ranges, name="text", window=80, num_classes=81, **options)


def test_text_is_written_as_strings_and_read_again(tmp_path):
    dataset = text(characters=True)
    export_leaf(dataset, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "test" / "000000.json").read_text())
    assert written["num_samples"] == [20]
    assert [len(x) for x in written["user_data"]["A_B"]["x"]] == [80] * 20
    assert written["user_data"]["A_B"]["y"][0] == decode_rows(dataset.text[280:281][None])[0]
    again = from_leaf(tmp_path / "out")
    assert_equal(again, dataset)
    export_leaf(again, tmp_path / "once more")
    assert json.loads((tmp_path / "once more" / "test" / "000000.json").read_text()) == written


def test_tokens_that_are_no_characters_are_written_as_numbers(tmp_path):
    dataset = text()
    export_leaf(dataset, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "test" / "000000.json").read_text())
    assert written["user_data"]["A_B"]["x"][0] == dataset.text[200:280].tolist()
    assert_equal(from_leaf(tmp_path / "out"), dataset)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_client_without_examples_in_a_part_is_kept(tmp_path, part):
    dataset = made()
    dataset.ranges[0, part, 1] = dataset.ranges[0, part, 0]
    export_leaf(dataset, tmp_path / "out")
    again = from_leaf(tmp_path / "out")
    assert_equal(again, dataset)
    (problem,) = again.check()
    assert f"{PARTS[part]} must have at least 1 example, got 0" in problem


def test_many_users_are_read_as_few_are(tmp_path, monkeypatch):
    monkeypatch.setattr("fedtune.data.formats.leaf.LARGE", 1)  # so that the arrays grow often
    rng = np.random.default_rng(0)
    clients = {f"c{n}": (rng.random((n, 3)), rng.integers(0, 9, n)) for n in range(3, 60)}
    dataset = from_clients(clients, name="made")
    export_leaf(dataset, tmp_path / "out", users_per_file=20)
    again = from_leaf(tmp_path / "out")
    assert_equal(again, dataset)
    assert len(again.x) == len(again.y) == sum(range(3, 60))


def test_leaf_reads_what_is_written_without_what_is_ours(tmp_path):
    dataset = made(np.float32)
    export_leaf(dataset, tmp_path / "out")
    (tmp_path / "out" / "fedtune.json").unlink()
    again = from_leaf(tmp_path / "out", input_shape=[2, 3], scale=1 / 3, num_classes=9)
    assert_equal(again, dataset)


def test_an_existing_folder_is_left_alone_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="must be a new folder, but it exists"):
        export_leaf(made(), tmp_path)

    def fail(*arguments):
        raise OSError("full")

    monkeypatch.setattr("fedtune.data.formats.leaf_export._write_file", fail)
    with pytest.raises(OSError, match="full"):
        export_leaf(made(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "{}", '{"name": "a"}', "[]"])
def test_a_damaged_extra_file_is_told(tmp_path, text):
    export_leaf(made(), tmp_path / "out")
    (tmp_path / "out" / "fedtune.json").write_text(text)
    with pytest.raises(InputError, match=r"fedtune.json must be as `fedtune data export` wrote it"):
        from_leaf(tmp_path / "out")


def test_characters_are_their_places_in_the_vocabulary():
    assert encode_characters(VOCABULARY).tolist() == list(range(80))
    assert encode_characters("/_~ÿé€😀\ufffd").tolist() == [80] * 8
    assert encode_characters("".join(decode_rows(np.arange(81, dtype=np.uint8)[None]))).tolist() == list(range(81))


def test_the_command_line_exports(tmp_path):
    done = CliRunner().invoke(cli.app, ["data", "export", "digits", "--format", "leaf", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert_equal(from_leaf(tmp_path / "out"), fedtune.load("digits"))
    done = CliRunner().invoke(cli.app, ["data", "export", "digits", "--format", "csv", "--out", str(tmp_path / "b")])
    assert str(done.exception) == "unknown format 'csv'; known: leaf"
