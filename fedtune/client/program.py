"""The interface of a client program: local training, and the hyperparameters that it uses."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from fedtune.tuning.space import Config, Hyperparameter

if TYPE_CHECKING:  # programs are looked for by commands that do not need torch
    import numpy as np
    from torch import Tensor

    from fedtune.client.examples import Examples
    from fedtune.client.flat_model import FlatModel


@runtime_checkable
class ClientProgram(Protocol):
    """A module in the entry-point group `fedtune.clients`, or one that a user names by its file.

    Besides the two members here it may define `train_batched`, which trains several clients in one call, and
    `compile_model`, which compiles a model (`fedtune.client.compiled_model`). clients/README.md says what they must do.
    """

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
