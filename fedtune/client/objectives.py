"""What a model is trained for: how its outputs on an example become a loss and an error. Lower is better for both.

- `classification`: one label for each example. The model returns logits of shape (example, class).
- `next_token`: one label for each position. The logits have shape (example, position, class), and a position whose
  label is IGNORED does not count.
- `regression`: real targets, which the model returns. The loss and the error are both the squared error. The loaders
  scale the targets to variance 1. Then the mean squared error is the share of the variance that the model does not
  explain: it is 1 for a model that only knows the mean.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedtune.data.spec import IGNORED
from fedtune.errors import InputError


class Measures(NamedTuple):
    """A loss and an error for each example."""

    loss: Float[Tensor, "example"]
    error: Float[Tensor, "example"]


class Objective(NamedTuple):
    """Two functions of a model's outputs and the labels: the mean loss to train on, and what to measure."""

    loss: Callable[[Tensor, Tensor], Float[Tensor, ""]]
    measure: Callable[[Tensor, Tensor], Measures]


def _measure_classification(logits: Float[Tensor, "example class"], y: Shaped[Tensor, "example"]) -> Measures:
    """The cross-entropy, and an error of 0 or 1. NaN among the logits is an error, though argmax would name a class."""
    wrong = (logits.argmax(1) != y) | logits.isnan().any(1)
    return Measures(cross_entropy(logits, y, reduction="none"), wrong.float())


def _next_token_loss(logits: Float[Tensor, "example ..."], y: Shaped[Tensor, "example position"]) -> Float[Tensor, ""]:
    """The mean cross-entropy over all positions that count."""
    if logits.shape[:-1] != y.shape:
        raise InputError(
            f"a next_token model must return logits of shape {(*y.shape, 'class')}, got {(*logits.shape,)}"
        )
    return cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED)


def _measure_next_token(
    logits: Float[Tensor, "example position class"], y: Shaped[Tensor, "example position"]
) -> Measures:
    """Means over an example's positions that count."""
    losses = cross_entropy(logits.transpose(1, 2), y, ignore_index=IGNORED, reduction="none")
    counts = y != IGNORED
    wrong = ((logits.argmax(2) != y) | logits.isnan().any(2)) & counts
    return Measures(losses.sum(1) / counts.sum(1), wrong.sum(1) / counts.sum(1))


def _squared_errors(outputs: Shaped[Tensor, "example ..."], y: Shaped[Tensor, "example ..."]) -> Tensor:
    if outputs.shape != y.shape:
        # One output unit may predict a target of shape (). Any other difference would broadcast to a wrong answer.
        if outputs.numel() != y.numel() or len(outputs) != len(y):
            raise InputError(f"a regression model must return {(*y.shape,)} outputs, got {(*outputs.shape,)}")
        outputs = outputs.reshape(y.shape)
    return (outputs - y).square().flatten(1) if y.ndim > 1 else (outputs - y).square()[:, None]


def _regression_loss(outputs: Shaped[Tensor, "example ..."], y: Shaped[Tensor, "example ..."]) -> Float[Tensor, ""]:
    return _squared_errors(outputs, y).mean()


def _measure_regression(outputs: Shaped[Tensor, "example ..."], y: Shaped[Tensor, "example ..."]) -> Measures:
    errors = _squared_errors(outputs, y).mean(1)
    return Measures(errors, errors)


def check_outputs(objective: str, outputs: Tensor, y: Tensor, num_outputs: int) -> None:
    """Raises InputError unless a model's outputs on examples with these labels have the shape the objective needs."""
    if objective == "regression":
        _squared_errors(outputs, y)
    elif outputs.shape != (*y.shape, num_outputs):
        raise InputError(f"it must return logits of shape {(*y.shape, num_outputs)}, got {(*outputs.shape,)}")


OBJECTIVES = {
    "classification": Objective(cross_entropy, _measure_classification),
    "next_token": Objective(_next_token_loss, _measure_next_token),
    "regression": Objective(_regression_loss, _measure_regression),
}
