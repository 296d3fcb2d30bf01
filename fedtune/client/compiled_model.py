"""The interface of a compiled model: local SGD and measuring in compiled code, on a CPU in float32.

A client program that can compile models has a function `compile_model(model: FlatModel, spec: DatasetSpec)`. It returns
a CompiledModel, or a string that says why this model can't be compiled here. The string completes the sentence "clients
train in torch: ...". `train` of such a program calls the model's `compiled` form if there is one, and may be given
StoredExamples in the place of Examples.
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from fedtune.tuning.space import Config

if TYPE_CHECKING:  # programs are looked for by commands that do not need torch
    import numpy as np
    from torch import Tensor

    from fedtune.client.examples import Examples, StoredExamples


@runtime_checkable
class CompiledModel(Protocol):
    """A model in compiled form."""

    digest: str  # of the compiled code: its source, its compiler and the compiler's flags

    def train(
        self,
        weights: "Tensor",
        examples: "Examples | StoredExamples",
        config: Config,
        rng: "np.random.Generator",
    ) -> "Tensor":
        """The flat weights after local SGD from `weights`: the memory of `model.flat`, until the model is next used."""

    def measure(self, weights: "Tensor", examples: "StoredExamples") -> "tuple[np.ndarray, np.ndarray]":
        """The losses and the errors of the weights, one of each for every example, in evaluation mode.

        The model then holds the weights.
        """
