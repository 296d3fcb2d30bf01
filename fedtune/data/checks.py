"""Every problem of a data set, client by client. Examples are read in chunks, never all at once.

An error would make a run wrong or impossible; a warning is only suspicious.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from fedtune.data.chunks import chunk_size, positions
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.parts import PARTS
from fedtune.data.problems import Problem, errors_of, repeated_ids
from fedtune.data.repeats import find_repeats
from fedtune.data.spec import IGNORED

# The most that a quick check reads.
QUICK_BYTES = 1 << 28
QUICK_EXAMPLES = 1 << 20
QUICK_CLIENTS = 1000


def check(dataset: FederatedDataset) -> list[str]:
    """A sentence for each problem that would make a run wrong or impossible; empty if there is none."""
    return [problem.message for problem in errors_of(find_problems(dataset))]


def find_problems(dataset: FederatedDataset, *, quick: bool = False) -> list[Problem]:
    """Every problem of a data set.

    First come the warnings about its files and ids that are not unique, then the problems of each client, then those of
    several clients, last a lone class.

    A quick check looks at all ids and at the size and place of all parts. If the examples are more than QUICK_EXAMPLES,
    or take more than QUICK_BYTES, it reads only as many: the first examples in each part of up to QUICK_CLIENTS
    clients, spread evenly. In the other examples it does not see NaN, a wrong label, or a repeated test example.
    """
    clients, ranges = _sample(dataset) if quick else _everything(dataset)
    misplaced = _misplaced_parts(dataset)
    # Repeats are searched only among the clients whose parts are in their place.
    in_place = ~misplaced[clients]
    searched, repeats = clients[in_place], find_repeats(dataset, ranges[in_place])
    findings = [
        *_part_findings(dataset, misplaced),
        *_content_findings(dataset, clients, ranges),
        *_repeat_findings(dataset, searched[repeats.own]),
    ]
    return [
        *dataset.tolerated,
        *repeated_ids(dataset.client_ids),
        *_text_problems(dataset),
        *(_problem(dataset, finding) for finding in sorted(findings, key=itemgetter(0))),
        *_repeats_elsewhere(dataset, searched[repeats.others]),
        *_lone_class(dataset),
    ]


class _Finding(NamedTuple):
    """A problem of the client with this number."""

    client: int
    kind: str
    message: str  # without the client's id
    severity: Literal["error", "warning"] = "error"


class _Content(NamedTuple):
    """A condition on each number of an array."""

    kind: str  # of the problem, if the condition does not hold
    array: Shaped[np.ndarray, "example ..."]
    wrong: Callable[[np.ndarray], np.ndarray]  # whether each number breaks the condition
    says: Callable[[int, object], str]  # the message, from how many examples are wrong and one wrong number


def _problem(dataset: FederatedDataset, finding: _Finding) -> Problem:
    """The problem that names the client by its id."""
    client_id = dataset.client_ids[finding.client]
    return Problem(f"client {client_id!r}: {finding.message}", finding.kind, client_id, finding.severity)


def _text_problems(dataset: FederatedDataset) -> Iterator[Problem]:
    """A problem if the text has characters outside the classes: some may be the label of no example."""
    if dataset.text is not None and (wrong := _outside(dataset.text, dataset.spec.num_classes)).any():
        message = f"text: characters must be in 0..{dataset.spec.num_classes - 1}, got {wrong.sum()} others, such as "
        yield Problem(f"{message}{dataset.text[wrong][0]}", "characters outside the range")


def _lone_class(dataset: FederatedDataset) -> Iterator[Problem]:
    """A warning if all examples of a classification have the same label: nothing can be learned."""
    if dataset.spec.objective == "classification" and len(dataset.y):
        label, step = dataset.y[0], chunk_size(dataset.y)
        starts = range(0, len(dataset.y), step)
        if all((dataset.y[start : start + step] == label).all() for start in starts):  # stops at the first other label
            message = f"labels should be of two classes or more, got {label} in every example"
            yield Problem(message, "a lone class", None, "warning")


def _repeat_findings(dataset: FederatedDataset, own: Int64[np.ndarray, "repeat"]) -> Iterator[_Finding]:
    """The clients whose test examples stand in their own train part; `own` has the client once for each example."""
    for client, count in sorted(Counter(own.tolist()).items()):
        start, stop = dataset.ranges[client, PARTS.index("test")].tolist()
        message = f"{count} of its {stop - start} test examples also stand in its train part"
        yield _Finding(client, "test examples that also stand in train", message, "warning")


def _repeats_elsewhere(dataset: FederatedDataset, others: Int64[np.ndarray, "repeat 2"]) -> Iterator[Problem]:
    """One warning about all test examples of one client that stand in the train part of another client."""
    if len(others):
        client, other = (dataset.client_ids[client] for client in others[0].tolist())
        message = f"{len(others)} test examples also stand in another client's train part, such as one of "
        kind = "test examples that stand in another client's train part"
        yield Problem(f"{message}client {client!r} in that of {other!r}", kind, None, "warning")


def _part_findings(dataset: FederatedDataset, misplaced: Bool[np.ndarray, "client"]) -> Iterator[_Finding]:
    """The clients whose parts lie in a wrong place or are empty."""
    for client in np.flatnonzero(misplaced).tolist():
        message = f"its parts must lie within the {len(dataset.y)} examples and not overlap"
        yield _Finding(client, "misplaced parts", message)
    for client, part in np.argwhere(dataset.ranges[..., 1] <= dataset.ranges[..., 0]).tolist():
        sizes = (dataset.ranges[client, :, 1] - dataset.ranges[client, :, 0]).tolist()
        message = f"{PARTS[part]} must have at least 1 example, got {sizes[part]} of the client's {sum(sizes)}"
        yield _Finding(client, "empty parts", message)


def _content_findings(
    dataset: FederatedDataset, clients: Int64[np.ndarray, "client"], ranges: Int64[np.ndarray, "client 3 2"]
) -> Iterator[_Finding]:
    """The clients that have wrong numbers within the ranges."""
    parts = ranges.reshape(-1, 2)
    for content in _contents(dataset):
        # Count the wrong examples of each part, and keep the position of the first one.
        counts, first = np.zeros(len(parts), np.int64), np.zeros(len(parts), np.int64)
        for part, position in positions(parts, chunk_size(content.array)):
            block = content.array[position]
            flags = content.wrong(block).reshape(len(block), -1).any(1)
            if flags.any():
                wrong_parts, place = np.unique(part[flags], return_index=True)
                first[wrong_parts] = np.where(counts[wrong_parts] > 0, first[wrong_parts], position[flags][place])
                np.add.at(counts, part[flags], 1)
        # Report each client once, with one wrong number from the part that has the most.
        by_client = counts.reshape(-1, len(PARTS))
        for client in np.flatnonzero(by_client.any(1)).tolist():
            example = content.array[first.reshape(by_client.shape)[client, by_client[client].argmax()]][None]
            message = content.says(int(by_client[client].sum()), example[content.wrong(example)][0])
            yield _Finding(int(clients[client]), content.kind, message)


def _contents(dataset: FederatedDataset) -> Iterator[_Content]:
    """The conditions on the data set's inputs and labels."""
    num_classes = dataset.spec.num_classes
    objective = dataset.spec.objective
    if dataset.x.dtype.kind == "f":
        yield _finite("x", dataset.x)
    if objective == "regression":
        yield _finite("y", dataset.y)
    if objective == "classification":
        yield _Content(
            "labels outside the range",
            dataset.y,
            lambda labels: _outside(labels, num_classes),
            lambda count, label: f"labels must be in 0..{num_classes - 1}, got {count} others, such as {label}",
        )
    elif objective == "next_token":
        yield _Content(
            "labels outside the range",
            dataset.y,
            lambda labels: _outside(labels, num_classes) & (labels != IGNORED),
            lambda count, label: (
                f"labels must be in 0..{num_classes - 1}, or {IGNORED} if a position does not count, got others in "
                f"{count} of its examples, such as {label}"
            ),
        )


def _finite(name: str, array: Shaped[np.ndarray, "example ..."]) -> _Content:
    def says(count: int, value: object) -> str:
        return f"{name} must be finite, got NaN or infinity in {count} of its examples"

    return _Content(f"NaN or infinity in {name}", array, _not_finite, says)


def _everything(dataset: FederatedDataset) -> tuple[Int64[np.ndarray, "client"], Int64[np.ndarray, "client 3 2"]]:
    """All clients, and the parts of their ranges that lie within the arrays."""
    return np.arange(dataset.num_clients), np.clip(dataset.ranges, 0, len(dataset.y))


def _sample(dataset: FederatedDataset) -> tuple[Int64[np.ndarray, "_"], Int64[np.ndarray, "_ 3 2"]]:
    """The clients that a quick check reads, and the ranges that it reads of them."""
    limit = min(QUICK_EXAMPLES, QUICK_BYTES // max(1, dataset.x[:1].nbytes + dataset.y[:1].nbytes))
    if np.maximum(dataset.sizes(), 0).sum() <= limit:
        return _everything(dataset)
    num_clients = min(dataset.num_clients, QUICK_CLIENTS, max(1, limit // 24))
    clients = np.linspace(0, dataset.num_clients - 1, num_clients).round().astype(np.int64)
    starts, stops = np.clip(dataset.ranges[clients], 0, len(dataset.y)).transpose(2, 0, 1)
    stops = np.minimum(stops, starts + max(1, limit // (len(PARTS) * num_clients)))
    return clients, np.stack([starts, stops], axis=2)


def _misplaced_parts(dataset: FederatedDataset) -> Bool[np.ndarray, "client"]:
    """For each client, whether its parts leave the arrays, run backwards or share an example."""
    misplaced = np.zeros(dataset.num_clients, bool)
    step = chunk_size(dataset.ranges)
    for some in (slice(start, start + step) for start in range(0, dataset.num_clients, step)):
        ranges = dataset.ranges[some]
        starts, stops = np.take_along_axis(ranges, ranges[..., :1].argsort(1), 1).transpose(2, 0, 1)
        misplaced[some] = (starts[:, 0] < 0) | (stops.max(1) > len(dataset.y)) | (stops < starts).any(1)
        misplaced[some] |= (starts[:, 1:] < stops[:, :-1]).any(1)
    return misplaced


def _outside(classes: Shaped[np.ndarray, "..."], num_classes: int) -> Bool[np.ndarray, "..."]:
    """Whether each number is not one of the classes."""
    outside: np.ndarray = (classes < 0) | (classes >= num_classes)
    return outside


def _not_finite(values: Shaped[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
    """Whether each number is NaN or infinite."""
    wrong: np.ndarray = ~np.isfinite(values)
    return wrong
