"""A client's examples: as they are stored, and as a client program and its model get them."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from fedtune.data.spec import DatasetSpec


class Examples(NamedTuple):
    """Examples as a model takes them as input, on the model's device."""

    x: Shaped[Tensor, "example ..."]  # float32 or int64
    y: Shaped[Tensor, "example ..."]  # int64; float32 for regression

    @property
    def num_examples(self) -> int:
        """The number of examples."""
        return self.y.size(0)

    def take(self, rows: Int64[Tensor, "row"]) -> "Examples":
        """A copy of the examples with these numbers, in this order."""
        rows = rows.to(self.y.device)
        return Examples(self.x.index_select(0, rows), self.y.index_select(0, rows))


class StoredExamples:
    """Examples in the form in which they are stored, such as one byte for each pixel.

    `take` and `all` convert the examples to the form that a model takes: float32 times `spec.scale`, or int64 for
    tokens. So a client that trains on one batch at a time never holds all its examples in the larger form. `arrays`
    holds the inputs and the labels as they are stored.
    """

    def __init__(
        self,
        x: Shaped[np.ndarray, "example ..."],
        y: Shaped[np.ndarray, "example ..."],
        spec: DatasetSpec,
        device: str | torch.device,
    ) -> None:
        """Shares memory with the arrays if it can."""
        self.arrays = x, y
        self.spec = spec
        self._device = device

    @property
    def num_examples(self) -> int:
        """The number of examples."""
        return len(self.arrays[1])

    def take(self, rows: Int64[Tensor, "row"]) -> Examples:
        """A copy of the examples with these numbers, in this order."""
        taken = self._stored.take(rows)
        return Examples(inputs_of(taken.x, self.spec), taken.y)

    def all(self) -> Examples:
        """A copy of all examples."""
        return Examples(inputs_of(self._stored.x, self.spec), self._stored.y.clone())

    @property
    def x(self) -> Shaped[Tensor, "example ..."]:
        """The inputs of all examples, as a model takes them."""
        return self._all.x

    @property
    def y(self) -> Shaped[Tensor, "example ..."]:
        """The labels of all examples."""
        return self._all.y

    def __iter__(self) -> Iterator[Tensor]:
        """The inputs, then the labels: `x, y = examples` works as with Examples."""
        return iter(self._all)

    @functools.cached_property
    def _all(self) -> Examples:
        return self.all()

    @functools.cached_property
    def _stored(self) -> Examples:
        # from_numpy warns about read-only arrays. A copy of the stored bytes is cheap compared with the cast.
        stored = (torch.from_numpy(array) if array.flags.writeable else torch.tensor(array) for array in self.arrays)
        return Examples(*(tensor.to(self._device) for tensor in stored))


def inputs_of(stored: Shaped[Tensor, "example ..."], spec: DatasetSpec) -> Shaped[Tensor, "example ..."]:
    """A copy in the form that a model takes."""
    if spec.input_kind == "token":
        return stored.to(torch.int64, copy=True)
    return stored.to(torch.float32, copy=True).mul_(spec.scale)
