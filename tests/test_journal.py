import json
import math
import os
import zlib

import pytest

from fedtune.errors import InputError
from fedtune.runs.journal import FORMAT, DamagedJournalError, Journal, JournalEnds
from fedtune.settings import deciding, digest, resolve
from fedtune.simulation.records import KEY_TYPES, Evaluation


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def ask(number):
    """The ask of a job of three rounds."""
    return {
        **{"event": "ask", "trial": number, "rung": 0, "rounds": 3, "attempt": 0},
        **{"started": 0.0, "finishes": 0.1, "dropped": False, "server": {}, "pool": [[{}]]},
    }


def round_of(trial, number, *, evaluated=True):
    """The line of a round."""
    record = dict.fromkeys(KEY_TYPES, 0) | {"error": math.nan, "loss": math.inf, "entropy": 0.0}
    evaluation = [0.5] * len(Evaluation._fields) if evaluated else None
    return {"event": "round", "trial": trial, "record": record | {"round": number, "evaluation": evaluation}}


def write(path, count=3):
    journal = Journal(path)
    for number in range(count):
        journal.decide(**ask(number))
        journal.note("checkpoint", trial=number, round=3)
    journal.close()


def test_every_line_is_json_and_on_disk_at_once(path):
    journal = Journal(path)
    journal.decide("end", incumbent=0, time=0.0)
    assert json.loads(path.read_text())["event"] == "end"
    journal.close()


def test_decisions_that_are_taken_again_are_not_written_again(path):
    write(path)
    before = path.read_bytes()
    journal = Journal(path)
    for number in range(3):
        journal.decide(**ask(number))
    journal.check_that_it_ends_here()
    assert path.read_bytes() == before
    assert [line["trial"] for line in journal.notes("checkpoint")] == [0, 1, 2]
    journal.decide("end", incumbent=3, time=math.nan)
    journal.close()
    assert path.read_bytes().startswith(before)
    journal = Journal(path)
    for number in range(3):
        journal.decide(**ask(number))
    journal.decide("end", incumbent=3, time=math.nan)
    journal.close()


def test_another_decision_than_before_is_an_error_that_shows_both(path):
    write(path)
    journal = Journal(path)
    with pytest.raises(InputError) as caught:
        journal.decide(**ask(7))
    journal.close()
    shown = "expected ask, trial 7, rung 0, rounds 3, got ask, trial 0, rung 0, rounds 3"
    assert str(caught.value) == f"{path}, line 1, does not fit the tuner: {shown}"


def test_the_order_of_keys_does_not_make_a_decision_another_one(path):
    journal = Journal(path)
    journal.decide(**ask(0) | {"server": {"momentum": 0.5, "decay": 0.0}})
    journal.close()
    journal = Journal(path)
    journal.decide(**ask(0) | {"server": {"decay": 0.0, "momentum": 0.5}})
    journal.check_that_it_ends_here()
    journal.close()


def test_a_difference_that_is_in_no_field_shows_both_decisions(path):
    write(path)
    journal = Journal(path)
    with pytest.raises(InputError) as caught:
        journal.decide(**ask(0) | {"pool": [[]]})
    journal.close()
    assert "\n" not in str(caught.value)
    assert '"pool": [[]]}, got {' in str(caught.value)
    assert str(caught.value).endswith('"pool": [[{}]]}')


def test_a_torn_last_line_is_dropped_wherever_it_was_torn(path):
    write(path)
    data = path.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    for end in range(start, len(data)):
        path.write_bytes(data[:end])
        journal = Journal(path)
        assert len(journal.notes("checkpoint")) == 2
        journal.note("checkpoint", trial=2, round=3)
        journal.close()
        assert path.read_bytes() == data


def test_a_damaged_journal_says_how_to_repair_it_and_up_to_where_it_is_good(tmp_path):
    path = tmp_path / "run" / "asha-seed0" / "journal.jsonl"
    path.parent.mkdir(parents=True)
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], bytes(50), b"\n", *lines[4:]]))
    with pytest.raises(DamagedJournalError) as caught:
        Journal(path)
    assert (caught.value.line_number, caught.value.good_bytes) == (4, sum(map(len, lines[:3])))
    assert str(caught.value).startswith(f"{path}, line 4, is damaged or was edited: its checksum does not fit; ")
    assert str(caught.value).endswith(f": fedtune resume {tmp_path / 'run'} --repair")


def test_decisions_after_which_checkpoints_are_removed_are_on_the_disk_and_others_need_not_be(path, monkeypatch):
    synced = []
    journal = Journal(path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_text().count("\n")))
    journal.decide(**ask(0))
    journal.note("checkpoint", trial=0, round=3)
    assert synced == []
    journal.decide("tell", trial=0, rung=0, rounds=3, time=1.0, score=0.5)
    assert synced == [3]
    journal.decide("end", incumbent=0, time=1.0)
    assert synced == [3, 4]
    journal.sync()
    assert synced == [3, 4, 4]
    journal.close()


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: [lines[0], lines[1].replace('"trial": 0', '"trial": 1'), *lines[2:]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:2], "", *lines[2:]],
        lambda lines: [*lines[:2], "not json", *lines[2:]],
        lambda lines: [*lines[:2], lines[2][: len(lines[2]) // 2], *lines[3:]],
        lambda lines: [lines[0].replace(', "check"', ', "chuck"'), *lines[1:]],
    ],
)
def test_a_journal_that_was_edited_is_a_clear_error(path, edit):
    write(path)
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    with pytest.raises(InputError, match=r"journal.jsonl, line \d, is damaged or was edited: its checksum") as caught:
        Journal(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_damage(path):
    write(path)
    data = bytearray(path.read_bytes())
    data[10] = 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match="line 1, is damaged"):
        Journal(path)


@pytest.mark.parametrize("earlier", [3, FORMAT])
def test_a_study_that_has_begun_keeps_its_format(path, earlier):
    journal = Journal(path)
    settings = resolve([{"data": {"name": "digits"}}])
    begun = {"settings": digest(settings)} | ({"deciding": deciding(settings)} if earlier > 3 else {})
    journal.decide("study", format=earlier, tuner="asha", seed=0, **begun)
    journal.close()
    again = Journal(path)
    assert again.format == earlier
    again.begin("asha", 0, settings)
    again.close()
    assert len(path.read_text().splitlines()) == 1


def test_a_journal_of_another_format_is_refused(path):
    journal = Journal(path)
    journal.decide("study", format=FORMAT + 1)
    journal.close()
    with pytest.raises(InputError, match=f"must have format 3 or 4, got {FORMAT + 1}: another version of fedtune"):
        Journal(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"event": "tell", "trial": 0}, "the field rung is missing"),
        ({"trial": 0}, "unknown event 'None'; known: ask, "),
        ({"event": ["tell"]}, "unknown event "),
        ({"event": "checkpoint", "trial": "0", "round": 9}, "trial must be a valid integer, got '0'"),
        (
            {"event": "checkpoint", "trial": 0, "round": 9, "time": 1.0},
            "unknown field 'time'; known: event, round, trial",
        ),
        ({"event": "checkpoint", "trial": -1, "round": 9}, "trial must be greater than or equal to 0, got -1"),
        ({"event": "end", "incumbent": 0, "time": None}, "time must be a valid number, got None"),
        ({"event": "lost", "trial": 0, "round": 1, "reasons": ["", 3]}, "reasons.1 must be a valid string, got 3"),
        ({"event": "round", "trial": 0, "record": {}}, "the field record.round is missing"),
        ({"event": "study"}, "must have format 3 or 4, got None"),
    ],
)
def test_a_line_of_other_fields_is_a_clear_error_though_its_checksum_fits(path, line, said):
    """As somebody leaves it who edits a journal and computes its checksums anew."""
    journal = Journal(path)
    journal.decide(**ask(0))
    journal._write(line)
    journal.close()
    with pytest.raises(InputError) as caught:
        Journal(path)
    assert str(caught.value).startswith(f"{path}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_that_is_no_json_is_a_clear_error_though_its_checksum_fits(path):
    check = zlib.crc32(b'{"event": }')
    path.write_text(f'{{"event": , "check": "{check:08x}"}}\n')
    with pytest.raises(InputError, match=r"line 1, is damaged or was edited: it is not JSON: Expecting value"):
        Journal(path)


def test_a_journal_that_is_only_read_stays_as_it_is_and_ends(path):
    write(path)
    with path.open("a") as file:
        file.write('{"event": "torn')
    before = path.read_bytes()
    journal = Journal(path, read_only=True)
    for number in range(3):
        assert journal.coming() == (2 * number + 1, ask(number))
        journal.decide(**ask(number))
    for after_the_end in (journal.coming, lambda: journal.decide("end", incumbent=3)):
        with pytest.raises(JournalEnds):
            after_the_end()
    journal.close()
    assert path.read_bytes() == before


ROUNDS = [round_of(0, 1), {"event": "checkpoint", "trial": 0, "round": 1}, round_of(0, 2, evaluated=False)]


@pytest.mark.parametrize(
    "lines",
    [
        [*ROUNDS, round_of(0, 3), {"event": "lost", "trial": 0, "round": 3, "reasons": []}],
        [*ROUNDS, round_of(0, 2), round_of(0, 3)],  # stopped, and gone on with from the checkpoint
        [{"event": "checkpoint", "trial": 0, "round": 2}, round_of(0, 3)],  # from its parent
        [{**ask(1), "dropped": True}, *ROUNDS],
    ],
)
def test_rounds_follow_one_another_or_come_again_from_a_checkpoint_on(path, lines):
    journal = Journal(path)
    journal.decide(**ask(0))
    for line in lines:
        journal._write(line)
    journal.close()
    rounds = [line for line in lines if line["event"] == "round"]
    assert str(Journal(path, read_only=True).notes("round")) == str(rounds)  # as text, NaN equals itself


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([round_of(1, 1)], "round 1 of trial 1 must be asked for and follow the one before, got 0 rounds asked for"),
        ([{**ask(1), "dropped": True}, round_of(1, 1)], "round 1 of trial 1 must be asked for"),
        ([round_of(0, 2)], "round 2 of trial 0 must be asked for and follow the one before, got 3 rounds asked for"),
        ([*ROUNDS, round_of(0, 1)], "round 1 of trial 0 must be asked for and follow the one before"),
        ([*ROUNDS, round_of(0, 3), round_of(0, 4)], "got 3 rounds asked for and 3 as the last"),
        ([{"event": "checkpoint", "trial": 1, "round": 1}], "the checkpoint of trial 1 must be of its last round, 0,"),
        ([{"event": "checkpoint", "trial": 0, "round": 4}], "the checkpoint of trial 0 must be of its last round, 0,"),
        ([*ROUNDS, {"event": "checkpoint", "trial": 0, "round": 2}], "its last round, 2, and that evaluated"),
        ([*ROUNDS, {"event": "checkpoint", "trial": 0, "round": 1}], "its last round, 2, and that evaluated"),
        ([{"event": "lost", "trial": 0, "round": 1, "reasons": []}], "round 1 of trial 0 must come before it, got 0"),
        (
            [{"event": "personalised", "reading": "sampled", "trial": 1, "round": 9, "evaluation": [0.5] * 5}],
            "round 9 of trial 1 must come before it, got 0 as the last",
        ),
    ],
)
def test_what_cannot_follow_is_a_clear_error_though_its_checksum_fits(path, lines, said):
    journal = Journal(path)
    journal.decide(**ask(0))
    for line in lines:
        journal._write(line)
    journal.close()
    with pytest.raises(InputError) as caught:
        Journal(path)
    assert str(caught.value).startswith(f"{path}, line {len(lines) + 1}, is damaged or was edited: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
