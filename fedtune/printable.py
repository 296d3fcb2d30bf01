"""Text from outside, such as a client's message or a file's content, made safe to print."""


def printable(text: str) -> str:
    r"""The text with an escape such as \x1b in place of each character that could steer a terminal.

    These are the control characters, line ends among them, characters that change the direction of writing, and halves
    of characters, which can't be written at all.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
