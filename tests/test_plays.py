import textwrap

import pytest

from fedtune_datasets.plays import speeches


def parse(text, play="a_play"):
    return [(speech.role, speech.lines) for speech in speeches(play, textwrap.dedent(text))]


def test_a_speech_is_what_follows_a_label_and_a_play_begins_at_its_first_act():
    text = """\
        A PLAY

        THE PERSONS.

        KING.
        The father of them all.

        ACT I.

        SCENE I. A street.

        [Enter the KING and a FOOL.]

        KING.
        What, ho!
        Where is my fool?

        FOOL.
        Here, nuncle.
        """
    assert parse(text) == [("KING", ["What, ho!", "Where is my fool?"]), ("FOOL", ["Here, nuncle."])]


@pytest.mark.parametrize("beginning", ["ACT I.", "Act 1.", "PROLOGUE", "THE PROLOGUE.", "INDUCTION"])
def test_a_play_may_begin_in_several_ways(beginning):
    assert parse(f"KING.\nOne of the persons.\n\n{beginning}\n\nKING.\nSpeak.\n") == [("KING", ["Speak."])]


@pytest.mark.parametrize(
    ("direction", "lines"),
    [
        ("[Exit FOOL.]\n\n", ["One.", "Two."]),
        ("{Exit FOOL.]\n\n", ["One.", "Two."]),
        ("[Exit\nFOOL.]\n\n", ["One.", "Two."]),
        ("[Exeunt [all but KING.]\n\n", ["One.", "Two."]),
        ("[Exit FOOL.\n\n", ["One.", "Two."]),  # never closed: up to the end of the paragraph
        ("[Exit FOOL,\nweeping.\n\n", ["One.", "Two."]),
        ("[FOOLS] vanish.]\n\n", ["One.", "Two."]),  # never opened
        ("Enter FOOL.\n\n", ["One.", "Two."]),
        ("One and a half. [Exit FOOL.\n", ["One.", "One and a half.", "Two."]),  # to the end of the line
        ("DUMB SHOW.\n\n", ["One.", "Two."]),
        ("@@@\n\n", ["One.", "Two."]),
        ("[Aside.]\n\nI.\n", ["One.", "I.", "Two."]),  # one letter is no label
    ],
)
def test_a_direction_is_left_out_and_ends_no_speech(direction, lines):
    assert parse(f"ACT I.\n\nKING.\nOne.\n\n{direction}Two.\n") == [("KING", lines)]


@pytest.mark.parametrize(
    "heading", ["ACT II.", "Scene 2. A wood.", "EPILOGUE", "SONG.", "[SONG]", "     SPRING", "THE END"]
)
def test_a_heading_ends_a_speech(heading):
    text = f"ACT I.\n\nKING.\nOne.\n\n{heading}\n\nA wood near Athens.\n\nFOOL.\nTwo.\n"
    assert parse(text) == [("KING", ["One."]), ("FOOL", ["Two."])]


def test_a_song_under_its_singers_label_is_the_singers():
    text = "ACT I.\n\nFOOL.\n     SONG\n       I.\n   O mistress mine,\n\n       II.\n   What is love?\n"
    assert parse(text) == [("FOOL", ["O mistress mine,", "What is love?"])]


@pytest.mark.parametrize(
    ("paragraph", "role", "lines"),
    [
        ("FIRST LORD.\nAy.", "FIRST_LORD", ["Ay."]),
        ("LYSANDER\nAy.", "LYSANDER", ["Ay."]),  # as in A Midsummer Night's Dream
        ("FIRST LORD. {Aside.]\nAy.", "FIRST_LORD", ["Ay."]),
        ("FIRST LORD.]\nAy.", "FIRST_LORD", ["Ay."]),
        ("1. CAR.\nAy.", "1_CAR", ["Ay."]),
        ("VARRO'S SERVANT.\nAy.", "VARRO_S_SERVANT", ["Ay."]),
        ("DUKE and SENATORS.\nAy.", "DUKE_AND_SENATORS", ["Ay."]),
        ("SHALLOW, PAGE, &c.\nAy.", "SHALLOW_PAGE_C", ["Ay."]),
        ("SERVING-MAN.\n\n[To him.]\n\nAy.", "SERVING_MAN", ["Ay."]),
    ],
)
def test_labels_take_many_forms(paragraph, role, lines):
    assert parse(f"ACT I.\n\n{paragraph}\n") == [(role, lines)]


def test_a_known_label_is_found_beside_the_speech_in_another_case_and_within_a_paragraph():
    text = """\
        ACT I.

        KING.
        One.

        FOOL.
        Two.
        KING. Three.
        FOOL.
        Four.

        KinG.
        Five.

        FOOL. [Aside.] Six.

        Hark! A fool.
        """
    assert parse(text) == [
        ("KING", ["One."]),
        ("FOOL", ["Two."]),
        ("KING", ["Three."]),
        ("FOOL", ["Four."]),
        ("KING", ["Five."]),
        ("FOOL", ["Six.", "Hark! A fool."]),
    ]


@pytest.mark.parametrize(
    "line", ["            FOOL.", "KNAVE. Ay.", "O. No.", "I.", "Fool, go.", "The KING.", "KINGS.", "Fool's gold."]
)
def test_what_only_looks_like_a_label_is_speech(line):
    text = f"ACT I.\n\nFOOL.\nOne.\n\nKING.\nHere is a letter:\n{line}\n"
    assert parse(text) == [("FOOL", ["One."]), ("KING", ["Here is a letter:", line.strip()])]


def test_labels_of_some_plays_are_in_mixed_case():
    text = """\
        ACT I.

        P. Queen.
        Both here.

        Ham.
        Who?
        Ham.

        1 Clown. Hear me.

        Ros and Guil.
        We.

        Ros. and Guil.
        Ay.

        1 Clown.
        I.
        """
    assert parse(text, "hamlet") == [
        ("P_QUEEN", ["Both here."]),
        ("HAM", ["Who?", "Ham."]),  # within a paragraph a name is speech
        ("1_CLOWN", ["Hear me."]),
        ("ROS_AND_GUIL", ["We."]),
        ("ROS_AND_GUIL", ["Ay."]),
        ("1_CLOWN", ["I."]),
    ]
    assert parse("ACT I.\n\nKING.\nHark.\n\n[A noise.]\n\nHamlet.\n") == [("KING", ["Hark.", "Hamlet."])]


def test_variants_of_a_label_are_roles_of_their_own():
    text = "ACT I.\n\nBARDOLPH.\nOne.\n\nLORD BARDOLPH.\nTwo.\n\nBARDOLPHE.\nThree.\n"
    assert [role for role, _ in parse(text)] == ["BARDOLPH", "LORD_BARDOLPH", "BARDOLPHE"]


def test_the_prologue_is_a_role_only_where_it_is_a_label():
    assert parse("ACT V.\n\nPROLOGUE\nIf we offend.\n") == [("PROLOGUE", ["If we offend."])]
    assert parse("ACT V.\n\nPROLOGUE.\n\nCHORUS.\n\nNow entertain.\n") == [("CHORUS", ["Now entertain."])]
    assert parse("ACT II.\n\nFAIRY.\nCome.\n\n     CHORUS.\n  Philomel.\n") == [("FAIRY", ["Come."])]


def test_a_speech_without_a_label_is_known_by_its_first_line():
    text = "ACT I.\n\n[Enter GOWER.]\n\nTo sing a song that old was sung,\nFrom ashes.\n\nKING.\nAy.\n"
    assert parse(text) == [("GOWER", ["To sing a song that old was sung,", "From ashes."]), ("KING", ["Ay."])]


def test_a_text_without_labels_holds_no_speech():
    assert parse("Shall I compare thee\n\nto a summer's day.\n\n.\n") == []
