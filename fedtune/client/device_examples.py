"""The examples of all clients on the device of the model, where training needs them in every round."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from fedtune.client.examples import Examples, StoredExamples, inputs_of
from fedtune.client.measure import ClientPart, joined
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.parts import part_number

LARGEST_SHARE = 0.25  # of the device's memory
NOT_INDEXED = (np.uint16, np.uint32, np.uint64)  # types of which torch can't take rows on every device


class DeviceExamples:
    """Gives the examples of clients as a model takes them.

    A data set that fits a share of a GPU's memory is sent there once, in the form in which it is stored. The examples
    of a larger one are sent whenever they are asked for. On a CPU nothing has to be sent.
    """

    def __init__(self, dataset: FederatedDataset, device: str | torch.device) -> None:
        self._dataset = dataset
        self._device = torch.device(device)
        self._stored = _sent(dataset, self._device)

    def take(self, parts: Sequence[ClientPart]) -> Examples:
        """The examples of these parts, part after part."""
        if self._stored is None:
            stored = [self._dataset.examples(*part) for part in parts]
            return StoredExamples(*joined(stored), self._dataset.spec, self._device).all()
        ranges = [self._dataset.ranges[client, part_number(name)] for client, name in parts]
        rows = torch.from_numpy(np.concatenate([np.arange(start, stop) for start, stop in ranges]))
        taken = self._stored.take(rows)
        return Examples(inputs_of(taken.x, self._dataset.spec), taken.y)

    def sizes(self, parts: Sequence[ClientPart]) -> list[int]:
        """How many examples each part has."""
        ranges = [self._dataset.ranges[client, part_number(name)] for client, name in parts]
        return [int(stop - start) for start, stop in ranges]


def _sent(dataset: FederatedDataset, device: torch.device) -> Examples | None:
    """All examples on the device; None if they should not be sent there as a whole."""
    inputs = dataset.x if dataset.text is None else dataset.text
    if inputs.dtype in NOT_INDEXED or inputs.nbytes + dataset.y.nbytes > LARGEST_SHARE * _memory(device):
        return None
    x, y = (torch.tensor(array, device=device) for array in (inputs, dataset.y))
    if dataset.text is not None:
        x = _windows(x, *dataset.spec.input_shape)
    return Examples(x, y)


def _windows(text: Shaped[Tensor, "character"], window: int) -> Shaped[Tensor, "example window"]:
    """Every window of the text that a character follows, as a view."""
    return text[:-1].unfold(0, window, 1)


def _memory(device: torch.device) -> int:
    """The bytes of a GPU's own memory; 0 for a device that has none."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
