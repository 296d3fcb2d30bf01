"""Everybody's examples in two flat arrays, with index ranges for each client's train, validation and test part."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Integer, Shaped

from fedtune import rng
from fedtune.errors import InputError, UnknownNameError

PARTS = ("train", "validation", "test")
DTYPE_KINDS = {"real": "uif", "token": "ui"}  # NumPy's letters for unsigned, signed and floating-point numbers


@dataclass(frozen=True)
class DatasetSpec:
    """What a model must know about the examples."""

    input_shape: tuple[int, ...]  # of one example
    input_kind: str  # "real": the model gets float32 x * scale; "token": the model gets int64
    num_classes: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.input_kind not in DTYPE_KINDS:
            raise UnknownNameError("input_kind", self.input_kind, DTYPE_KINDS)
        if self.num_classes < 1:
            raise InputError(f"num_classes must be >= 1, got {self.num_classes}")
        if not 0 < self.scale < np.inf:
            raise InputError(f"scale must be a finite number > 0, got {self.scale}")


@dataclass(frozen=True, eq=False)
class FederatedDataset:
    """The examples of all clients. Reading one client costs the same among a hundred clients and among a million.

    Content is not judged when a data set is made, only by `check()`, which reports everything at once.
    """

    name: str
    spec: DatasetSpec
    x: np.ndarray  # (example, *input_shape), of any dtype that fits spec.input_kind
    y: np.ndarray  # (example,), int64
    client_ids: Sequence[str]
    ranges: np.ndarray  # (client, part, 2), int64: [start, stop) into x and y, in the order of PARTS
    text: np.ndarray | None = None  # (character,): what x is overlapping windows of, where it was made `from_text`

    def __post_init__(self) -> None:
        kinds = DTYPE_KINDS[self.spec.input_kind]
        if self.x.dtype.kind not in kinds:
            raise InputError(f"x must hold {self.spec.input_kind} inputs, got dtype {self.x.dtype}")
        if self.y.dtype != np.int64:
            raise InputError(f"y must have dtype int64, got {self.y.dtype}")
        if self.y.shape != self.x.shape[:1]:
            raise InputError(f"y must have one label an example, shape {self.x.shape[:1]}, got {self.y.shape}")
        if self.x.shape[1:] != self.spec.input_shape:
            raise InputError(f"an example must have shape {self.spec.input_shape}, got {self.x.shape[1:]}")
        if len(self.client_ids) == 0:
            raise InputError("a data set must have at least one client, got none")
        if self.ranges.shape != (len(self.client_ids), 3, 2) or self.ranges.dtype != np.int64:
            shape = (len(self.client_ids), 3, 2)
            raise InputError(f"ranges must be int64 of shape {shape}, got {self.ranges.dtype} {self.ranges.shape}")

    @classmethod
    def from_clients(
        cls,
        clients: Mapping[str, tuple[np.ndarray, np.ndarray]],
        *,
        name: str,
        num_classes: int | None = None,
        scale: float = 1.0,
        input_kind: str = "real",
        seed: int = 0,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    ) -> "FederatedDataset":
        """A data set of `{client id: (x, y)}`, each client split at random into the fractions of PARTS.

        num_classes None means the largest label + 1.
        """
        if not clients:
            raise InputError("a data set must have at least one client, got none")
        client_ids = [str(client_id) for client_id in clients]
        xs = [np.asarray(x) for x, _ in clients.values()]
        ys = [np.asarray(y) for _, y in clients.values()]
        _check_same_form(client_ids, xs, ys)
        permutations, ranges = _split([len(y) for y in ys], fractions, seed)
        total = sum(len(y) for y in ys)
        x = np.empty((total, *xs[0].shape[1:]), xs[0].dtype)
        y = np.empty(total, np.int64)
        for client, order in enumerate(permutations):
            x[ranges[client, 0, 0] : ranges[client, 2, 1]] = xs[client][order]
            y[ranges[client, 0, 0] : ranges[client, 2, 1]] = ys[client][order]
        spec = DatasetSpec(x.shape[1:], input_kind, _num_classes(y, num_classes), scale)
        return cls(name, spec, x, y, client_ids, ranges)

    @classmethod
    def from_partition(
        cls,
        x: Shaped[np.ndarray, "example ..."],
        y: Integer[np.ndarray, "example"],
        indices: Sequence[Integer[np.ndarray, "_"]],
        *,
        name: str,
        num_classes: int | None = None,
        scale: float = 1.0,
        input_kind: str = "real",
        seed: int = 0,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    ) -> "FederatedDataset":
        """A data set whose client number i holds the examples `indices[i]` of x and y; its id is that number.

        num_classes None means the largest label + 1.
        """
        if not indices:
            raise InputError("a data set must have at least one client, got none")
        permutations, ranges = _split([len(chosen) for chosen in indices], fractions, seed)
        order = np.concatenate([chosen[shuffled] for chosen, shuffled in zip(indices, permutations, strict=True)])
        spec = DatasetSpec(x.shape[1:], input_kind, _num_classes(y, num_classes), scale)
        client_ids = [str(client) for client in range(len(indices))]
        return cls(name, spec, x[order], y[order].astype(np.int64), client_ids, ranges)

    @classmethod
    def from_text(
        cls,
        text: Integer[np.ndarray, "character"],
        client_ids: Sequence[str],
        ranges: Int64[np.ndarray, "client 3 2"],
        *,
        name: str,
        window: int,
        num_classes: int,
    ) -> "FederatedDataset":
        """Next-character prediction: example i is `text[i : i + window]`, its label `text[i + window]`.

        x is a view of the text: copied whole, it would take `window` times as much memory.
        """
        if not 1 <= window < len(text):
            raise InputError(f"window must be 1 to {len(text) - 1} (the text has {len(text)} characters), got {window}")
        spec = DatasetSpec((window,), "token", num_classes)
        y = text[window:].astype(np.int64)
        return cls(name, spec, _windows(text, window), y, client_ids, ranges, text)

    @classmethod
    def from_shared(cls, spec: DatasetSpec, arrays: Mapping[str, np.ndarray]) -> "FederatedDataset":
        """The data set whose `shared()` gave the arrays, without its name and its clients' ids."""
        y, ranges, text = arrays["y"], arrays["ranges"], arrays.get("text")
        x = arrays["x"] if text is None else _windows(text, spec.input_shape[0])
        return cls("", spec, x, y, [""] * len(ranges), ranges, text)

    def shared(self) -> dict[str, np.ndarray]:
        """The arrays by name that `from_shared` makes the data set from, in another process: of a text, not its
        windows."""
        inputs = {"x": self.x} if self.text is None else {"text": self.text}
        return {**inputs, "y": self.y, "ranges": self.ranges}

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return len(self.client_ids)

    def num_examples(self, part: str) -> Int64[np.ndarray, "client"]:
        """How many examples each client has in one of PARTS."""
        return self._sizes()[:, _part_number(part)]

    def examples(self, client: int, part: str) -> tuple[np.ndarray, np.ndarray]:
        """One client's (x, y) in one of PARTS: views, not copies."""
        start, stop = self.ranges[client, _part_number(part)]
        return self.x[start:stop], self.y[start:stop]

    def check(self) -> list[str]:
        """Every problem found, a sentence each: duplicate ids, then client by client; empty if there is none."""
        problems = [
            f"client id {client_id!r} must be unique, got it {count} times"
            for client_id, count in Counter(self.client_ids).items()
            if count > 1
        ]
        if self.text is not None and (wrong := self._outside(self.text)).any():
            problems.append(
                f"text: characters must be in 0..{self.spec.num_classes - 1}, got {wrong.sum()} others, such as "
                f"{self.text[wrong][0]}"
            )
        misplaced = self._misplaced_parts()
        ranges = np.clip(self.ranges, 0, len(self.y))
        sizes = self._sizes()
        not_finite = _count_in(ranges, self._not_finite())
        mislabelled = _count_in(ranges, self._outside(self.y))
        for client in np.flatnonzero(misplaced | (sizes < 1).any(1) | (not_finite + mislabelled).any(1)).tolist():
            who = f"client {self.client_ids[client]!r}"
            if misplaced[client]:
                problems.append(f"{who}: its parts must lie within the {len(self.y)} examples and not overlap")
            problems += [
                f"{who}: {part} must have at least 1 example, got {size} of the client's {sizes[client].sum()}"
                for part, size in zip(PARTS, sizes[client], strict=True)
                if size < 1
            ]
            if count := not_finite[client].sum():
                problems.append(f"{who}: x must be finite, got NaN or infinity in {count} of its examples")
            if count := mislabelled[client].sum():
                labels = np.concatenate([self.y[start:stop] for start, stop in ranges[client]])
                problems.append(
                    f"{who}: labels must be in 0..{self.spec.num_classes - 1}, got {count} others, such as "
                    f"{labels[self._outside(labels)][0]}"
                )
        return problems

    def stats(self) -> dict[str, int | float]:
        """Counts, and how uneven the clients are in size (population std and skewness) and in labels.

        `label_skew` is the mean over clients of the total-variation distance between the client's labels and all
        clients' labels: 0 if all are alike, near 1 if no client resembles the whole.
        """
        if problems := self.check():
            raise InputError(f"statistics need a data set without problems, got {len(problems)}, first: {problems[0]}")
        sizes = self._sizes().sum(1)
        std = sizes.std()
        skewness = ((sizes - sizes.mean()) ** 3).mean() / std**3 if std > 0 else 0.0
        counts = self._label_counts()
        distance = np.abs(counts / counts.sum(1, keepdims=True) - counts.sum(0) / counts.sum()).sum(1) / 2
        return {
            "clients": self.num_clients,
            "examples": int(sizes.sum()),
            **{part: int(self.num_examples(part).sum()) for part in PARTS},
            "classes": self.spec.num_classes,
            "mean": float(sizes.mean()),
            "std": float(std),
            "skewness": float(skewness),
            "smallest": int(sizes.min()),
            "largest": int(sizes.max()),
            "label_skew": float(distance.mean()),
        }

    def _sizes(self) -> Int64[np.ndarray, "client 3"]:
        sizes: np.ndarray = self.ranges[..., 1] - self.ranges[..., 0]
        return sizes

    def _misplaced_parts(self) -> Bool[np.ndarray, "client"]:
        """Whether a client's parts leave the arrays, run backwards or share an example."""
        in_order = np.take_along_axis(self.ranges, self.ranges[..., :1].argsort(1), 1)
        starts, stops = in_order[..., 0], in_order[..., 1]
        misplaced: np.ndarray = (starts[:, 0] < 0) | (stops.max(1) > len(self.y)) | (stops < starts).any(1)
        return misplaced | (starts[:, 1:] < stops[:, :-1]).any(1)

    def _outside(self, classes: Integer[np.ndarray, "_"]) -> Bool[np.ndarray, "_"]:
        """Whether each number is none of the classes."""
        outside: np.ndarray = (classes < 0) | (classes >= self.spec.num_classes)
        return outside

    def _not_finite(self) -> Bool[np.ndarray, "example"]:
        if self.x.dtype.kind != "f":
            return np.zeros(len(self.y), bool)
        finite: np.ndarray = np.isfinite(self.x).all(axis=tuple(range(1, self.x.ndim)))
        return ~finite

    def _label_counts(self) -> Int64[np.ndarray, "client label"]:
        starts = self.ranges[..., 0].ravel()
        sizes = self.ranges[..., 1].ravel() - starts
        examples = np.repeat(starts - (sizes.cumsum() - sizes), sizes)
        examples += np.arange(len(examples))
        cells = self.y[examples]
        cells += np.repeat(np.arange(len(sizes)) // len(PARTS) * self.spec.num_classes, sizes)
        counts = np.bincount(cells, minlength=self.num_clients * self.spec.num_classes)
        return counts.reshape(self.num_clients, self.spec.num_classes)


def _part_number(part: str) -> int:
    if part not in PARTS:
        raise UnknownNameError("part", part, PARTS)
    return PARTS.index(part)


def _num_classes(y: Integer[np.ndarray, "example"], num_classes: int | None) -> int:
    return max(int(y.max(initial=0)) + 1, 1) if num_classes is None else num_classes


def _windows(text: Integer[np.ndarray, "character"], window: int) -> Integer[np.ndarray, "example window"]:
    """Every window of the text that a character follows: a view, which cannot be written to."""
    return np.lib.stride_tricks.sliding_window_view(text[:-1], window)


def part_sizes(
    num_examples: Int64[np.ndarray, "client"], fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> Int64[np.ndarray, "client 3"]:
    """How many of its examples each client has in each of PARTS; where there are any, test and validation go first."""
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise InputError(f"fractions must be > 0 and sum to 1, got {fractions}")
    wanted = [np.maximum(1, np.rint(fraction * num_examples).astype(np.int64)) for fraction in fractions[1:]]
    validation = np.minimum(wanted[0], num_examples)
    test = np.minimum(wanted[1], num_examples - validation)
    return np.stack([num_examples - validation - test, validation, test], axis=1)


def _count_in(
    ranges: Int64[np.ndarray, "client 3 2"], flags: Bool[np.ndarray, "example"]
) -> Int64[np.ndarray, "client 3"]:
    """How many flags are set within each range."""
    before = np.zeros(len(flags) + 1, np.int64)
    np.cumsum(flags, out=before[1:])
    counts: np.ndarray = before[ranges[..., 1]] - before[ranges[..., 0]]
    return counts


def _split(
    sizes: Sequence[int], fractions: tuple[float, float, float], seed: int
) -> tuple[list[Int64[np.ndarray, "_"]], Int64[np.ndarray, "client 3 2"]]:
    """Each client's examples in shuffled order, and where its parts lie once all clients stand in one row."""
    n = np.array(sizes, np.int64)
    parts = part_sizes(n, fractions)
    starts = (n.cumsum() - n)[:, None] + parts.cumsum(axis=1) - parts
    permutations = [rng.stream(seed, "split", client).permutation(size) for client, size in enumerate(sizes)]
    return permutations, np.stack([starts, starts + parts], axis=2)


def _check_same_form(client_ids: Sequence[str], xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]) -> None:
    """Raise one InputError that names every client whose arrays cannot stand in one array with the first client's."""
    problems = []
    for client_id, x, y in zip(client_ids, xs, ys, strict=True):
        if x.ndim == 0 or y.shape != x.shape[:1]:
            problems.append(f"client {client_id!r}: y must have one label an example, got shapes {x.shape}, {y.shape}")
        elif x.shape[1:] != xs[0].shape[1:] or x.dtype != xs[0].dtype:
            problems.append(
                f"client {client_id!r}: an example must have shape {xs[0].shape[1:]} and dtype {xs[0].dtype}, as "
                f"client {client_ids[0]!r} has, got {x.shape[1:]} and {x.dtype}"
            )
        if y.dtype.kind not in "ui" and y.size:  # an empty list becomes a float array
            problems.append(f"client {client_id!r}: labels must be whole numbers, got dtype {y.dtype}")
    if problems:
        raise InputError("; ".join(problems))
