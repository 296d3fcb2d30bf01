"""What a client program offers: local training, and the hyperparameters that it uses."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from fedtune.client.examples import Examples, StoredExamples
from fedtune.client.flat_model import FlatModel
from fedtune.tuning.space import Config, Hyperparameter

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fedtune.client.examples import Examples
    from fedtune.client.flat_model import FlatModel


Train = Callable[[FlatModel, Tensor, Examples, Config, np.random.Generator], Tensor]  # a client program's `train`


# Its `train_together`: the examples of each of several clients, and their configurations and streams.
TrainTogether = Callable[
    [FlatModel, Tensor, Sequence[StoredExamples], Sequence[Config], Sequence[np.random.Generator]], list[Tensor]
]


# Its `train_batched`: examples of several clients in turn, how many each has, and their configurations and streams.
TrainBatched = Callable[
    [FlatModel, Tensor, Examples, Sequence[int], Sequence[Config], Sequence[np.random.Generator]], Tensor
]


@runtime_checkable
class ClientProgram(Protocol):
    """What a module in the group `fedtune.clients` offers: local training and the hyperparameters it heeds."""

    HYPERPARAMETERS: Mapping[str, Hyperparameter]

    def train(
        self,
        model: "FlatModel",
        weights: "Tensor",
        examples: "Examples",
        config: Config,
        rng: "np.random.Generator",
    ) -> "Tensor":
        """The flat weights after local training on `examples` from `weights`."""
