"""What a model must know about the examples of a data set."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from fedtune.errors import InputError, UnknownNameError

DTYPE_KINDS = {"real": "uif", "token": "ui"}  # NumPy's letters for unsigned, signed and floating-point numbers
LABEL_DTYPES = {"classification": np.int64, "next_token": np.int64, "regression": np.float32}  # by objective
IGNORED = -100  # the label of a position that does not count, as in torch's cross_entropy


@dataclass(frozen=True)
class DatasetSpec:
    """What a model must know about the examples. `fedtune.client.objectives` describes the objectives."""

    input_shape: tuple[int, ...]  # of one example
    input_kind: str  # "real": the model gets float32 x * scale; "token": the model gets int64
    num_classes: int  # 0 for regression
    scale: float = 1.0
    objective: str = "classification"
    target_shape: tuple[int, ...] = ()  # of one example's labels: (position,) for next_token
    target_mean: tuple[float, ...] = ()  # what was subtracted from each target of a regression
    target_std: tuple[float, ...] = ()  # by what each target was then divided

    def __post_init__(self) -> None:
        if self.objective not in LABEL_DTYPES:
            raise UnknownNameError("objective", self.objective, LABEL_DTYPES)
        if self.input_kind not in DTYPE_KINDS:
            raise UnknownNameError("input_kind", self.input_kind, DTYPE_KINDS)
        if self.objective == "regression" and self.num_classes:
            raise InputError(f"num_classes must be 0 with objective 'regression', got {self.num_classes}")
        if self.objective != "regression" and self.num_classes < 1:
            raise InputError(f"num_classes must be >= 1, got {self.num_classes}")
        num_axes = {"classification": 0, "next_token": 1}.get(self.objective, len(self.target_shape))
        if len(self.target_shape) != num_axes:
            raise InputError(
                f"the labels of one example must have {num_axes} axes with objective {self.objective!r}, got shape "
                f"{self.target_shape}"
            )
        if not 0 < self.scale < np.inf:
            raise InputError(f"scale must be a finite number > 0, got {self.scale}")

    @property
    def num_outputs(self) -> int:
        """How many numbers a model returns for one label: a logit for each class, or the targets of a regression."""
        return self.num_classes or math.prod(self.target_shape)


def count_classes(y: Integer[np.ndarray, "example ..."], num_classes: int | None) -> int:
    """The number of classes: `num_classes`, or the largest label + 1 (at least 1) if it is None."""
    return max(int(y.max(initial=0)) + 1, 1) if num_classes is None else num_classes
