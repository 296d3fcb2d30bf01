"""What is wrong with a data set: everything at once, client by client. Examples are read in chunks, never all at once.

An error would make a run wrong or impossible; a warning is only suspicious.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from fedtune.data.federated_dataset import PARTS, FederatedDataset
from fedtune.errors import InputError

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in a sentence that names its client."""

    message: str
    client: str | None = None  # its id; None where the problem is no single client's
    severity: str = "error"  # or "warning"


class BadDataError(InputError):
    """Clients whose arrays make no data set; `problems` holds all that was found in all clients."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(first_of(errors_of(problems)))
        self.problems = list(problems)


def errors_of(problems: Iterable[Problem]) -> list[Problem]:
    """The problems that would make a run wrong or impossible."""
    return [problem for problem in problems if problem.severity == "error"]


def first_of(problems: Sequence[Problem]) -> str:
    """The first problem, and how many more there are: for where there is room for one line."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0].message}{more}"


def in_client_order(problems: Iterable[Problem], client_ids: Sequence[str]) -> list[Problem]:
    """The problems, each once: those of the whole data set, then each client's."""
    place = {client_id: number for number, client_id in reversed(list(enumerate(client_ids)))}
    return sorted(dict.fromkeys(problems), key=lambda problem: place.get(problem.client or "", -1))


def find_problems(dataset: FederatedDataset) -> list[Problem]:
    """Every problem of a data set: duplicate ids, then client by client."""
    problems = repeated_ids(dataset.client_ids)
    num_classes = dataset.spec.num_classes
    if dataset.text is not None and (wrong := _outside(dataset.text, num_classes)).any():
        problems.append(
            Problem(
                f"text: characters must be in 0..{num_classes - 1}, got {wrong.sum()} others, such as "
                f"{dataset.text[wrong][0]}"
            )
        )
    misplaced = _misplaced_parts(dataset)
    sizes = dataset.sizes()
    ranges = np.clip(dataset.ranges, 0, len(dataset.y))
    not_finite = _count_in(ranges, _where(dataset.x, _not_finite) if dataset.x.dtype.kind == "f" else _NOWHERE)
    bad_labels = _where(dataset.y, lambda labels: _outside(labels, num_classes))
    mislabelled = _count_in(ranges, bad_labels)
    for client in np.flatnonzero(misplaced | (sizes < 1).any(1) | (not_finite + mislabelled).any(1)).tolist():
        client_id = dataset.client_ids[client]
        messages = []
        if misplaced[client]:
            messages.append(f"its parts must lie within the {len(dataset.y)} examples and not overlap")
        messages += [
            f"{part} must have at least 1 example, got {size} of the client's {sizes[client].sum()}"
            for part, size in zip(PARTS, sizes[client], strict=True)
            if size < 1
        ]
        if count := not_finite[client].sum():
            messages.append(f"x must be finite, got NaN or infinity in {count} of its examples")
        if count := mislabelled[client].sum():
            start = ranges[client, mislabelled[client].argmax(), 0]
            example = bad_labels[np.searchsorted(bad_labels, start)]
            messages.append(f"labels must be in 0..{num_classes - 1}, got {count} others, such as {dataset.y[example]}")
        problems += [Problem(f"client {client_id!r}: {message}", client_id) for message in messages]
    return problems


def repeated_ids(client_ids: Sequence[str]) -> list[Problem]:
    """A problem for each id that several clients have."""
    return [
        Problem(f"client id {client_id!r} must be unique, got it {count} times", client_id)
        for client_id, count in Counter(client_ids).items()
        if count > 1
    ]


def form_problems(client_ids: Sequence[str], xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]) -> list[Problem]:
    """Every client whose arrays cannot stand in one array with the others': the first client's form is what counts."""
    problems = []
    for client_id, x, y in zip(client_ids, xs, ys, strict=True):
        messages = []
        if x.ndim == 0 or y.shape != x.shape[:1]:
            messages.append(f"y must have one label an example, got shapes {x.shape}, {y.shape}")
        elif x.shape[1:] != xs[0].shape[1:] or x.dtype != xs[0].dtype:
            messages.append(
                f"an example must have shape {xs[0].shape[1:]} and dtype {xs[0].dtype}, as client {client_ids[0]!r} "
                f"has, got {x.shape[1:]} and {x.dtype}"
            )
        if y.dtype.kind not in "ui" and y.size:  # an empty list becomes a float array
            messages.append(f"labels must be whole numbers, got dtype {y.dtype}")
        problems += [Problem(f"client {client_id!r}: {message}", client_id) for message in messages]
    return problems


_NOWHERE = np.zeros(0, np.int64)


def _where(
    array: Shaped[np.ndarray, "example ..."], wrong: Callable[[np.ndarray], np.ndarray]
) -> Int64[np.ndarray, "_"]:
    """The positions of the examples in which `wrong` says that any number is, chunk by chunk."""
    rows = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
    found = [_NOWHERE]
    for start in range(0, len(array), rows):
        flags = wrong(array[start : start + rows])
        found.append(np.flatnonzero(flags.reshape(len(flags), -1).any(1)) + start)
    return np.concatenate(found)


def _count_in(
    ranges: Int64[np.ndarray, "client 3 2"], positions: Int64[np.ndarray, "_"]
) -> Int64[np.ndarray, "client 3"]:
    """How many of the positions, which increase, lie within each range."""
    before = np.searchsorted(positions, ranges)
    counts: np.ndarray = before[..., 1] - before[..., 0]
    return counts


def _misplaced_parts(dataset: FederatedDataset) -> Bool[np.ndarray, "client"]:
    """Whether a client's parts leave the arrays, run backwards or share an example."""
    in_order = np.take_along_axis(dataset.ranges, dataset.ranges[..., :1].argsort(1), 1)
    starts, stops = in_order[..., 0], in_order[..., 1]
    misplaced: np.ndarray = (starts[:, 0] < 0) | (stops.max(1) > len(dataset.y)) | (stops < starts).any(1)
    return misplaced | (starts[:, 1:] < stops[:, :-1]).any(1)


def _outside(classes: Shaped[np.ndarray, "..."], num_classes: int) -> Bool[np.ndarray, "..."]:
    """Whether each number is none of the classes."""
    outside: np.ndarray = (classes < 0) | (classes >= num_classes)
    return outside


def _not_finite(values: Shaped[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
    wrong: np.ndarray = ~np.isfinite(values)
    return wrong
