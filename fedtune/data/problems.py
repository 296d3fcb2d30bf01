"""The problems of a data set; each one is a sentence that names its client."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedtune.data.client_ids import NumberedIds
from fedtune.errors import InputError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    message: str  # a sentence, which names the client
    kind: str  # a few words that all problems of this kind share
    client: str | None = None  # the client's id; None if the problem concerns several clients or the whole data set
    severity: Literal["error", "warning"] = "error"


class BadDataError(InputError):
    """The clients' arrays or the table can't become a data set; `problems` holds every problem that was found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(first_of(errors_of(problems)))
        self.problems = list(problems)


def errors_of(problems: Iterable[Problem]) -> list[Problem]:
    """The problems that would make a run wrong or impossible."""
    return [problem for problem in problems if problem.severity == "error"]


def first_of(problems: Sequence[Problem]) -> str:
    """One line: the first problem, and how many more there are."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0].message}{more}"


def in_client_order(problems: Iterable[Problem], client_ids: Sequence[str]) -> list[Problem]:
    """The problems without repetitions: first the problems of no single client, then client by client."""
    place = {client_id: number for number, client_id in reversed(list(enumerate(client_ids)))}
    return sorted(dict.fromkeys(problems), key=lambda problem: place.get(problem.client or "", -1))


def repeated_ids(client_ids: Sequence[str]) -> list[Problem]:
    """A problem for each id that several clients have."""
    if isinstance(client_ids, NumberedIds):
        return []
    return [
        Problem(f"client id {client_id!r} must be unique, got it {count} times", "ids that are not unique", client_id)
        for client_id, count in Counter(client_ids).items()
        if count > 1
    ]


def form_problems(
    client_ids: Sequence[str], xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], objective: str
) -> list[Problem]:
    """The problems of the clients whose arrays can't be joined with the others': the form of most clients is right."""
    forms = [(x.shape[1:], x.dtype) for x in xs]
    shape, dtype = common = Counter(forms).most_common(1)[0][0]
    example_of = client_ids[forms.index(common)]
    target_shape = () if objective == "classification" else Counter(y.shape[1:] for y in ys).most_common(1)[0][0]
    kinds, numbers = ("uif", "real") if objective == "regression" else ("ui", "whole")
    problems = []
    for client_id, x, y, form in zip(client_ids, xs, ys, forms, strict=True):
        messages = []
        if x.size == 0 and y.size == 0 and form != common:  # an empty list has no shape of its own
            messages.append("a client must have at least 1 example, got none")
        elif x.ndim == 0 or y.shape[:1] != x.shape[:1] or (objective == "classification" and y.ndim > 1):
            messages.append(f"y must have one label an example, got shapes {x.shape}, {y.shape}")
        elif form != common:
            messages.append(
                f"an example must have shape {shape} and dtype {dtype}, as client {example_of!r} has, "
                f"got {x.shape[1:]} and {x.dtype}"
            )
        elif y.shape[1:] != target_shape:
            messages.append(f"the labels of an example must have shape {target_shape}, got {y.shape[1:]}")
        if y.dtype.kind not in kinds and y.size:  # an empty list becomes a float array
            messages.append(f"labels must be {numbers} numbers, got dtype {y.dtype}")
        kind = "arrays that differ in form"
        problems += [Problem(f"client {client_id!r}: {message}", kind, client_id) for message in messages]
    return problems
