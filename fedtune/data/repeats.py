"""Examples that stand in a test part and also in a train part.

Equal examples have equal fingerprints. So the train examples with the fingerprint of a test example are found first,
and then compared with it. Memory holds one chunk of examples, the fingerprints of all test examples, and the results.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from fedtune import rng
from fedtune.data.chunks import chunk_size, positions
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.parts import PARTS


class Repeats(NamedTuple):
    """Test examples that a train part holds too, with equal x and y. A client is given as its row in the ranges."""

    own: Int64[np.ndarray, "repeat"]  # the client, once for each test example that is in its own train part
    others: Int64[np.ndarray, "repeat 2"]  # for each test example that is in another client's train part: both clients


class _Examples(NamedTuple):
    """Examples that were read, by client."""

    client: Int64[np.ndarray, "example"]
    position: Int64[np.ndarray, "example"]
    fingerprint: Shaped[np.ndarray, "example"]


def find_repeats(dataset: FederatedDataset, ranges: Int64[np.ndarray, "client 3 2"]) -> Repeats:
    """The test examples within the ranges that also stand in a train part within the ranges."""
    # The train examples, client after client, that have the fingerprint of a test example.
    test = _read(dataset, ranges[:, PARTS.index("test")])
    known, number = np.unique(test.fingerprint, return_inverse=True)
    train = _read(dataset, ranges[:, PARTS.index("train")], known)  # a fingerprint is its number in known
    # A client and a fingerprint as one number: equal in test and train if the client has both.
    cell = train.fingerprint * len(ranges) + train.client
    own = _equal(dataset, test, train, *_match(number * len(ranges) + test.client, cell))
    first, last = _match(number, train.fingerprint), _match(number, train.fingerprint, last=True)
    # Of the clients with that fingerprint take the first one, or the last one if the first is the example's own client.
    is_own = train.client[first[1]] == test.client[first[0]]
    chosen = np.where(is_own, last[1], first[1])
    elsewhere = train.client[chosen] != test.client[first[0]]
    others = _equal(dataset, test, train, first[0][elsewhere], chosen[elsewhere])
    return Repeats(test.client[own[0]], np.stack([test.client[others[0]], train.client[others[1]]], axis=1))


def _read(
    dataset: FederatedDataset, ranges: Int64[np.ndarray, "client 2"], known: UInt64[np.ndarray, "_"] | None = None
) -> _Examples:
    """The examples within the ranges.

    With `known` only the examples that have one of these fingerprints; a fingerprint is then its number in `known`.
    """
    none = np.zeros(0, np.int64)
    found = [_Examples(none, none, none if known is not None else none.astype(np.uint64))]
    for client, position in positions(ranges, chunk_size(dataset.x, dataset.y)):
        fingerprint = _fingerprints(dataset.x[position], "x") + _fingerprints(dataset.y[position], "y")
        if known is None:
            found.append(_Examples(client, position, fingerprint))
        elif len(known):
            number = np.minimum(np.searchsorted(known, fingerprint), len(known) - 1)
            hit = np.flatnonzero(known[number] == fingerprint)
            # Several examples of a client may have the same fingerprint: one of them in each chunk is enough.
            _, first = np.unique(number[hit] * len(ranges) + client[hit], return_index=True)
            hit = hit[np.sort(first)]
            found.append(_Examples(client[hit], position[hit], number[hit]))
    return _Examples(*map(np.concatenate, zip(*found, strict=True)))


def _fingerprints(values: Shaped[np.ndarray, "example ..."], array: str) -> UInt64[np.ndarray, "example"]:
    """A number for each row: the sum of its words times random numbers, modulo 2**64.

    A word has four bytes if the row can be divided so, else one byte. Longer words would be worse: if two words differ
    only in high bits, their products differ only in these bits and above.
    """
    flat = np.ascontiguousarray(values.reshape(len(values), math.prod(values.shape[1:])))
    words = flat.view(np.uint32 if flat[:1].nbytes % 4 == 0 else np.uint8)
    draws = rng.stream(0, f"fingerprint of {array}").integers(2**64, size=words.shape[1], dtype=np.uint64)
    factors = draws | np.uint64(1)  # odd, so that no bit of a word is lost
    sums: np.ndarray = np.einsum("ij,j->i", words.astype(np.uint64), factors)
    return sums


def _match(
    wanted: Int64[np.ndarray, "test"], cells: Int64[np.ndarray, "train"], last: bool = False
) -> tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]:
    """Which of `wanted` are among the cells, and the position of the first (or `last`) equal cell of each one."""
    order = np.argsort(cells, kind="stable")
    place = np.searchsorted(cells[order], wanted, side="right" if last else "left") - int(last)
    place = np.clip(place, 0, len(cells) - 1)
    if not len(cells):
        return (np.zeros(0, np.int64),) * 2
    found = np.flatnonzero(cells[order[place]] == wanted)
    return found, order[place[found]]


def _equal(
    dataset: FederatedDataset,
    test: _Examples,
    train: _Examples,
    in_test: Int64[np.ndarray, "_"],
    in_train: Int64[np.ndarray, "_"],
) -> tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]:
    """The pairs of a test and a train example that are equal, out of the pairs (in_test, in_train)."""
    equal = np.zeros(len(in_test), bool)
    step = chunk_size(dataset.x, dataset.y)
    for start in range(0, len(equal), step):
        pair = slice(start, start + step)
        one, other = test.position[in_test[pair]], train.position[in_train[pair]]
        equal[pair] = True
        for array in (dataset.x, dataset.y):
            equal[pair] &= (array[one] == array[other]).reshape(len(one), -1).all(1)
    return in_test[equal], in_train[equal]
