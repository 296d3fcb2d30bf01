"""Everybody's examples in two flat arrays, with index ranges for each client's train, validation and test part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64, Integer, Shaped

from fedtune.data.parts import part_number, part_sizes, split_clients
from fedtune.data.spec import DTYPE_KINDS, LABEL_DTYPES, DatasetSpec, NumberedIds
from fedtune.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

    from fedtune.data.problems import Problem


@dataclass(frozen=True, eq=False)
class FederatedDataset:
    """The examples of all clients. Reading one client costs the same among a hundred clients and among a million.

    Content is not judged when a data set is made, only by `check()`, which reports everything at once.
    """

    name: str
    spec: DatasetSpec
    x: np.ndarray  # (example, *input_shape), of any dtype that fits spec.input_kind
    y: np.ndarray  # (example, *target_shape), int64; float32 for regression
    client_ids: Sequence[str]
    ranges: np.ndarray  # (client, part, 2), int64: [start, stop) into x and y, in the order of PARTS
    text: np.ndarray | None = None  # (character,): what x is overlapping windows of, where it was made `from_text`
    characters: bool = False  # whether the tokens are LEAF's characters, those of `fedtune.data.formats.text`
    hierarchies: Sequence[Any] | None = None  # what LEAF's files say that each client belongs to, such as a play
    tolerated: "Sequence[Problem]" = ()  # warnings about the files it was read from

    def __post_init__(self) -> None:
        kinds = DTYPE_KINDS[self.spec.input_kind]
        if self.x.dtype.kind not in kinds:
            raise InputError(f"x must hold {self.spec.input_kind} inputs, got dtype {self.x.dtype}")
        dtype = np.dtype(LABEL_DTYPES[self.spec.objective])
        if self.y.dtype != dtype:
            raise InputError(f"y must have dtype {dtype}, got {self.y.dtype}")
        shape = (*self.x.shape[:1], *self.spec.target_shape)
        if self.y.shape != shape:
            raise InputError(f"y must have one label an example, shape {shape}, got {self.y.shape}")
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
        clients: Mapping[Any, tuple[Any, Any]],
        *,
        name: str,
        objective: str = "classification",
        num_classes: int | None = None,
        scale: float = 1.0,
        input_kind: str = "real",
        seed: int = 0,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    ) -> "FederatedDataset":
        """A data set of `{client id: (x, y)}`, each client split at random into the fractions of PARTS.

        x and y are arrays, tensors or lists, an example a row. num_classes None means the largest label + 1. The
        targets of a regression are brought to mean 0 and variance 1 over all train parts, each target by itself.
        """
        from fedtune.data.checks import find_problems
        from fedtune.data.problems import BadDataError, form_problems, in_client_order, repeated_ids

        if not clients:
            raise InputError("a data set must have at least one client, got none")
        client_ids = [str(client_id) for client_id in clients]
        xs = [np.asarray(x) for x, _ in clients.values()]
        ys = [np.asarray(y) for _, y in clients.values()]
        if objective not in LABEL_DTYPES:
            raise UnknownNameError("objective", objective, LABEL_DTYPES)
        if problems := form_problems(client_ids, xs, ys, objective):
            unfit = {problem.client for problem in problems}
            if rest := {client_id: pair for client_id, pair in clients.items() if str(client_id) not in unfit}:
                fitting = cls.from_clients(
                    rest,
                    name=name,
                    objective=objective,
                    num_classes=num_classes,
                    scale=scale,
                    input_kind=input_kind,
                    seed=seed,
                    fractions=fractions,
                )
                problems += find_problems(fitting)
            raise BadDataError(in_client_order(repeated_ids(client_ids) + problems, client_ids))
        permutations, ranges = split_clients([len(y) for y in ys], fractions, seed)
        total = sum(len(y) for y in ys)
        x = np.empty((total, *xs[0].shape[1:]), xs[0].dtype)
        y = np.empty((total, *ys[0].shape[1:]), LABEL_DTYPES[objective])
        for client, order in enumerate(permutations):
            x[ranges[client, 0, 0] : ranges[client, 2, 1]] = xs[client][order]
            y[ranges[client, 0, 0] : ranges[client, 2, 1]] = ys[client][order]
        if objective == "regression":
            mean, std = _standardise(y, ranges)
            spec = DatasetSpec(x.shape[1:], input_kind, 0, scale, objective, y.shape[1:], mean, std)
        else:
            classes = _num_classes(y, num_classes)
            spec = DatasetSpec(x.shape[1:], input_kind, classes, scale, objective, y.shape[1:])
        return cls(name, spec, x, y, client_ids, ranges)

    @classmethod
    def from_frame(cls, frame: "pd.DataFrame", *, client: str, label: str, **options: Any) -> "FederatedDataset":
        """A data set of a table, a row an example: see `fedtune.data.formats.tables.from_frame`."""
        from fedtune.data.formats.tables import from_frame

        return from_frame(frame, client=client, label=label, **options)

    @classmethod
    def from_folder(cls, path: str | Path, **options: Any) -> "FederatedDataset":
        """A data set of a folder with a file or folder a client: see `fedtune.data.formats.folders.load_folder`."""
        from fedtune.data.formats.folders import load_folder

        return load_folder(path, **options)

    @classmethod
    def from_leaf(cls, path: str | Path, **options: Any) -> "FederatedDataset":
        """A data set of a folder in LEAF's JSON form: see `fedtune.data.formats.leaf.load_leaf`."""
        from fedtune.data.formats.leaf import load_leaf

        return load_leaf(path, **options)

    @classmethod
    def from_torch(cls, clients: Mapping[Any, Any], *, name: str, **options: Any) -> "FederatedDataset":
        """A data set of a map-style torch Dataset a client, with items (x, y); options as in `from_clients`."""
        arrays = {}
        for client_id, dataset in clients.items():
            items = [dataset[number] for number in range(len(dataset))]
            xs, ys = zip(*items, strict=True) if items else ((), ())
            arrays[client_id] = (np.array([np.asarray(x) for x in xs]), np.array([np.asarray(y) for y in ys]))
        return cls.from_clients(arrays, name=name, **options)

    @classmethod
    def from_hub(
        cls, dataset: Any, partitioner: Any, *, name: str, x: str = "image", y: str = "label", **options: Any
    ) -> "FederatedDataset":
        """A data set of a Hugging Face Dataset, dealt to clients by a partitioner of flwr-datasets.

        x and y are its columns; of images, all must have one size. The options are those of `from_clients`.
        """
        for column in (x, y):
            if column not in dataset.column_names:
                raise UnknownNameError("column", column, dataset.column_names)
        partitioner.dataset = dataset
        clients = {}
        for number in range(partitioner.num_partitions):
            part = partitioner.load_partition(number).with_format("numpy")
            names = getattr(partitioner, "partition_id_to_natural_id", {})
            clients[names.get(number, number)] = (np.asarray(part[x][:]), np.asarray(part[y][:]))
        return cls.from_clients(clients, name=name, **options)

    @classmethod
    def from_arrays(
        cls,
        x: Shaped[np.ndarray, "example ..."],
        y: Shaped[np.ndarray, "example ..."],
        sizes: Integer[np.ndarray, "client"],
        *,
        name: str,
        client_ids: Sequence[str] | None = None,
        objective: str = "classification",
        num_classes: int | None = None,
        scale: float = 1.0,
        input_kind: str = "real",
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    ) -> "FederatedDataset":
        """A data set of arrays in which the clients' examples follow each other, `sizes` of them a client.

        Nothing is copied, so x and y may be memory-mapped files, larger than the memory. A client's parts are its first
        examples, the next and the last: shuffle them yourself where their order means something. y must have the
        objective's dtype, int64 or float32; the targets of a regression stay as they are. num_classes None means the
        largest label + 1, for which all of y is read.
        """
        if len(sizes) == 0 or sizes.min() < 0 or sizes.sum() != len(y):
            raise InputError(f"sizes must be a number >= 0 a client, {len(y)} in all, got {sizes.sum()} in all")
        parts = part_sizes(sizes.astype(np.int64), fractions)
        ranges = np.empty((len(sizes), 3, 2), np.int64)
        ranges[..., 1] = parts.cumsum().reshape(parts.shape)
        np.subtract(ranges[..., 1], parts, out=ranges[..., 0])
        ids = NumberedIds(len(sizes)) if client_ids is None else client_ids
        classes = 0 if objective == "regression" else _num_classes(y, num_classes)
        spec = DatasetSpec(x.shape[1:], input_kind, classes, scale, objective, y.shape[1:])
        return cls(name, spec, x, y, ids, ranges)

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
        permutations, ranges = split_clients([len(chosen) for chosen in indices], fractions, seed)
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
        characters: bool = False,
    ) -> "FederatedDataset":
        """Next-character prediction: example i is `text[i : i + window]`, its label `text[i + window]`.

        `characters` says that the text's tokens are those of `fedtune.data.formats.text`, as LEAF's files hold them.
        x is a view of the text: copied whole, it would take `window` times as much memory.
        """
        if not 1 <= window < len(text):
            raise InputError(f"window must be 1 to {len(text) - 1} (the text has {len(text)} characters), got {window}")
        spec = DatasetSpec((window,), "token", num_classes)
        y = text[window:].astype(np.int64)
        return cls(name, spec, _windows(text, window), y, client_ids, ranges, text, characters)

    @classmethod
    def from_shared(cls, spec: DatasetSpec, arrays: Mapping[str, np.ndarray]) -> "FederatedDataset":
        """The data set whose `shared()` gave the arrays, without its name and its clients' ids."""
        y, ranges, text = arrays["y"], arrays["ranges"], arrays.get("text")
        x = arrays["x"] if text is None else _windows(text, spec.input_shape[0])
        return cls("", spec, x, y, NumberedIds(len(ranges)), ranges, text)

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
        starts, stops = self.ranges[:, part_number(part)].T
        sizes: np.ndarray = stops - starts
        return sizes

    def examples(self, client: int, part: str) -> tuple[np.ndarray, np.ndarray]:
        """One client's (x, y) in one of PARTS: views, not copies."""
        start, stop = self.ranges[client, part_number(part)]
        return self.x[start:stop], self.y[start:stop]

    def check(self) -> list[str]:
        """What would make a run wrong, a sentence each: duplicate ids, then client by client; empty if nothing would.

        `fedtune.data.checks` finds it, and what is only suspicious beside it.
        """
        from fedtune.data.checks import find_problems
        from fedtune.data.problems import errors_of

        return [problem.message for problem in errors_of(find_problems(self))]

    def stats(self) -> dict[str, int | float]:
        """Counts, and how uneven the clients are in size and in labels: see `fedtune.data.stats`."""
        from fedtune.data.stats import stats

        return stats(self)

    def sizes(self) -> Int64[np.ndarray, "client 3"]:
        """How many examples each client has in each of PARTS."""
        sizes: np.ndarray = self.ranges[..., 1] - self.ranges[..., 0]
        return sizes


def _standardise(
    y: Shaped[np.ndarray, "example ..."], ranges: Int64[np.ndarray, "client 3 2"]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Brings the targets, in place, to mean 0 and variance 1 over the train parts; what was taken off and divided by.

    A target that is constant, or not finite somewhere, is only moved or stays: `check` finds the latter.
    """
    targets = y.reshape(len(y), -1)
    used = np.concatenate([targets[start:stop] for start, stop in ranges[:, 0]]).astype(np.float64)
    mean, std = (used.mean(0), used.std(0)) if len(used) else (np.zeros(used.shape[1]), np.ones(used.shape[1]))
    mean[~np.isfinite(mean)] = 0.0
    std[~(np.isfinite(std) & (std > 0))] = 1.0
    targets[...] = (targets - mean) / std
    return tuple(mean.tolist()), tuple(std.tolist())


def _num_classes(y: Integer[np.ndarray, "example ..."], num_classes: int | None) -> int:
    return max(int(y.max(initial=0)) + 1, 1) if num_classes is None else num_classes


def _windows(text: Integer[np.ndarray, "character"], window: int) -> Integer[np.ndarray, "example window"]:
    """Every window of the text that a character follows: a view, which cannot be written to."""
    return np.lib.stride_tricks.sliding_window_view(text[:-1], window)
