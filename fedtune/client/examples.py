"""Examples as a client program gets them."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from fedtune.data.spec import DatasetSpec


class Examples(NamedTuple):
    """Examples as a model gets them, on its device."""

    x: Shaped[Tensor, "example ..."]  # float32 or int64
    y: Shaped[Tensor, "example ..."]  # int64; float32 for regression

    @property
    def num_examples(self) -> int:
        """How many there are."""
        return self.y.size(0)

    def take(self, rows: Int64[Tensor, "row"]) -> "Examples":
        """Those of these numbers, in this order: a copy."""
        rows = rows.to(self.y.device)
        return Examples(self.x.index_select(0, rows), self.y.index_select(0, rows))


class StoredExamples:
    """Examples as they are stored. What is taken of them is as a model gets it: float32 times `spec.scale`, or int64.

    So a client that needs one batch at a time need not have all of them in that form.
    """

    def __init__(
        self,
        x: Shaped[np.ndarray, "example ..."],
        y: Shaped[np.ndarray, "example ..."],
        spec: DatasetSpec,
        device: str | torch.device,
    ) -> None:
        """May share memory with the arrays."""
        # from_numpy warns of read-only arrays; a copy of the stored bytes is cheap beside the cast.
        stored = (torch.from_numpy(each) if each.flags.writeable else torch.tensor(each) for each in (x, y))
        self._stored = Examples(*(tensor.to(device) for tensor in stored))
        self._spec = spec

    @property
    def num_examples(self) -> int:
        """How many there are."""
        return self._stored.num_examples

    def take(self, rows: Int64[Tensor, "row"]) -> Examples:
        """Those of these numbers, in this order: a copy."""
        taken = self._stored.take(rows)
        return Examples(_inputs(taken.x, self._spec), taken.y)

    def all(self) -> Examples:
        """All of them: a copy."""
        return Examples(_inputs(self._stored.x, self._spec), self._stored.y.clone())


def _inputs(stored: Shaped[Tensor, "example ..."], spec: DatasetSpec) -> Shaped[Tensor, "example ..."]:
    """A copy as the model gets them."""
    if spec.input_kind == "token":
        return stored.to(torch.int64, copy=True)
    return stored.to(torch.float32, copy=True).mul_(spec.scale)
