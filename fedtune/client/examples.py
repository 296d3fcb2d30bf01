"""A client's examples: as they are stored, and as a client program and its model get them."""

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
    tokens. So a client that trains on one batch at a time never holds all its examples in the larger form.
    """

    def __init__(
        self,
        x: Shaped[np.ndarray, "example ..."],
        y: Shaped[np.ndarray, "example ..."],
        spec: DatasetSpec,
        device: str | torch.device,
    ) -> None:
        """Shares memory with the arrays if it can."""
        # from_numpy warns about read-only arrays. A copy of the stored bytes is cheap compared with the cast.
        stored = (torch.from_numpy(array) if array.flags.writeable else torch.tensor(array) for array in (x, y))
        self._stored = Examples(*(tensor.to(device) for tensor in stored))
        self._spec = spec

    @property
    def num_examples(self) -> int:
        """The number of examples."""
        return self._stored.num_examples

    def take(self, rows: Int64[Tensor, "row"]) -> Examples:
        """A copy of the examples with these numbers, in this order."""
        taken = self._stored.take(rows)
        return Examples(_inputs(taken.x, self._spec), taken.y)

    def all(self) -> Examples:
        """A copy of all examples."""
        return Examples(_inputs(self._stored.x, self._spec), self._stored.y.clone())


def _inputs(stored: Shaped[Tensor, "example ..."], spec: DatasetSpec) -> Shaped[Tensor, "example ..."]:
    """A copy in the form that a model takes."""
    if spec.input_kind == "token":
        return stored.to(torch.int64, copy=True)
    return stored.to(torch.float32, copy=True).mul_(spec.scale)
