"""Operations that repeat, recorded as CUDA graphs.

On a GPU the start of an operation takes some microseconds. A step of a small model is a hundred such operations and
takes little else. A CUDA graph starts all of them at once. On other devices nothing is recorded.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP = 3  # calls before the one that is recorded; they also choose the kernels and make their workspaces
MOST_GRAPHS = 32  # of one Recorder; each keeps a copy of its inputs

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]


class Graph(NamedTuple):
    """A recorded call: what does it again, and the tensors from which it reads its inputs."""

    replay: Replay
    inputs: list[Tensor]


class Recorder:
    """Calls functions, and records those calls that come often. A replay has the same results as a call.

    If `records` is True, the tensors that the functions change must stay in their place.
    """

    def __init__(self, capture: Capture | None) -> None:
        """`capture` is what `capture_on` gives for the device; None if nothing is to be recorded."""
        self.records = capture is not None
        self._capture = capture
        self._num_calls: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, Graph] = {}

    def call(self, key: Hashable, function: Callable[..., None], inputs: Sequence[Tensor]) -> None:
        """Does `function(*inputs)`. Calls with the same key must be equal in all but the values of tensors.

        The function returns nothing; it changes tensors that are not among the inputs.
        """
        if self._capture is not None and self._is_due(key):
            self._record(key, function, inputs)
        if (graph := self._graphs.get(key)) is None:
            function(*inputs)
            return
        for kept, given in zip(graph.inputs, inputs, strict=True):
            kept.copy_(given)
        graph.replay()

    def _is_due(self, key: Hashable) -> bool:
        if key in self._graphs or len(self._graphs) == MOST_GRAPHS:
            return False
        self._num_calls[key] += 1
        return self._num_calls[key] > WARM_UP

    def _record(self, key: Hashable, function: Callable[..., None], inputs: Sequence[Tensor]) -> None:
        assert self._capture is not None
        kept = [given.clone() for given in inputs]
        try:
            self._graphs[key] = Graph(self._capture(lambda: function(*kept)), kept)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation that can't be recorded, such as one that waits for the device
            self._capture = None


def capture_on(device: torch.device) -> Capture | None:
    """What records a function's operations on this device, without doing them. None if the device can't do that."""
    if device.type != "cuda":
        return None
    # All graphs may share their memory: no graph reads what another one left there.
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
            function()
        replay: Replay = graph.replay
        return replay

    return capture
