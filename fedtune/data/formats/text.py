"""LEAF's characters as tokens: each its place in LEAF's vocabulary, and one more token for all others."""

import string
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8

VOCABULARY = "\n !\"&'(),-.0123456789:;>?" + string.ascii_uppercase + "[]" + string.ascii_lowercase + "}"
UNKNOWN = len(VOCABULARY)
CODES = np.full(256, UNKNOWN, np.uint8)
CODES[np.frombuffer(VOCABULARY.encode("ascii"), np.uint8)] = np.arange(UNKNOWN)
CHARACTERS = np.array([*VOCABULARY, "\N{REPLACEMENT CHARACTER}"])


def encode_characters(text: str) -> UInt8[np.ndarray, "character"]:
    """The token of each character."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    codes: np.ndarray = CODES[np.minimum(points, 255)]  # 255 is outside the vocabulary, as is all beyond
    return codes


def decode_rows(tokens: Integer[np.ndarray, "row character"]) -> Sequence[str]:
    """A string for each row; the token for unknown ones becomes a character that is none of the vocabulary's."""
    return ["".join(row) for row in CHARACTERS[tokens]]
