"""Examples that are tested and trained on at once.

Equal examples have equal fingerprints: the train examples that have the fingerprint of a test example are found first,
then compared with it. Beside a chunk of examples, memory holds the test examples' fingerprints and what was found.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from fedtune import rng
from fedtune.data.chunks import positions, rows
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.parts import PARTS


class Repeats(NamedTuple):
    """Test examples of which a train part holds the same, in x and in y; clients are rows of the ranges searched."""

    own: Int64[np.ndarray, "repeat"]  # the client, for each that stands in the client's own train part
    others: Int64[np.ndarray, "repeat 2"]  # the client and another, for each that stands in the other's train part


class _Examples(NamedTuple):
    client: Int64[np.ndarray, "example"]
    position: Int64[np.ndarray, "example"]
    fingerprint: Shaped[np.ndarray, "example"]


def find_repeats(dataset: FederatedDataset, ranges: Int64[np.ndarray, "client 3 2"]) -> Repeats:
    """The test examples within the ranges that also stand in train within them."""
    test = _read(dataset, ranges[:, PARTS.index("test")])
    known, number = np.unique(test.fingerprint, return_inverse=True)
    train = _read(dataset, ranges[:, PARTS.index("train")], known)  # client after client; fingerprints as numbers
    cell = train.fingerprint * len(ranges) + train.client
    own = _equal(dataset, test, train, *_match(number * len(ranges) + test.client, cell))
    first, last = _match(number, train.fingerprint), _match(number, train.fingerprint, last=True)
    # Of the clients with that fingerprint, the first or, where that is the example's own, the last.
    is_own = train.client[first[1]] == test.client[first[0]]
    chosen = np.where(is_own, last[1], first[1])
    elsewhere = train.client[chosen] != test.client[first[0]]
    others = _equal(dataset, test, train, first[0][elsewhere], chosen[elsewhere])
    return Repeats(test.client[own[0]], np.stack([test.client[others[0]], train.client[others[1]]], axis=1))


def _read(
    dataset: FederatedDataset, ranges: Int64[np.ndarray, "client 2"], known: UInt64[np.ndarray, "_"] | None = None
) -> _Examples:
    """The examples within the ranges; with `known`, those with one of these fingerprints, given by its number there."""
    none = np.zeros(0, np.int64)
    found = [_Examples(none, none, none if known is not None else none.astype(np.uint64))]
    for client, position in positions(ranges, rows(dataset.x, dataset.y)):
        fingerprint = _fingerprints(dataset.x[position], "x") + _fingerprints(dataset.y[position], "y")
        if known is None:
            found.append(_Examples(client, position, fingerprint))
        elif len(known):
            number = np.minimum(np.searchsorted(known, fingerprint), len(known) - 1)
            hit = np.flatnonzero(known[number] == fingerprint)
            # Of a client's examples with one fingerprint, one a chunk is enough.
            _, first = np.unique(number[hit] * len(ranges) + client[hit], return_index=True)
            hit = hit[np.sort(first)]
            found.append(_Examples(client[hit], position[hit], number[hit]))
    return _Examples(*map(np.concatenate, zip(*found, strict=True)))


def _fingerprints(values: Shaped[np.ndarray, "example ..."], array: str) -> UInt64[np.ndarray, "example"]:
    """A sum of each row's bytes, in words of up to four, times random numbers, modulo 2**64.

    Words of four bytes, since a product keeps no more of a number than lies above the lowest bit in which words differ.
    """
    flat = np.ascontiguousarray(values.reshape(len(values), math.prod(values.shape[1:])))
    words = flat.view(np.uint32 if flat[:1].nbytes % 4 == 0 else np.uint8)
    factors = rng.stream(0, f"fingerprint of {array}").integers(
        2**64, size=words.shape[1], dtype=np.uint64
    ) | np.uint64(1)
    sums: np.ndarray = np.einsum("ij,j->i", words.astype(np.uint64), factors)
    return sums


def _match(
    wanted: Int64[np.ndarray, "test"], cells: Int64[np.ndarray, "train"], last: bool = False
) -> tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_"]]:
    """Which of `wanted` are among the cells, and where its first, or its last, stands."""
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
    """Those pairs of a test and a train example that are equal."""
    equal = np.zeros(len(in_test), bool)
    step = rows(dataset.x, dataset.y)
    for start in range(0, len(equal), step):
        pair = slice(start, start + step)
        one, other = test.position[in_test[pair]], train.position[in_train[pair]]
        equal[pair] = True
        for array in (dataset.x, dataset.y):
            equal[pair] &= (array[one] == array[other]).reshape(len(one), -1).all(1)
    return in_test[equal], in_train[equal]
