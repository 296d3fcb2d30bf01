"""LEAF's characters as tokens.

The token of a character is its place in LEAF's vocabulary; all characters outside the vocabulary share one more token.
"""

import string
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8

VOCABULARY = "\n !\"&'(),-.0123456789:;>?" + string.ascii_uppercase + "[]" + string.ascii_lowercase + "}"
UNKNOWN = len(VOCABULARY)
CHARACTER_CLASSES = len(VOCABULARY) + 1  # LEAF's 80 characters, and one class for all others
CODES = np.full(256, UNKNOWN, np.uint8)
CODES[np.frombuffer(VOCABULARY.encode("ascii"), np.uint8)] = np.arange(UNKNOWN)
CHARACTERS = np.array([*VOCABULARY, "\N{REPLACEMENT CHARACTER}"])


def encode_characters(text: str) -> UInt8[np.ndarray, "character"]:
    """The token of each character, 0 to CHARACTER_CLASSES - 1."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    codes: np.ndarray = CODES[np.minimum(points, 255)]  # 255 is outside the vocabulary, and so is every larger number
    return codes


def decode_rows(tokens: Integer[np.ndarray, "row character"]) -> Sequence[str]:
    """A string for each row. The token of unknown characters becomes U+FFFD, which is not in the vocabulary."""
    return ["".join(row) for row in CHARACTERS[tokens]]
