import json
import math

import pytest

from fedtune.errors import InputError
from fedtune.simulation.journal import FORMAT, Journal, JournalEnds


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def write(path, count=3):
    journal = Journal(path)
    for number in range(count):
        journal.decide("ask", trial=number, error=0.1 * number)
        journal.note("round", trial=number, loss=math.nan)
    journal.close()


def test_every_line_is_json_and_on_disk_at_once(path):
    journal = Journal(path)
    journal.decide("ask", trial=0)
    assert json.loads(path.read_text())["event"] == "ask"
    journal.close()


def test_decisions_that_are_taken_again_are_not_written_again(path):
    write(path)
    before = path.read_bytes()
    journal = Journal(path)
    for number in range(3):
        assert journal.replaying
        journal.decide("ask", trial=number, error=0.1 * number)
    assert not journal.replaying
    assert path.read_bytes() == before
    assert [line["trial"] for line in journal.notes("round")] == [0, 1, 2]
    journal.decide("ask", trial=3, error=math.nan)
    journal.close()
    assert path.read_bytes().startswith(before)
    journal = Journal(path)
    for number in range(3):
        journal.decide("ask", trial=number, error=0.1 * number)
    journal.decide("ask", trial=3, error=math.nan)
    journal.close()


def test_another_decision_than_before_is_an_error_that_shows_both(path):
    write(path)
    journal = Journal(path)
    with pytest.raises(
        InputError, match=r'line 1, does not fit this run: it says .*"trial": 0, .* where .*"trial": 7'
    ) as caught:
        journal.decide("ask", trial=7, error=0.0)
    journal.close()
    assert "\n" not in str(caught.value)


def test_a_torn_last_line_is_dropped_wherever_it_was_torn(path):
    write(path)
    data = path.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    for end in range(start, len(data)):
        path.write_bytes(data[:end])
        journal = Journal(path)
        assert len(journal.notes("round")) == 2
        journal.note("round", trial=2, loss=math.nan)
        journal.close()
        assert path.read_bytes() == data


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


def test_a_journal_of_another_format_is_refused(path):
    journal = Journal(path)
    journal.decide("study", format=FORMAT + 1)
    journal.close()
    with pytest.raises(InputError, match=f"must have format {FORMAT}, got {FORMAT + 1}: another version of fedtune"):
        Journal(path)


def test_a_journal_that_is_only_read_stays_as_it_is_and_ends(path):
    write(path)
    with path.open("a") as file:
        file.write('{"event": "torn')
    before = path.read_bytes()
    journal = Journal(path, read_only=True)
    for number in range(3):
        assert journal.coming() == (2 * number + 1, {"event": "ask", "trial": number, "error": 0.1 * number})
        journal.decide("ask", trial=number, error=0.1 * number)
    for after_the_end in (journal.coming, lambda: journal.decide("ask", trial=3)):
        with pytest.raises(JournalEnds):
            after_the_end()
    journal.close()
    assert path.read_bytes() == before
