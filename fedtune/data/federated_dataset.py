"""The examples of all clients in two flat arrays, with the ranges of each client's train, validation and test part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64, Integer, Shaped

from fedtune.data.client_ids import NumberedIds
from fedtune.data.parts import part_number, part_sizes, split_clients
from fedtune.data.problems import Problem
from fedtune.data.spec import DTYPE_KINDS, LABEL_DTYPES, DatasetSpec, count_classes
from fedtune.errors import InputError


@dataclass(frozen=True)
class LeafNotes:
    """What LEAF's files say about a data set and other forms can't say. `fedtune data export` writes it again."""

    characters: bool = False  # whether the tokens are LEAF's characters, as in `fedtune.data.formats.text`
    hierarchies: Sequence[Any] | None = None  # what each client belongs to, such as a play; None if it is not known


@dataclass(frozen=True, eq=False)
class FederatedDataset:
    """The examples of all clients. Reading one client takes the same time among a hundred clients and among a million.

    The functions of `fedtune.data` make one, such as `from_clients` and `from_frame`. The constructor checks shapes and
    types; it does not read the examples. `check()` reads them, and reports every problem at once.
    """

    name: str
    spec: DatasetSpec
    x: np.ndarray  # (example, *input_shape), of any dtype that fits spec.input_kind
    y: np.ndarray  # (example, *target_shape), int64; float32 for regression
    client_ids: Sequence[str]
    ranges: np.ndarray  # (client, part, 2), int64: [start, stop) into x and y, in the order of PARTS
    text: np.ndarray | None = None  # (character,), if the data set was made `from_text`: x are its overlapping windows
    leaf: LeafNotes = LeafNotes()  # what only LEAF's files can say
    tolerated: Sequence[Problem] = ()  # warnings about the files that it was read from

    # The methods that need a reader, the checks or the statistics; `fedtune.data` adds them to the class.
    from_clients: ClassVar[Callable[..., "FederatedDataset"]]
    from_torch: ClassVar[Callable[..., "FederatedDataset"]]
    from_hub: ClassVar[Callable[..., "FederatedDataset"]]
    from_frame: ClassVar[Callable[..., "FederatedDataset"]]
    from_folder: ClassVar[Callable[..., "FederatedDataset"]]
    from_leaf: ClassVar[Callable[..., "FederatedDataset"]]
    check: ClassVar[Callable[["FederatedDataset"], list[str]]]
    stats: ClassVar[Callable[["FederatedDataset"], dict[str, int | float]]]

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
        """A data set of arrays that hold the clients' examples one after another; `sizes` has each client's number.

        Nothing is copied, so x and y may be mapped files that are larger than the memory. A client's parts are its
        first examples, the next and the last: shuffle the examples yourself if their order means something. y must have
        the objective's dtype, int64 or float32. The targets of a regression stay as they are. num_classes None means
        the largest label + 1; then all of y is read.
        """
        # No client may have more than all examples: the sum of such numbers could overflow to the right one.
        if len(sizes) == 0 or sizes.min() < 0 or sizes.max() > len(y) or sizes.sum() != len(y):
            raise InputError(f"sizes must be a number >= 0 a client, {len(y)} in all, got {sizes.sum()} in all")
        parts = part_sizes(sizes.astype(np.int64), fractions)
        ranges = np.empty((len(sizes), 3, 2), np.int64)
        ranges[..., 1] = parts.cumsum().reshape(parts.shape)
        np.subtract(ranges[..., 1], parts, out=ranges[..., 0])
        ids = NumberedIds(len(sizes)) if client_ids is None else client_ids
        classes = 0 if objective == "regression" else count_classes(y, num_classes)
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
        """A data set whose client number i holds the examples `indices[i]` of x and y.

        A client's id is its number; `make_partition` gives such indices. num_classes None means the largest label + 1.
        `seed` draws each client's parts, in these `fractions`.
        """
        if not indices:
            raise InputError("a data set must have at least one client, got none")
        permutations, ranges = split_clients([len(chosen) for chosen in indices], fractions, seed)
        order = np.concatenate([chosen[shuffled] for chosen, shuffled in zip(indices, permutations, strict=True)])
        spec = DatasetSpec(x.shape[1:], input_kind, count_classes(y, num_classes), scale)
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
        """A data set for next-character prediction: example i is `text[i : i + window]`, its label `text[i + window]`.

        `ranges` has the examples of each client's train, validation and test part. `characters` says that the tokens
        come from `encode_characters`, so that an export writes them as strings. x is a view of the text: a copy would
        take `window` times as much memory.
        """
        if not 1 <= window < len(text):
            raise InputError(f"window must be 1 to {len(text) - 1} (the text has {len(text)} characters), got {window}")
        spec = DatasetSpec((window,), "token", num_classes)
        y = text[window:].astype(np.int64)
        return cls(name, spec, _windows(text, window), y, client_ids, ranges, text, LeafNotes(characters))

    @classmethod
    def from_shared(cls, spec: DatasetSpec, arrays: Mapping[str, np.ndarray]) -> "FederatedDataset":
        """The data set whose `shared()` gave the arrays, without its name and its clients' names."""
        y, ranges, text = arrays["y"], arrays["ranges"], arrays.get("text")
        x = arrays["x"] if text is None else _windows(text, spec.input_shape[0])
        return cls("", spec, x, y, NumberedIds(len(ranges)), ranges, text)

    def shared(self) -> dict[str, np.ndarray]:
        """The arrays from which `from_shared` makes the data set in another process; a text, not its windows."""
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
        """The x and y of one client in one of PARTS; they are views, not copies."""
        start, stop = self.ranges[client, part_number(part)]
        return self.x[start:stop], self.y[start:stop]

    def sizes(self) -> Int64[np.ndarray, "client 3"]:
        """How many examples each client has in each of PARTS."""
        sizes: np.ndarray = self.ranges[..., 1] - self.ranges[..., 0]
        return sizes


def _windows(text: Integer[np.ndarray, "character"], window: int) -> Integer[np.ndarray, "example window"]:
    """Every window of the text that a character follows: a view, which cannot be written to."""
    return np.lib.stride_tricks.sliding_window_view(text[:-1], window)
